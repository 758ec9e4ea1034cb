"""The normalisations of other people's models, read as arguments of fastdit's ops.

A LayerNorm, diffusers' FP32LayerNorm and any RMSNorm are the same few numbers: a weight, a bias, an
eps and a kind. Modulations come as `(B, D)`, `(B, 1, D)` or `(B, N, D)`; the ops take the first and
the last.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastdit import ops


class Norm(NamedTuple):
    """The numbers of a normalisation over the last axis; `kind` is "layer" or "rms"."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    kind: str


def norm_of(module: nn.Module | None) -> Norm | None:
    """A module's normalisation, or None if it is none that the ops know."""
    if isinstance(module, nn.LayerNorm):
        if len(module.normalized_shape) != 1:
            return None
        # A bias alone is not an option of the op.
        return None if module.weight is None and module.bias is not None else _read(module, "layer")
    if module is not None and "RMSNorm" in type(module).__name__:
        rms = _read(module, "rms")
        return None if rms is None or rms.bias is not None else rms
    return None


def _read(module: nn.Module, kind: str) -> Norm | None:
    eps = getattr(module, "eps", getattr(module, "variance_epsilon", None))
    weight = getattr(module, "weight", None)
    if not isinstance(eps, float) or (weight is not None and weight.dim() != 1):
        return None  # nn.RMSNorm(eps=None) takes it from the input's dtype
    return Norm(weight, getattr(module, "bias", None), eps, kind)


def ready(x: Tensor, *modules: nn.Module | None) -> list[Norm] | None:
    """The modules' normalisations, if the ops can apply them all to `x` as the modules would."""
    norms = [norm_of(module) for module in modules]
    if x.dim() != 3 or not all(norm is not None and _fits(norm, x) for norm in norms):
        return None
    return norms  # type: ignore[return-value]


def _fits(norm: Norm, x: Tensor) -> bool:
    return norm.weight is None or norm.weight.dtype == x.dtype


def rows(modulation: Tensor | None, x: Tensor) -> Tensor | None:
    """A modulation of `x` (B, N, D) in a shape that the ops take: a view, nothing is copied."""
    if modulation is None:
        return None
    if modulation.dim() == 3 and modulation.shape[1] == 1:
        modulation = modulation.squeeze(1)
    if modulation.shape[0] == 1 and x.shape[0] != 1:
        modulation = modulation.expand(x.shape[0], *modulation.shape[1:])
    return modulation


def adaln(
    norm: Norm, x: Tensor, shift: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    """norm(x)·(1 + scale) + shift."""
    return ops.adaln(
        x,
        rows(shift, x),
        rows(scale, x),
        norm.eps,
        weight=norm.weight,
        bias=norm.bias,
        norm=norm.kind,
    )


def _widens(x: Tensor, y: Tensor, gate: Tensor) -> bool:
    """Whether PyTorch's x + gate·y has a wider dtype than x, which the ops never give."""
    product = torch.promote_types(y.dtype, gate.dtype)
    return torch.promote_types(x.dtype, product) != x.dtype


def _eager(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return x + (gate.unsqueeze(1) if gate.dim() == 2 else gate) * y


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate·y."""
    if _widens(x, y, gate):
        return _eager(x, y, gate)
    return ops.gated_residual(x, y, rows(gate, x))


def gated_adaln(
    norm: Norm,
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """h = x + gate·y, and norm(h)·(1 + scale) + shift."""
    if _widens(x, y, gate):
        h = _eager(x, y, gate)
        return h, adaln(norm, h, shift, scale)
    return ops.gated_adaln(
        x,
        y,
        rows(gate, x),
        rows(shift, x),
        rows(scale, x),
        norm.eps,
        weight=norm.weight,
        bias=norm.bias,
        norm=norm.kind,
    )
