"""patch_embed of the compiled library, on CPUs: csrc/cpu/patch_embed.cpp."""

from __future__ import annotations

import torch

from fastdit import backends

_STORED = (torch.float32, torch.bfloat16, torch.float16)
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


def _unsupported(x, _weight, _bias, pos) -> str | None:
    if x.dtype not in _STORED:
        return f"x is {x.dtype}; the kernel computes in float32"
    if pos is not None and pos.dtype not in _STORED:
        return f"pos is {pos.dtype}; the kernel computes in float32"
    return None


def _backward(dtokens, x, weight, bias, pos, output_mask):
    return _ops.patch_embed_backward.default(dtokens, x, weight, bias, pos, *output_mask)


def _unsupported_backward(dtokens, x, weight, bias, pos, _output_mask) -> str | None:
    if dtokens.dtype not in _STORED:
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
