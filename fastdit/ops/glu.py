"""glu: the gated linear unit, a product of two projections of which one is activated.

    out = act(gate)·up,   (gate, up) = x + bias, side by side, or two tensors

act is SiLU (SwiGLU), or GELU in its exact or its tanh form (GEGLU). Each is z·P(z) with P a
distribution function: the logistic one, the normal one, or the logistic one of a cubic.

Least traffic: gate and up once in, out once out, 3·H numbers a row; eager PyTorch writes and reads
act(gate) besides, 5·H, and the sum with the bias. The backward recomputes act(gate) from what came
in: nothing further is saved. It writes both gradients of a packed x into one tensor, where the
gradients of two slices would be joined by a copy of 4·H, and sums the bias's on the way.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from fastdit import reference
from fastdit.backends import direct_calls
from fastdit.ops import _checks
from fastdit.ops._library import Op, define, gradient_like, present

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


def _shape(x, up, *_options):
    """The result's."""
    return (*x.shape[:-1], x.shape[-1] // 2) if up is None else tuple(x.shape)


def _fake(x, up, *_options):
    return torch.empty(_shape(x, up), dtype=x.dtype, device=x.device)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _backward(ctx, dout):
    inputs = ctx.saved_tensors
    gradients = _glu_backward(dout.contiguous(), *inputs, *ctx.options)
    return *present(gradients, inputs), None, None


_glu_backward = define(
    "glu_backward(Tensor dout, Tensor x, Tensor? up, Tensor? bias, str activation, "
    "bool gate_first) -> (Tensor, Tensor, Tensor)",
    reference.glu_backward,
    lambda dout, x, up, bias, *options: gradient_like((x, up, bias), x),
)
_glu = Op(
    "glu(Tensor x, Tensor? up, Tensor? bias, str activation, bool gate_first) -> Tensor",
    reference=reference.glu,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    out=("out",),
    replaceable=("x", "up"),
    shape=_shape,
)


def _arguments(x, up, bias, activation, gate_first):
    _checks.tensor("x", x, range(1, 9), "(..., 2·H), or (..., H) with up")
    if activation not in ACTIVATIONS:
        _checks.fail("activation", repr(activation), ", ".join(map(repr, ACTIVATIONS)))
    if not isinstance(gate_first, bool):
        _checks.fail("gate_first", repr(gate_first), "True or False")
    if up is not None:
        _checks.like("up", up, x)
        if bias is not None:
            _checks.fail("bias", _checks.described(bias), "None where up is a tensor of its own")
        if not gate_first:
            _checks.fail("gate_first", "False", "True where up is a tensor of its own")
    elif x.shape[-1] % 2:
        _checks.fail("x", _checks.described(x), "an even last axis, (..., 2·H), where up is None")
    if bias is not None:
        _checks.tensor("bias", bias, (1,), "(2·H,)")
        if bias.shape != x.shape[-1:] or bias.device != x.device:
            _checks.fail("bias", _checks.described(bias), f"({x.shape[-1]},) on {x.device}")
    return x, up, bias, activation, gate_first


@_glu.public(_arguments)
def glu(
    x: Tensor,
    up: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str = "silu",
    gate_first: bool = True,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """act(gate)·up, of one packed projection or of two.

    Args:
        x: `(..., 2·H)`, gate and up side by side, in rows any stride apart; with `up`, the gate
            alone, `(..., H)`.
        up: None, or `(..., H)` in `x`'s dtype: a projection of its own, as LLaMA, Lumina and
            AuraFlow have it.
        bias: of the packed projection, `(2·H,)` in `x`'s order, added here so that the Linear runs
            without; under autocast it may be of higher precision than `x`.
        activation: `"silu"` (SwiGLU), `"gelu"` (GEGLU, the exact form) or `"gelu_tanh"`.
        gate_first: whether the gate is the first half of `x`, as in LightningDiT and Flux 2, or the
            second, as in diffusers' `GEGLU` and `SwiGLU`.
        out: a contiguous tensor for the result, where no gradient is wanted; `x` or `up` themselves
            where they are two, or memory of no input.

    Returns:
        `(..., H)`, contiguous, in `x`'s dtype; `out` if it is given.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or device, which is named.
        RuntimeError: `out` is given and a gradient is wanted.

    Source: Shazeer 2020, GLU Variants Improve Transformer.
    """
    args = (x, up, bias, activation, gate_first)
    done = None if is_dynamo_compiling() else direct_calls["glu"](*args, out)
    if done is None or done is NotImplemented:
        return _glu.checked(*args, known=done is not None, out=out)
    return done
