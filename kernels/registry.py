"""The Triton kernels behind the ops of `fastdit.ops` on CUDA and HIP devices.

Each op's module lists its `KERNELS`; they are registered in that order, the fastest first.
"""

from __future__ import annotations

import importlib

from fastdit import backends

MODULES = (
    "adaln",
    "gated_residual",
    "gated_adaln",
    "attention",
    "bias_gelu",
    "glu",
    "patch_embed",
    "unpatchify",
)


def register_all() -> None:
    """Register every module's kernels; called once, by `fastdit.backends`."""
    for name in MODULES:
        for kernel in importlib.import_module(f"fastdit.kernels.{name}").KERNELS:
            backends.register(kernel)
