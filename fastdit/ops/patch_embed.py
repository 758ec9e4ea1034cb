"""patch_embed: cut an image into patches, project each to a token, add its position.

    tokens = conv(x, weight, stride = kernel) + bias, flattened, + pos

A convolution whose stride is its kernel is a matrix product on gathered patches: K = C·p² is
16 for a DiT/2, so the op is bound by writing the tokens once, which is its least traffic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdit import reference
from fastdit.ops import _checks
from fastdit.ops._library import Op, define, gradient_like


def _fake(x, weight, bias, pos):
    tokens = 1
    for size, patch in zip(x.shape[2:], weight.shape[2:], strict=True):
        tokens = tokens * (size // patch)
    dtype = x.dtype if pos is None else torch.promote_types(x.dtype, pos.dtype)
    return torch.empty((x.shape[0], tokens, weight.shape[0]), dtype=dtype, device=x.device)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dtokens):
    mask = list(ctx.needs_input_grad[-4:])
    gradients = _patch_embed_backward(dtokens.contiguous(), *ctx.saved_tensors, mask)
    return tuple(g if needed else None for g, needed in zip(gradients, mask, strict=True))


def _fake_backward(dtokens, x, weight, bias, pos, output_mask):
    inputs = zip((x, weight, bias, pos), output_mask, strict=True)
    return gradient_like(tuple(t if needed else None for t, needed in inputs), dtokens)


_patch_embed_backward = define(
    "patch_embed_backward(Tensor dtokens, Tensor x, Tensor weight, Tensor? bias, Tensor? pos, "
    "bool[4] output_mask) -> (Tensor, Tensor, Tensor, Tensor)",
    reference.patch_embed_backward,
    _fake_backward,
)
_patch_embed = Op(
    "patch_embed(Tensor x, Tensor weight, Tensor? bias, Tensor? pos) -> Tensor",
    reference=reference.patch_embed,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)


def _arguments(x, weight, bias, pos):
    _checks.tensor("x", x, (3, 4), "(B, C, H, W) or (B, C, L)")
    _checks.tensor("weight", weight, (x.dim(),), "(D, C, p, q), or (D, C, p) for (B, C, L)")
    dtype = _checks.autocast_dtype(x)
    if dtype is not None:
        x, weight = x.to(dtype), weight.to(dtype)
        bias = bias if bias is None else bias.to(dtype)
    _checks.like("weight", weight, x, (weight.shape[0], x.shape[1], *weight.shape[2:]))
    if bias is not None:
        _checks.like("bias", bias, x, weight.shape[:1])
    tokens = 1
    for size, patch in zip(x.shape[2:], weight.shape[2:], strict=True):
        if size % patch:
            _checks.fail("x", _checks.described(x), f"sizes divisible by {tuple(weight.shape[2:])}")
        tokens = tokens * (size // patch)
    if pos is not None:
        _checks.tensor("pos", pos, (2, 3), "(T, D) or (1, T, D)")
        rows, width = pos.shape[-2:]
        one = pos.dim() == 2 or pos.shape[0] == 1
        if rows != tokens or width != weight.shape[0] or not one or pos.device != x.device:
            allowed = f"({tokens}, {weight.shape[0]}), a leading 1 allowed, on {x.device}"
            _checks.fail("pos", _checks.described(pos), allowed)
    return x, weight, bias, pos


@_patch_embed.public(_arguments)
def patch_embed(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, pos: Tensor | None = None
) -> Tensor:
    """Patches of `x` projected to tokens, plus position embeddings.

    Args:
        x: `(B, C, H, W)`, or `(B, C, L)` for signals.
        weight: `(D, C, p, q)`, or `(D, C, p)`, of a convolution; its patch divides the size of `x`.
        bias: `(D,)` or None.
        pos: `(T, D)` or `(1, T, D)` position embeddings, or None.

    Under autocast `x`, `weight` and `bias` are cast to autocast's dtype.

    Returns:
        `(B, T, D)`, contiguous, tokens in row-major order; in the wider dtype of `x` and `pos`.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or device, which is named.

    Source: Dosovitskiy et al. 2020, equation 1; the published `x_embedder(x) + pos_embed`.
    """
    tensors = all(isinstance(t, Tensor) for t in (x, weight))
    optional = all(t is None or isinstance(t, Tensor) for t in (bias, pos))
    if tensors and optional and _checks.autocast_dtype(x) is None:
        return _patch_embed.checked(x, weight, bias, pos)
    return _patch_embed(*_arguments(x, weight, bias, pos))
