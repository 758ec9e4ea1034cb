"""fastdit: fast, exact Diffusion Transformers.

    model = fastdit.DiT_models["DiT-XL/2"]()
    diffusion = fastdit.create_diffusion("250")

See `fastdit.ops` for the fused ops, `fastdit.reference` for their definitions, and
`fastdit.explain()` for what runs where.
"""

from __future__ import annotations

from fastdit import ops
from fastdit._version import __version__
from fastdit.backends import BackendError, backend, current_backend, explain
from fastdit.model import DiT, DiT_models

__all__ = [
    "BackendError",
    "DiT",
    "DiT_models",
    "__version__",
    "backend",
    "current_backend",
    "explain",
    "ops",
]
