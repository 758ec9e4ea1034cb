"""adaln: layer normalisation, scaled and shifted by a condition.

    y = LN(x)·(1 + scale) + shift

The modulation of every DiT branch (Peebles & Xie 2022, section 3.2). Least traffic: x once in, y
once out, and the few kilobytes of modulation; eager PyTorch moves three times as much, in three
kernels. The schema op also returns each row's mean and 1/std, 8 bytes a row in float32, which the
backward reads instead of reducing the row again.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from fastdit import reference
from fastdit.backends import direct_calls
from fastdit.ops import _checks
from fastdit.ops._library import Op, define, gradient_like, present

ARGUMENTS = (
    "Tensor x, Tensor? shift, Tensor? scale, Tensor? weight, Tensor? bias, float eps, str norm, "
    "bool plus_one"
)


def fake_statistics(x, norm):
    """Fake mean and rstd `(B, N)` of the rows of `x`; the mean is empty for RMS."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    rstd = x.new_empty(x.shape[:-1], dtype=dtype)
    return (torch.empty_like(rstd) if norm == "layer" else x.new_empty(0, dtype=dtype)), rstd


def _fake(x, shift, scale, weight, bias, eps, norm, plus_one):
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return out, *fake_statistics(x, norm)


def _setup_context(ctx, inputs, output):
    *tensors, _eps, ctx.norm, ctx.plus_one = inputs
    _out, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)  # of the statistics: zeros that nobody reads cost 5 µs each
    ctx.save_for_backward(mean, rstd, *tensors)


def _backward(ctx, dout, _dmean, _drstd):
    if dout is None:
        return (None,) * 8
    mean, rstd, x, *modulation = ctx.saved_tensors
    dx, *gradients = _adaln_backward.behind(
        ctx, dout.contiguous(), x, mean, rstd, *modulation, ctx.norm, ctx.plus_one
    )
    return dx, *present(gradients, modulation), None, None, None


_adaln_backward = define(
    "adaln_backward(Tensor dout, Tensor x, Tensor mean, Tensor rstd, Tensor? shift, "
    "Tensor? scale, Tensor? weight, Tensor? bias, str norm, bool plus_one) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.adaln_backward,
    lambda dout, x, mean, rstd, *rest: gradient_like((x, *rest[:4]), x),
)
_adaln = Op(
    f"adaln({ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    reference=reference.adaln,
    saving=reference.adaln_saving,
    returns=1,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    out=("y",),
    replaceable=("x",),
)


def _arguments(x, shift, scale, weight, bias, eps, norm, plus_one):
    _checks.tensor("x", x, (3,), "(B, N, D)")
    if shift is not None:
        _checks.modulation("shift", shift, x)
    if scale is not None:
        _checks.modulation("scale", scale, x)
    _checks.normalisation(x, weight, bias, eps, norm)
    return x, shift, scale, weight, bias, eps, norm, plus_one


@_adaln.public(_arguments)
def adaln(
    x: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float = 1e-6,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str = "layer",
    plus_one: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    """LN(x)·(1 + scale) + shift.

    Args:
        x: `(B, N, D)`, normalised over D.
        shift, scale: `(B, D)` per sample or `(B, N, D)` per token; strided views, such as
            `chunk(6, -1)` of one projection, are read where they lie. None leaves the term out.
        eps: added to the variance.
        weight, bias: `(D,)`, an affine normalisation's parameters, in `x`'s dtype.
        norm: `"layer"`, or `"rms"`: x / √(mean(x²) + eps).
        plus_one: False multiplies by `scale` instead of `1 + scale`.
        out: a contiguous tensor for the result, where no gradient is wanted; `x` itself, or memory
            of no input.

    Returns:
        `(B, N, D)`, contiguous, in `x`'s dtype; `out` if it is given.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or value, which is named.
        RuntimeError: `out` is given and a gradient is wanted.

    Source: Peebles & Xie 2022, adaLN; the published code's `modulate(norm(x), shift, scale)`.
    """
    done = None
    if not is_dynamo_compiling():  # a tuple of the arguments would cost a tenth of a small call
        done = direct_calls["adaln"](x, shift, scale, weight, bias, eps, norm, plus_one, out)
    if done is None or done is NotImplemented:
        args = x, shift, scale, weight, bias, eps, norm, plus_one
        return _adaln.checked(*args, known=done is not None, out=out)
    return done
