"""attention: softmax(QKᵀ·scale)V on packed qkv, Q and K normalised and rotated if asked."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdit.reference.precision import exact
from fastdit.reference.rows import adaln, adaln_backward, adaln_saving


def split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Packed `(B, N, 3·H·d)` as three strided views `(B, H, N, d)`; nothing is copied."""
    packed = qkv.unflatten(-1, (3, num_heads, qkv.shape[-1] // (3 * num_heads)))
    return packed.permute(2, 0, 3, 1, 4).unbind(0)


def _per_head(table: Tensor) -> Tensor:
    """A rotary table `(N, d)` or `(B, N, d)` so that it broadcasts over `(B, H, N, d)`."""
    return table if table.dim() == 2 else table.unsqueeze(1)


def rotate(x: Tensor, interleaved: bool) -> Tensor:
    """Each pair (a, b) as (−b, a): channels 2i and 2i + 1, or i and i + d/2."""
    if interleaved:
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([-b, a], -1).flatten(-2)
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


def _prepared(x, weight, bias, norm, eps, cos, sin, interleaved):
    """Queries or keys `(B, H, N, d)` as they enter the product: QK-norm over d, then RoPE."""
    x = x if norm is None else adaln(x, None, None, weight, bias, eps, norm, True)
    if cos is None:
        return x
    return (x * _per_head(cos) + rotate(x, interleaved) * _per_head(sin)).to(x.dtype)


def _prepared_backward(dout, x, weight, bias, norm, eps, cos, sin, interleaved):
    """dx, dweight, dbias: the transposed rotation, then the normalisation's backward."""
    if cos is not None:
        cos, sin = exact(_per_head(cos)), exact(_per_head(sin))
        dout = dout * cos - rotate(dout * sin, interleaved)
    if norm is None:
        return dout, dout.new_empty(0), dout.new_empty(0)
    heads = exact(x).flatten(0, 1)
    _unit, mean, rstd = adaln_saving(heads, None, None, None, None, eps, norm, True)
    dx, _dshift, _dscale, *daffine = adaln_backward(
        dout.flatten(0, 1), heads, mean, rstd, None, None, weight, bias, norm, True
    )
    return dx.view_as(dout), *daffine


def _scores(qkv, num_heads, scale, q_weight, q_bias, k_weight, k_bias, *shared):
    """Q, K, V as attention multiplies them, and the factor of QKᵀ."""
    q, k, v = split_heads(qkv, num_heads)
    q, k = _prepared(q, q_weight, q_bias, *shared), _prepared(k, k_weight, k_bias, *shared)
    return q, k, v, q.shape[-1] ** -0.5 if scale is None else scale


def attention(qkv, num_heads, scale, *qk_options):
    q, k, v, scale = _scores(qkv, num_heads, scale, *qk_options)
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)


def attention_saving(qkv, num_heads, scale, *qk_options):
    """`attention`, and the log of each softmax's denominator, (B, H, N) in float32 or better."""
    q, k, _v, scale = _scores(qkv, num_heads, scale, *qk_options)
    lse = torch.logsumexp(exact(q) @ exact(k).mT * scale, -1)
    return attention(qkv, num_heads, scale, *qk_options), lse


def attention_backward(dout, qkv, out, lse, num_heads, scale, *qk_options):
    """With P = exp(QKᵀ·scale − lse), dS = P∘(dO·Vᵀ − rowsum(dO∘O))·scale: (dS·K, dSᵀQ, PᵀdO)."""
    q, k, v, scale = _scores(qkv, num_heads, scale, *qk_options)
    q, k, v = exact(q), exact(k), exact(v)
    dout, out = (exact(t).unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (dout, out))
    p = torch.exp(q @ k.mT * scale - lse.unsqueeze(-1))
    ds = p * (dout @ v.mT - (dout * out).sum(-1, keepdim=True)) * scale
    raw_q, raw_k, _v = split_heads(qkv, num_heads)
    dq, *dq_affine = _prepared_backward(ds @ k, raw_q, *qk_options[:2], *qk_options[4:])
    dk, *dk_affine = _prepared_backward(ds.mT @ q, raw_k, *qk_options[2:])
    dqkv = torch.stack([dq, dk, p.mT @ dout]).permute(1, 3, 0, 2, 4).flatten(2).to(qkv.dtype)
    return dqkv, *dq_affine, *dk_affine
