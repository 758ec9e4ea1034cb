"""gated_residual: add a branch to the residual stream through a gate.

    h = x + gate·y

adaLN-Zero's gate is zero at initialisation, so that every block starts as the identity. Least
traffic: x and y once in, h once out; eager PyTorch writes and reads gate·y besides.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from fastdit import reference
from fastdit.backends import direct_calls
from fastdit.ops import _checks
from fastdit.ops._library import Op, define, gradient_like


def _fake(x, y, gate):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _setup_context(ctx, inputs, output):
    x, y, gate = inputs
    ctx.save_for_backward(y, gate)
    ctx.dtype = x.dtype


def _backward(ctx, dout):
    return dout.to(ctx.dtype), *_gated_residual_backward.behind(
        ctx, dout.contiguous(), *ctx.saved_tensors
    )


_gated_residual_backward = define(
    "gated_residual_backward(Tensor dout, Tensor y, Tensor gate) -> (Tensor, Tensor)",
    reference.gated_residual_backward,
    lambda dout, y, gate: gradient_like((y, gate), y),
)
_gated_residual = Op(
    "gated_residual(Tensor x, Tensor y, Tensor gate) -> Tensor",
    reference=reference.gated_residual,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    out=("h",),
    replaceable=("x", "y"),
)


def check_branch(x, y, gate):
    """The arguments of a gated addition of `y` to `x`; `y` may have another floating dtype."""
    _checks.tensor("x", x, (3,), "(B, N, D)")
    _checks.tensor("y", y, (3,), "(B, N, D)")
    if y.shape != x.shape or y.device != x.device:
        _checks.fail("y", _checks.described(y), f"{tuple(x.shape)} on {x.device}, like x")
    _checks.modulation("gate", gate, x)


def _arguments(x, y, gate):
    check_branch(x, y, gate)
    return x, y, gate


@_gated_residual.public(_arguments)
def gated_residual(x: Tensor, y: Tensor, gate: Tensor, *, out: Tensor | None = None) -> Tensor:
    """x + gate·y.

    Args:
        x: `(B, N, D)`, the residual stream.
        y: `(B, N, D)`, a branch's output; under autocast it may be of lower precision than `x`.
        gate: `(B, D)` per sample or `(B, N, D)` per token, any strides.
        out: a contiguous tensor for the result, where no gradient is wanted; `x` or `y` themselves,
            or memory of no input.

    Returns:
        `(B, N, D)`, contiguous, in `x`'s dtype; `out` if it is given.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or device, which is named.
        RuntimeError: `out` is given and a gradient is wanted.

    Source: Peebles & Xie 2022, adaLN-Zero.
    """
    done = None if is_dynamo_compiling() else direct_calls["gated_residual"](x, y, gate, out)
    if done is None or done is NotImplemented:
        return _gated_residual.checked(x, y, gate, known=done is not None, out=out)
    return done
