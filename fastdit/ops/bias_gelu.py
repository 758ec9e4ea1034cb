"""bias_gelu: a Linear's bias and the tanh form of GELU in one pass.

    out = gelu_tanh(x + bias)
    gelu_tanh(z) = z/2·(1 + tanh(√(2/π)·(z + 0.044715·z³)))

Least traffic: x once in, out once out. The Linear before it runs without its bias.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from fastdit import reference
from fastdit.backends import direct_calls
from fastdit.ops import _checks
from fastdit.ops._library import Op, define, gradient_like


def _fake(x, bias):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dout):
    return _bias_gelu_backward.behind(ctx, dout.contiguous(), *ctx.saved_tensors)


_bias_gelu_backward = define(
    "bias_gelu_backward(Tensor dout, Tensor x, Tensor bias) -> (Tensor, Tensor)",
    reference.bias_gelu_backward,
    lambda dout, x, bias: gradient_like((x, bias), x),
)
_bias_gelu = Op(
    "bias_gelu(Tensor x, Tensor bias) -> Tensor",
    reference=reference.bias_gelu,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    out=("out",),
    replaceable=("x",),
)


def _arguments(x, bias):
    _checks.tensor("x", x, range(1, 9), "(..., D)")
    _checks.tensor("bias", bias, (1,), "(D,)")
    if bias.shape != x.shape[-1:] or bias.device != x.device:
        _checks.fail("bias", _checks.described(bias), f"({x.shape[-1]},) on {x.device}")
    return x, bias


@_bias_gelu.public(_arguments)
def bias_gelu(x: Tensor, bias: Tensor, *, out: Tensor | None = None) -> Tensor:
    """gelu_tanh(x + bias).

    Args:
        x: `(..., D)`.
        bias: `(D,)`; under autocast it may be of higher precision than `x`.
        out: a contiguous tensor for the result, where no gradient is wanted; `x` itself, or memory
            of no input.

    Returns:
        `(..., D)`, contiguous, in `x`'s dtype; `out` if it is given.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or device, which is named.
        RuntimeError: `out` is given and a gradient is wanted.

    Source: Hendrycks & Gimpel 2016; `nn.GELU(approximate="tanh")` of the published MLP.
    """
    done = None if is_dynamo_compiling() else direct_calls["bias_gelu"](x, bias, out)
    if done is None or done is NotImplemented:
        return _bias_gelu.checked(x, bias, known=done is not None, out=out)
    return done
