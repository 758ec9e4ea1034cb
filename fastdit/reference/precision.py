"""What the gradients share: their precision, and the shapes of modulation."""

from __future__ import annotations

import torch
from torch import Tensor


def per_token(modulation: Tensor) -> Tensor:
    """`(B, D)` as `(B, 1, D)`, so that it broadcasts over tokens; `(B, N, D)` as it is."""
    return modulation.unsqueeze(1) if modulation.dim() == 2 else modulation


def exact(tensor: Tensor) -> Tensor:
    """`tensor` in at least float32, the precision of every sum in a backward pass."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def reduced_to(gradient: Tensor, like: Tensor | None) -> Tensor:
    """A per-token gradient summed to the shape of `like`; empty where the input was absent."""
    if like is None:
        return gradient.new_empty(0)
    if like.dim() == 2:
        gradient = gradient.sum(1)
    elif like.dim() == 1:
        gradient = gradient.sum((0, 1))
    return gradient.to(like.dtype, copy=True)
