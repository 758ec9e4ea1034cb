"""attention: multi-head self-attention on packed projections.

    out = softmax(Q·Kᵀ·scale)·V        for each head, without a mask

`qkv` is the output of one Linear, read in place as strided views; the backward writes one packed
gradient, so that nothing is concatenated. Least traffic: qkv once in, out once out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdit import reference
from fastdit.ops import _checks
from fastdit.ops._library import Op, define


def _fake(qkv, num_heads, scale):
    return qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)


def _setup_context(ctx, inputs, output):
    qkv, ctx.num_heads, ctx.scale = inputs
    ctx.save_for_backward(qkv)


def _backward(ctx, dout):
    (qkv,) = ctx.saved_tensors
    return _attention_backward(dout.contiguous(), qkv, ctx.num_heads, ctx.scale), None, None


_attention_backward = define(
    "attention_backward(Tensor dout, Tensor qkv, int num_heads, float? scale) -> Tensor",
    reference.attention_backward,
    lambda dout, qkv, num_heads, scale: torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device),
)
_attention = Op(
    "attention(Tensor qkv, int num_heads, float? scale) -> Tensor",
    reference=reference.attention,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)


def _arguments(qkv, num_heads, scale):
    _checks.tensor("qkv", qkv, (3,), "(B, N, 3·D)")
    _checks.positive("num_heads", num_heads)
    if qkv.shape[2] == 0 or qkv.shape[2] % (3 * num_heads):
        _checks.fail(
            "qkv", _checks.described(qkv), f"a width divisible by 3·num_heads = {3 * num_heads}"
        )
    if torch.is_autocast_enabled(qkv.device.type) and qkv.dtype != torch.float64:
        qkv = qkv.to(torch.get_autocast_dtype(qkv.device.type))
    return qkv, num_heads, scale


@_attention.public(_arguments)
def attention(qkv: Tensor, num_heads: int, *, scale: float | None = None) -> Tensor:
    """Non-causal multi-head attention on packed queries, keys and values.

    Args:
        qkv: `(B, N, 3·D)`, the channels ordered (q|k|v, head, head_dim) as timm's and the
            published `attn.qkv` give them. Under autocast it is cast to autocast's dtype.
        num_heads: heads; must divide D.
        scale: factor of QKᵀ; None is 1/√head_dim.

    Returns:
        `(B, N, D)`, contiguous, in `qkv`'s dtype.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or value, which is named.

    Source: Vaswani et al. 2017, equation 1.
    """
    return _attention(*_arguments(qkv, num_heads, scale=scale))
