"""patch_embed of the compiled library, on CPUs: csrc/cpu/patch_embed.cpp."""

from __future__ import annotations

import math

import torch

from fastdit import backends

_LIMITS = {torch.float32: 256, torch.bfloat16: 64, torch.float16: 64}
"""The largest patch, in numbers, that the kernel takes, by x's dtype. Beyond it the eager
convolution may win: its float32 product has blocks for larger caches, and its bfloat16 product the
processor's own instructions. Speed over eager at 512 tokens of width 1152, one thread, with
AVX-512: float32 1.8 forward and 2.2 backward at 256 (1.04 and 0.93 at 768); bfloat16 2.2 and 1.3 at
64 (0.92 and 0.79 at 256)."""
_ops = torch.ops.fastdit_native


@torch.library.register_fake("fastdit_native::patch_embed")
def _fake(x, weight, _bias, pos):
    tokens = 1
    for size, patch in zip(x.shape[2:], weight.shape[2:], strict=True):
        tokens = tokens * (size // patch)
    dtype = x.dtype if pos is None else torch.promote_types(x.dtype, pos.dtype)
    return x.new_empty(x.shape[0], tokens, weight.shape[0], dtype=dtype)


@torch.library.register_fake("fastdit_native::patch_embed_backward")
def _fake_backward(dtokens, x, weight, bias, pos, *wanted):
    return tuple(
        torch.empty(t.shape, dtype=t.dtype, device=t.device) if w else dtokens.new_empty(0)
        for t, w in zip((x, weight, bias, pos), wanted, strict=True)
    )


def _unsupported(x, weight, _bias, pos) -> str | None:
    if x.dtype not in _LIMITS:
        return f"x is {x.dtype}; the kernel computes in float32"
    if pos is not None and pos.dtype not in _LIMITS:
        return f"pos is {pos.dtype}; the kernel computes in float32"
    size, limit = math.prod(weight.shape[1:]), _LIMITS[x.dtype]
    if size > limit:
        return f"a patch has {size} numbers; above {limit} of {x.dtype} eager PyTorch is faster"
    return None


def _backward(dtokens, x, weight, bias, pos, output_mask):
    return _ops.patch_embed_backward.default(dtokens, x, weight, bias, pos, *output_mask)


def _unsupported_backward(dtokens, x, weight, bias, pos, _output_mask) -> str | None:
    if dtokens.dtype not in _LIMITS:
        return f"dtokens is {dtokens.dtype}; the kernel computes in float32"
    return _unsupported(x, weight, bias, pos)


KERNELS = (
    backends.Kernel(
        "patch_embed",
        "cpu",
        "csrc",
        _ops.patch_embed.default,
        _unsupported,
        checks_arguments=True,
    ),
    backends.Kernel("patch_embed_backward", "cpu", "csrc", _backward, _unsupported_backward),
)
