"""gated_adaln: one branch's gated addition and the next branch's modulation, in one pass.

    h   = x + gate·y
    out = LN(h)·(1 + scale) + shift

Everything between two matrix products of a DiT. Least traffic: x and y once in, h and out once
out; the row stays in registers between the two lines. The backward reads the gradients of both
outputs, h and y, and returns every gradient in one pass.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from fastdit import reference
from fastdit.backends import direct_calls
from fastdit.ops import _checks
from fastdit.ops._library import Op, define, gradient_like, present
from fastdit.ops.adaln import fake_statistics
from fastdit.ops.gated_residual import check_branch


def _fake(x, y, gate, shift, scale, weight, bias, eps, norm, plus_one):
    h, out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    return h, out, *fake_statistics(x, norm)


def _setup_context(ctx, inputs, output):
    _x, *tensors, _eps, ctx.norm, ctx.plus_one = inputs
    h, _out, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(h, mean, rstd, *tensors)


def _backward(ctx, dh, dout, _dmean, _drstd):
    if dh is None and dout is None:
        return (None,) * 10
    h, mean, rstd, y, gate, *modulation = ctx.saved_tensors
    dx, dy, dgate, *gradients = _gated_adaln_backward.behind(
        ctx,
        torch.zeros_like(h) if dh is None else dh.contiguous(),
        torch.zeros_like(h) if dout is None else dout.contiguous(),
        h,
        mean,
        rstd,
        y,
        gate,
        *modulation,
        ctx.norm,
        ctx.plus_one,
    )
    return dx, dy, dgate, *present(gradients, modulation), None, None, None


_gated_adaln_backward = define(
    "gated_adaln_backward(Tensor dh, Tensor dout, Tensor h, Tensor mean, Tensor rstd, Tensor y, "
    "Tensor gate, Tensor? shift, Tensor? scale, Tensor? weight, Tensor? bias, str norm, "
    f"bool plus_one) -> ({', '.join(['Tensor'] * 7)})",
    reference.gated_adaln_backward,
    lambda dh, dout, h, mean, rstd, *rest: gradient_like((h, *rest[:6]), h),
)
_gated_adaln = Op(
    "gated_adaln(Tensor x, Tensor y, Tensor gate, Tensor? shift, Tensor? scale, Tensor? weight, "
    "Tensor? bias, float eps, str norm, bool plus_one) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.gated_adaln,
    saving=reference.gated_adaln_saving,
    returns=2,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    out=("h", "out"),
    replaceable=("x", "y"),
)


def _arguments(x, y, gate, shift, scale, weight, bias, eps, norm, plus_one):
    check_branch(x, y, gate)
    if shift is not None:
        _checks.modulation("shift", shift, x)
    if scale is not None:
        _checks.modulation("scale", scale, x)
    _checks.normalisation(x, weight, bias, eps, norm)
    return x, y, gate, shift, scale, weight, bias, eps, norm, plus_one


@_gated_adaln.public(_arguments)
def gated_adaln(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float = 1e-6,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str = "layer",
    plus_one: bool = True,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """`h = x + gate·y` and `adaln(h, shift, scale)`.

    Args:
        x: `(B, N, D)`, the residual stream.
        y: `(B, N, D)`, a branch's output; under autocast it may be of lower precision than `x`.
        gate: `(B, D)` per sample or `(B, N, D)` per token, any strides.
        shift, scale, eps, weight, bias, norm, plus_one: as in `adaln`.
        out: contiguous tensors for the two results, where no gradient is wanted; each is `x` or `y`
            themselves, or memory of no input. `(x, y)` needs no memory but theirs.

    Returns:
        `(h, out)`, each `(B, N, D)`, contiguous, in `x`'s dtype; the given tensors if there are.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or value, which is named.
        RuntimeError: `out` is given and a gradient is wanted.

    Source: Peebles & Xie 2022, adaLN-Zero.
    """
    done = None
    if not is_dynamo_compiling():
        call = direct_calls["gated_adaln"]
        done = call(x, y, gate, shift, scale, weight, bias, eps, norm, plus_one, out)
    if done is None or done is NotImplemented:
        args = x, y, gate, shift, scale, weight, bias, eps, norm, plus_one
        return _gated_adaln.checked(*args, known=done is not None, out=out)
    return done
