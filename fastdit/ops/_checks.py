"""Argument checks: every message names the argument, its value and what is allowed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

NORMS = ("layer", "rms")


def fail(name: str, got: Any, allowed: str) -> None:
    """Raise the `ValueError` that says what `name` was and what it may be."""
    raise ValueError(f"{name}: got {got}, allowed is {allowed}")


def described(tensor: Any) -> str:
    """A tensor by shape, dtype and device; anything else by its type."""
    if not isinstance(tensor, Tensor):
        return type(tensor).__name__
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def tensor(name: str, value: Any, dims: Sequence[int], layout: str) -> None:
    """`value` is a floating-point tensor of one of `dims` dimensions; `layout` names them."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, allowed is a tensor {layout}")
    if value.dim() not in dims or not value.is_floating_point():
        fail(name, described(value), f"a floating-point tensor {layout}")


def like(name: str, value: Any, x: Tensor, shape: Sequence[int] | None = None) -> None:
    """`value` has `x`'s dtype and device, and `shape` (default: `x`'s)."""
    shape = x.shape if shape is None else torch.Size(shape)
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, allowed is a tensor")
    if value.shape != shape or value.dtype != x.dtype or value.device != x.device:
        dtype = str(x.dtype).removeprefix("torch.")
        fail(name, described(value), f"{tuple(shape)} {dtype} on {x.device}")


def modulation(name: str, value: Any, x: Tensor) -> None:
    """`value` modulates `x` (B, N, D): (B, D) per sample or (B, N, D) per token, any strides and
    floating dtype, on `x`'s device."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name}: got {type(value).__name__}, allowed is a tensor (B, D) or (B, N, D)"
        )
    batch, tokens, width = x.shape
    shape = value.shape
    fits = shape == (batch, width) if value.dim() == 2 else shape == x.shape
    if not fits or not value.is_floating_point() or value.device != x.device:
        fail(
            name,
            described(value),
            f"({batch}, {width}) per sample or ({batch}, {tokens}, {width}) per token, "
            f"floating point, on {x.device}",
        )


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast casts `x` to: None where it is off, for float64, and on devices that have no
    autocast, such as meta."""
    device = x.device.type
    if device == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def instance(name: str, value: Any, kind: type, allowed: str) -> None:
    """`value` is one of `kind`, described by `allowed`, or None."""
    if value is not None and not isinstance(value, kind):
        raise TypeError(f"{name}: got {type(value).__name__}, allowed is None or {allowed}")


def function(name: str, value: Any) -> None:
    """`value` can be called, or is None."""
    instance(name, value, Callable, "a function")


def switch(name: str, value: Any) -> None:
    if value not in (None, True, False):
        fail(name, repr(value), "None, True or False")


def positive(name: str, value: Any) -> None:
    if not isinstance(value, int | torch.SymInt) or isinstance(value, bool) or value < 1:
        fail(name, repr(value), "a positive int")


def normalisation(x: Tensor, weight: Any, bias: Any, eps: Any, norm: Any) -> None:
    """The arguments shared by the ops that normalise `x` (B, N, D)."""
    if norm not in NORMS:
        fail("norm", repr(norm), "'layer' or 'rms'")
    if not eps >= 0:
        fail("eps", repr(eps), "a number >= 0")
    if weight is not None:
        like("weight", weight, x, x.shape[-1:])
    if bias is not None:
        if norm == "rms" or weight is None:
            fail("bias", described(bias), "None, unless norm='layer' and weight is given")
        like("bias", bias, x, x.shape[-1:])
