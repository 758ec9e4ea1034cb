"""fastdit: fast, exact Diffusion Transformers.

    model = fastdit.load_model("DiT-XL-2-256x256.pt")
    images = fastdit.sample(model, [207, 360], steps=50, solver="dpm++", seed=0)

See `fastdit.ops` for the fused ops, `fastdit.reference` for their definitions, and
`fastdit.explain()` for what runs where.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastdit import ops
from fastdit._version import __version__
from fastdit.backends import BackendError, backend, current_backend, explain
from fastdit.designs import presets
from fastdit.diffusion import create_diffusion
from fastdit.flow import create_transport
from fastdit.model import DiT, DiT_models
from fastdit.sampler import Sampler
from fastdit.sampling import sample

if TYPE_CHECKING:
    from fastdit.checkpoint import CheckpointError, load_model, save_model
    from fastdit.native_forward import NativeForward
    from fastdit.patching import patch, patched

_LAZY = {
    "CheckpointError": "fastdit.checkpoint",
    "NativeForward": "fastdit.native_forward",
    "load_model": "fastdit.checkpoint",
    "patch": "fastdit.patching",
    "patched": "fastdit.patching",
    "save_model": "fastdit.checkpoint",
}
"""What only some programs need, and the module that is imported when it is first asked for."""

_MODULES = ("diffusers", "hub", "nn", "patching", "published")
"""Modules that are imported when they are first asked for, as `fastdit.nn`."""

__all__ = [
    "BackendError",
    "CheckpointError",
    "DiT",
    "DiT_models",
    "NativeForward",
    "Sampler",
    "__version__",
    "backend",
    "create_diffusion",
    "create_transport",
    "current_backend",
    "explain",
    "load_model",
    "ops",
    "patch",
    "patched",
    "presets",
    "sample",
    "save_model",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"fastdit.{name}")
    raise AttributeError(f"module 'fastdit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
