"""unpatchify of the compiled library, on CPUs: csrc/cpu/unpatchify.cpp. It moves any dtype."""

from __future__ import annotations

import math

import torch

from fastdit import backends
from fastdit.native_kernels.direct import direct_call


@torch.library.register_fake("fastdit_native::unpatchify")
def _fake(tokens, patch, grid, channels):
    size = [g * p for g, p in zip(grid, patch, strict=True)]
    return tokens.new_empty(tokens.shape[0], channels, *size)


@torch.library.register_fake("fastdit_native::unpatchify_backward")
def _fake_backward(dimage, patch, grid, channels):
    return dimage.new_empty(dimage.shape[0], math.prod(grid), math.prod(patch) * channels)


_ops = torch.ops.fastdit_native

KERNELS = (
    backends.Kernel(
        "unpatchify",
        "cpu",
        "csrc",
        _ops.unpatchify.default,
        checks_arguments=True,
        direct=direct_call("unpatchify"),
    ),
    backends.Kernel("unpatchify_backward", "cpu", "csrc", _ops.unpatchify_backward.default),
)
