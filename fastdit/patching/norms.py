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
    found = [norm_of(module) for module in modules]
    if x.dim() != 3 or not all(n is not None and _fits(n, x) for n in found):
        return None
    return found  # type: ignore[return-value]


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


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, *, rounds: bool = False) -> Tensor:
    """x + gate·y. PyTorch's result is in the widest of the three dtypes, and so is this one's;
    with `rounds` the original rounds it to `x`'s."""
    if not rounds and _widens(x, y, gate):
        return x + (gate.unsqueeze(1) if gate.dim() == 2 else gate) * y
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
        h = gated_residual(x, y, gate)
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


def added_adaln(
    norm: Norm,
    x: Tensor,
    y: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """h = x + y, and norm(h)·(1 + scale) + shift: a gate of ones is D numbers, x is B·N·D."""
    gate = y.new_ones(y.shape[-1]).expand(y.shape[0], -1)
    return gated_adaln(norm, x, y, gate, shift, scale)


class Stream:
    """A residual stream whose last branch is still to be added: with the next norm, in one pass."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.branch: tuple[Tensor, Tensor] | None = None

    def modulated(self, norm: Norm, shift: Tensor | None, scale: Tensor | None) -> Tensor:
        """Add the branch, if there is one; norm(x)·(1 + scale) + shift."""
        if self.branch is None:
            return adaln(norm, self.x, shift, scale)
        self.x, normed = gated_adaln(norm, self.x, *self.branch, shift, scale)
        self.branch = None
        return normed

    def add(self, y: Tensor, gate: Tensor) -> None:
        """Leave gate·y to be added."""
        self.branch = y, gate


def _widens(x: Tensor, y: Tensor, gate: Tensor) -> bool:
    product = torch.promote_types(y.dtype, gate.dtype)
    return torch.promote_types(x.dtype, product) != x.dtype


def table(parameter: Tensor, condition: Tensor) -> tuple[Tensor, ...]:
    """A learned table `(K, D)` or `(1, K, D)` plus a condition `(B, K, D)`, or `(B, N, K, D)` per
    token: K modulations as views of the sum."""
    return (parameter + condition).unbind(-2)
