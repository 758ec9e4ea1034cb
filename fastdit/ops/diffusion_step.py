"""diffusion_step: one update of any sampler, as a row of its table.

    e  = guided(model output)              # u + s·(c − u) on the first guided channels
    x0 = a·x + b·e                         # clamped to ±clip if asked
    σ  = sigma, or with a learned range sigma·exp(½(f·max_log + (1 − f)·min_log)), f = (v + 1)/2
    x' = cx·x + c0·x0 + cp·x0_previous + σ·noise

DDPM, DDIM, DPM-Solver++ and the flow-matching solvers differ only in these coefficients, which
`fastdit.diffusion` computes in float64 and stores as a table `(S, 9)` with the columns
`fastdit.reference.TABLE_COLUMNS`. Table and step index are read on the device, so that a captured
CUDA graph of one step replays for all of them.

Noise is given, or drawn inside the op from a `seed`: Philox keyed by (seed, sample, step), the same
for any batch and on any device (`fastdit.philox` has the layout to the bit). The model's output is
an image, or the token rows of its last layer, whose unpatchify is then part of the read.

Least traffic: x, the model output, the noise and the previous x0 once in, x' and x0 once out; with
a seed the noise is not read, with token rows there is no unpatchified copy. The published code
issues about 60 kernels for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from fastdit import reference
from fastdit.backends import direct_calls
from fastdit.ops import _checks
from fastdit.ops._library import Op, define, gradient_like, present

_TABLE_DTYPES = (torch.float32, torch.float64)
_ARGUMENTS = (
    "Tensor x, Tensor model_output, Tensor table, Tensor step, Tensor? noise, "
    "Tensor? x0_previous, float? clip, bool learned_range, int guided_channels, Tensor? seed, "
    "int[]? patch"
)


def _fake(x, *_rest):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))


def _fake_backward(dout, dx0, x, model_output, table, step, noise, x0_previous, *_rest):
    return gradient_like((x, model_output, noise, x0_previous), x)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.clip, ctx.learned_range, ctx.guided_channels, seed, ctx.patch = inputs
    ctx.save_for_backward(*tensors, seed)


def _backward(ctx, dout, dx0):
    *tensors, seed = ctx.saved_tensors
    *_, noise, x0_previous = tensors
    dx, doutput, *rest = _diffusion_step_backward(
        dout.contiguous(),
        dx0.contiguous(),
        *tensors,
        ctx.clip,
        ctx.learned_range,
        ctx.guided_channels,
        seed,
        ctx.patch,
    )
    return dx, doutput, None, None, *present(rest, (noise, x0_previous)), *[None] * 5


_diffusion_step_backward = define(
    f"diffusion_step_backward(Tensor dout, Tensor dx0, {_ARGUMENTS}) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    reference.diffusion_step_backward,
    _fake_backward,
)
_diffusion_step = Op(
    f"diffusion_step({_ARGUMENTS}) -> (Tensor, Tensor)",
    reference=reference.diffusion_step,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    out=("x'", "x0"),
    replaceable=("x", "noise", "x0_previous"),
)


def _check_patch(x: Tensor, patch) -> list[int]:
    """`patch` as a list of ints, one for each axis of `x` behind the channels."""
    size = x.shape[2:]
    sizes = [patch] * len(size) if isinstance(patch, int) else list(patch)
    fits = len(sizes) == len(size) <= 2 and all(isinstance(p, int) and p > 0 for p in sizes)
    if not sizes or not fits or any(n % p for n, p in zip(size, sizes, strict=True)):
        allowed = f"a positive int, or one for each of the one or two sizes {tuple(size)}"
        _checks.fail("patch", repr(patch), allowed + ", which it divides")
    return sizes


def _check_output(x, shape, model_output, learned_range, guided_channels, patch):
    batch, channels = shape[0], shape[1]
    if not isinstance(guided_channels, int) or not 0 <= guided_channels <= 2 * channels:
        _checks.fail("guided_channels", repr(guided_channels), f"an int from 0 to {2 * channels}")
    pixels = 1 if patch is None else math.prod(patch)
    leading = (2 * batch if guided_channels else batch,)
    if patch is not None:
        leading += (math.prod(shape[2:]) // pixels,)
    trailing = tuple(shape[2:]) if patch is None else ()
    allowed = (*leading, 2 * channels * pixels, *trailing)
    if not isinstance(model_output, Tensor):
        got = type(model_output).__name__
        raise TypeError(f"model_output: got {got}, allowed is a tensor {allowed}")
    got = model_output.shape
    fits = got == allowed or (not learned_range and got == (*leading, channels * pixels, *trailing))
    if not fits or not model_output.is_floating_point() or model_output.device != x.device:
        single = "" if learned_range else f"{(*leading, channels * pixels, *trailing)} or "
        allowed = f"{single}{allowed}, floating point, on {x.device}"
        _checks.fail("model_output", _checks.described(model_output), allowed)


def _check_table(x, table):
    columns = len(reference.TABLE_COLUMNS)
    fits = isinstance(table, Tensor) and table.dim() == 2 and table.shape[1] == columns
    if not fits or table.dtype not in _TABLE_DTYPES or table.device != x.device:
        allowed = f"(steps, {columns}) float32 or float64 on {x.device}"
        _checks.fail("table", _checks.described(table), allowed)


def _indices(name: str, value, x: Tensor, least: int, most: int) -> Tensor:
    """An int from `least` to `most` as a tensor; or an int64 tensor () or (B,) as it is."""
    if isinstance(value, Tensor):
        shape = value.shape
        one_each = len(shape) == 0 or (len(shape) == 1 and shape[0] == x.shape[0])
        if one_each and value.dtype == torch.int64 and value.device == x.device:
            return value
    elif isinstance(value, int) and not isinstance(value, bool):
        if not least <= value <= most:
            _checks.fail(name, value, f"{least} to {most}")
        return torch.full((), value, dtype=torch.int64, device=x.device)
    allowed = f"an int, or an int64 tensor () or ({x.shape[0]},) on {x.device}"
    _checks.fail(name, _checks.described(value), allowed)


def _arguments(
    x,
    model_output,
    table,
    step,
    noise,
    x0_previous,
    clip,
    learned_range,
    guided_channels,
    seed,
    patch,
):
    _checks.tensor("x", x, range(2, 6), "(B, C, ...)")
    if patch is not None:
        patch = _check_patch(x, patch)
    shape = x.shape
    _check_output(x, shape, model_output, learned_range, guided_channels, patch)
    _check_table(x, table)
    step = _indices("step", step, x, 0, table.shape[0] - 1)
    if noise is not None:
        _checks.like("noise", noise, x)
    if seed is not None:
        if noise is not None:
            _checks.fail("seed", "a seed beside noise", "one of noise and seed")
        seed = _indices("seed", seed, x, -(2**63), 2**63 - 1)
    if x0_previous is not None:
        _checks.like("x0_previous", x0_previous, x)
    if clip is not None and not clip > 0:
        _checks.fail("clip", repr(clip), "None or a number > 0")
    return (
        x,
        model_output,
        table,
        step,
        noise,
        x0_previous,
        clip,
        learned_range,
        guided_channels,
        seed,
        patch,
    )


@_diffusion_step.public(_arguments)
def diffusion_step(
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    step: Tensor | int,
    *,
    noise: Tensor | None = None,
    seed: Tensor | int | None = None,
    x0_previous: Tensor | None = None,
    clip: float | None = None,
    learned_range: bool = False,
    guided_channels: int = 0,
    patch: int | Sequence[int] | None = None,
    out: tuple[Tensor, Tensor | None] | None = None,
    need_x0: bool = True,
) -> tuple[Tensor, Any]:
    """One sampler update; the formula is at the top of this module.

    Args:
        x: `(B, C, ...)`, the current samples.
        model_output: `(B, C or 2C, ...)`, or with `patch` token rows `(B, T, prod(patch)·(C or
            2C))`; with guidance `(2B, ...)`, the conditional half first.
        table: `(S, 9)`, float32 or float64: one row of coefficients for each step.
        step: which row: an int, an int64 tensor `()`, or one `(B,)` with an index for each sample.
            A tensor is never read on the host; each index must lie in the table.
        noise: like `x`; without it and without a seed the noise term is left out.
        seed: draw the noise here instead: an int or an int64 tensor `()`, each sample then has
            noise of its own by its place in the batch, or `(B,)`, a seed for each sample, whose
            noise then does not depend on its place. The noise changes with the step.
        x0_previous: like `x`, the x0 of the step before, for multi-step solvers.
        clip: x0 is clamped to [-clip, clip]; None does not clamp.
        learned_range: the second half of the model's channels interpolates the log-variance
            (Nichol & Dhariwal 2021, equation 15).
        guided_channels: how many leading channels of the output are guided; 0 is no guidance,
            3 is the published choice. The scale is in the table.
        patch: the model's output is token rows in the order that `unpatchify` takes: patch size,
            one int or one for each of the one or two axes of `x` behind the channels.
        out: contiguous tensors for the two results, where no gradient is wanted; each is `x`,
            `noise` or `x0_previous` themselves, or memory of no input.
        need_x0: False leaves x0 out: the second result, and that of `out`, is None.

    Returns:
        `(x', x0)`, each like `x`, contiguous, in `x`'s dtype, the given tensors if there are; the
        arithmetic is in float32 or better.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or value, which is named.
        RuntimeError: `out` is given and a gradient is wanted.

    Source: Ho et al. 2020, Song et al. 2021, Lu et al. 2022; the design of one table is fastdit's.
    """
    results = None
    if not is_dynamo_compiling():
        results = direct_calls["diffusion_step"](
            x,
            model_output,
            table,
            step,
            noise,
            x0_previous,
            clip,
            learned_range,
            guided_channels,
            seed,
            patch,
            out,
            need_x0,
        )
    if results is not None:
        return results
    if not isinstance(need_x0, bool):
        _checks.fail("need_x0", repr(need_x0), "True or False")
    args = (
        x,
        model_output,
        table,
        step,
        noise,
        x0_previous,
        clip,
        learned_range,
        guided_channels,
        seed,
        patch,
    )
    if out is not None:
        return _diffusion_step.into(out, args, wanted=2 if need_x0 else 1)
    results = _results_of(*args)
    return results if need_x0 else (results[0], None)


def _results_of(*args):
    """`checked`, where every argument is already of the type that the schema takes."""
    x, model_output, table, step, *_rest, seed, patch = args
    tensors = all(isinstance(value, Tensor) for value in (x, model_output, table, step))
    if tensors and not isinstance(seed, int) and not isinstance(patch, int):
        return _diffusion_step.checked(*args)
    return _diffusion_step(*_arguments(*args))
