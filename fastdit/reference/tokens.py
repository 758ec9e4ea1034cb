"""bias_gelu and glu, and images as tokens: patch_embed, unpatchify."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdit.reference.precision import exact

# ---- bias_gelu: gelu_tanh(x + bias) -------------------------------------------------------------


def bias_gelu(x, bias):
    return F.gelu((x + bias).to(x.dtype).contiguous(), approximate="tanh")


def bias_gelu_backward(dout, x, bias):
    dx = torch.ops.aten.gelu_backward(exact(dout), exact(x) + exact(bias), approximate="tanh")
    dbias = dx.flatten(0, -2).sum(0)
    return dx.to(x.dtype).contiguous(), dbias.to(bias.dtype)


# ---- glu: act(gate)·up --------------------------------------------------------------------------

_gelu_tanh = partial(F.gelu, approximate="tanh")
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": _gelu_tanh}
_ACTIVATION_GRADIENTS = {
    "silu": torch.ops.aten.silu_backward,
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": partial(torch.ops.aten.gelu_backward, approximate="tanh"),
}


def glu(x, up, bias, activation, gate_first):
    biased = x if bias is None else (x + bias).to(x.dtype)
    parts = biased.chunk(2, -1) if up is None else (x, up)
    gate, value = parts if gate_first else parts[::-1]
    return (ACTIVATIONS[activation](gate) * value).contiguous()


def glu_backward(dout, x, up, bias, activation, gate_first):
    biased, incoming = exact(x) if bias is None else exact(x) + exact(bias), exact(dout)
    parts = biased.chunk(2, -1) if up is None else (biased, exact(up))
    gate, value = parts if gate_first else parts[::-1]
    dgate = _ACTIVATION_GRADIENTS[activation](incoming * value, gate)
    gradients = dgate, incoming * ACTIVATIONS[activation](gate)
    absent = dgate.new_empty(0)
    if up is not None:
        return *(g.to(x.dtype).contiguous() for g in gradients), absent
    dx = torch.cat(gradients if gate_first else gradients[::-1], -1)
    dbias = absent if bias is None else dx.flatten(0, -2).sum(0).to(bias.dtype)
    return dx.to(x.dtype), absent, dbias


# ---- patch_embed: a convolution whose stride is its kernel, + pos -------------------------------


def patch_embed(x, weight, bias, pos):
    convolve = F.conv2d if x.dim() == 4 else F.conv1d
    tokens = convolve(x, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    return (tokens if pos is None else tokens + pos).contiguous()


def patchify(x: Tensor, patch) -> Tensor:
    """`(B, C, *size)` as rows `(B, T, C·prod(patch))` in a convolution weight's order."""
    axes = range(len(patch))
    sizes = [n for axis in axes for n in (x.shape[2 + axis] // patch[axis], patch[axis])]
    rows = x.reshape(*x.shape[:2], *sizes)
    order = [0, *(2 + 2 * axis for axis in axes), 1, *(3 + 2 * axis for axis in axes)]
    return rows.permute(order).flatten(len(patch) + 1).flatten(1, len(patch))


def patch_embed_backward(dtokens, x, weight, bias, pos, output_mask):
    patch, grad = weight.shape[2:], exact(dtokens)
    grid = [size // p for size, p in zip(x.shape[2:], patch, strict=True)]
    flat = exact(weight).flatten(1)
    absent = [grad.new_empty(0) for _ in range(4)]
    if output_mask[0]:
        rows = (grad @ flat).unflatten(-1, (weight.shape[1], -1)).mT.flatten(-2)
        absent[0] = unpatchify(rows, patch, grid, weight.shape[1]).to(x.dtype)
    if output_mask[1]:
        dweight = torch.einsum("btd,btk->dk", grad, patchify(exact(x), patch))
        absent[1] = dweight.reshape(weight.shape).to(weight.dtype)
    if output_mask[2]:
        absent[2] = grad.sum((0, 1)).to(bias.dtype)
    if output_mask[3]:
        absent[3] = grad.sum(0).reshape(pos.shape).to(pos.dtype)
    return tuple(absent)


# ---- unpatchify: token rows in (*patch, c) order back to an image --------------------------------


def unpatchify(tokens, patch, grid, channels):
    dims = len(patch)
    rows = tokens.reshape(tokens.shape[0], *grid, *patch, channels)
    order = [0, 2 * dims + 1, *(axis for i in range(dims) for axis in (1 + i, 1 + dims + i))]
    size = [g * p for g, p in zip(grid, patch, strict=True)]
    image = rows.permute(order).clone(memory_format=torch.contiguous_format)
    return image.view(tokens.shape[0], channels, *size)


def unpatchify_backward(dimage, patch, grid, channels):
    rows = patchify(dimage, patch).unflatten(-1, (channels, -1)).mT
    return rows.clone(memory_format=torch.contiguous_format).flatten(-2)
