"""diffusion_step: one update of any sampler, as a row of its table.

    e  = guided(model output)              # u + s·(c − u) on the first guided channels
    x0 = a·x + b·e                         # clamped to ±clip if asked
    σ  = sigma, or with a learned range sigma·exp(½(f·max_log + (1 − f)·min_log)), f = (v + 1)/2
    x' = cx·x + c0·x0 + cp·x0_previous + σ·noise

DDPM, DDIM, DPM-Solver++ and the flow-matching solvers differ only in these coefficients, which
`fastdit.diffusion` computes in float64 and stores as a table `(S, 9)` with the columns
`fastdit.reference.TABLE_COLUMNS`. Table and step index are read on the device, so that a captured
CUDA graph of one step replays for all of them.

Least traffic: x, the model output, the noise and the previous x0 once in, x' and x0 once out; the
published code issues about 60 kernels for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdit import reference
from fastdit.ops import _checks
from fastdit.ops._library import Op, define, gradient_like, present

_ARGUMENTS = (
    "Tensor x, Tensor model_output, Tensor table, Tensor step, Tensor? noise, "
    "Tensor? x0_previous, float? clip, bool learned_range, int guided_channels"
)


def _fake(x, *_rest):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))


def _fake_backward(dout, dx0, x, model_output, table, step, noise, x0_previous, *_rest):
    return gradient_like((x, model_output, noise, x0_previous), x)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.clip, ctx.learned_range, ctx.guided_channels = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dout, dx0):
    *_, noise, x0_previous = tensors = ctx.saved_tensors
    dx, doutput, *rest = _diffusion_step_backward(
        dout.contiguous(),
        dx0.contiguous(),
        *tensors,
        ctx.clip,
        ctx.learned_range,
        ctx.guided_channels,
    )
    return dx, doutput, None, None, *present(rest, (noise, x0_previous)), None, None, None


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
)


def _check_output(x, model_output, learned_range, guided_channels):
    channels = x.shape[1]
    _checks.tensor(
        "model_output", model_output, (x.dim(),), "shaped like x, 1 or 2 times its channels"
    )
    if not isinstance(guided_channels, int) or not 0 <= guided_channels <= 2 * channels:
        _checks.fail("guided_channels", repr(guided_channels), f"an int from 0 to {2 * channels}")
    batch = x.shape[0] * (2 if guided_channels else 1)
    widths = (2 * channels,) if learned_range else (channels, 2 * channels)
    shape = model_output.shape
    fits = shape[0] == batch and shape[1] in widths and shape[2:] == x.shape[2:]
    if not fits or model_output.device != x.device:
        allowed = " or ".join(str((batch, width, *x.shape[2:])) for width in widths)
        _checks.fail("model_output", _checks.described(model_output), f"{allowed} on {x.device}")


def _check_table(x, table, step):
    columns = len(reference.TABLE_COLUMNS)
    fits = isinstance(table, Tensor) and table.dim() == 2 and table.shape[1] == columns
    if not fits or table.dtype not in (torch.float32, torch.float64) or table.device != x.device:
        allowed = f"(steps, {columns}) float32 or float64 on {x.device}"
        _checks.fail("table", _checks.described(table), allowed)
    if isinstance(step, int):
        if not 0 <= step < table.shape[0]:
            _checks.fail("step", step, f"0 to {table.shape[0] - 1}, the table's rows")
        return torch.tensor(step, device=x.device)
    fits = isinstance(step, Tensor) and step.dtype == torch.int64 and step.device == x.device
    if not fits or step.shape not in ((), (x.shape[0],)):
        allowed = f"an int, or an int64 tensor () or ({x.shape[0]},) on {x.device}"
        _checks.fail("step", _checks.described(step), allowed)
    return step


def _arguments(
    x, model_output, table, step, *, noise, x0_previous, clip, learned_range, guided_channels
):
    _checks.tensor("x", x, range(2, 6), "(B, C, ...)")
    _check_output(x, model_output, learned_range, guided_channels)
    step = _check_table(x, table, step)
    if noise is not None:
        _checks.like("noise", noise, x)
    if x0_previous is not None:
        _checks.like("x0_previous", x0_previous, x)
    if clip is not None and not clip > 0:
        _checks.fail("clip", repr(clip), "None or a number > 0")
    return (x, model_output, table, step, noise, x0_previous, clip, learned_range, guided_channels)


@_diffusion_step.public(_arguments)
def diffusion_step(
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    step: Tensor | int,
    *,
    noise: Tensor | None = None,
    x0_previous: Tensor | None = None,
    clip: float | None = None,
    learned_range: bool = False,
    guided_channels: int = 0,
) -> tuple[Tensor, Tensor]:
    """One sampler update; the formula is at the top of this module.

    Args:
        x: `(B, C, ...)`, the current samples.
        model_output: `(B, C or 2C, ...)`; with guidance `(2B, ...)`, the conditional half first.
        table: `(S, 9)`, float32 or float64: one row of coefficients for each step.
        step: which row: an int, an int64 tensor `()`, or one `(B,)` with an index for each sample.
            A tensor is never read on the host; each index must lie in the table.
        noise: like `x`; None leaves the noise term out.
        x0_previous: like `x`, the x0 of the step before, for multi-step solvers.
        clip: x0 is clamped to [-clip, clip]; None does not clamp.
        learned_range: the second half of the model's channels interpolates the log-variance
            (Nichol & Dhariwal 2021, equation 15).
        guided_channels: how many leading channels of the output are guided; 0 is no guidance,
            3 is the published choice. The scale is in the table.

    Returns:
        `(x', x0)`, each like `x`, contiguous, in `x`'s dtype; the arithmetic is in float32 or
        better.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or value, which is named.

    Source: Ho et al. 2020, Song et al. 2021, Lu et al. 2022; the design of one table is fastdit's.
    """
    return _diffusion_step(
        *_arguments(
            x,
            model_output,
            table,
            step,
            noise=noise,
            x0_previous=x0_previous,
            clip=clip,
            learned_range=learned_range,
            guided_channels=guided_channels,
        )
    )
