"""The sizes of a DiT: which fit each other, and the named ones of the paper.

An input has two axes, an image's or a latent's, or one, a signal's. A patch has a side along each;
the grid of patches is what positions refer to. Every size is checked here, when a model is built.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastdit.designs import Design
from fastdit.ops._checks import described

Size = tuple[int, ...]

SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
"""Depth, width and heads of the paper's four sizes (Peebles & Xie 2022, table 1)."""

LABELS = (torch.int64, torch.int32)
"""What an embedding takes for an index."""


def _positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def axes(name: str, value: int | tuple[int, ...], dims: int | None = None) -> Size:
    """A size along each axis; an int is the same along `dims` of them, two if that is not given.

    Raises:
        ValueError: it is none of one or two axes, or of another number than `dims`.
    """
    one = isinstance(value, int)
    sizes = (value,) * (dims or 2) if one else tuple(value) if isinstance(value, Iterable) else ()
    if len(sizes) not in ((1, 2) if dims is None else (dims,)) or not all(map(_positive, sizes)):
        allowed = "one or two" if dims is None else {1: "one", 2: "two"}[dims]
        raise ValueError(f"{name}: got {value!r}, allowed is a positive int or {allowed} of them")
    return sizes


def parse_axes(text: str) -> int | Size:
    """`"2"` as a number, `"8,2"` as one for each axis, `"8,"` as one of a signal.

    Raises:
        ValueError: it is none of these.
    """
    if "," not in text:
        return int(text)
    return tuple(int(part) for part in text.split(",") if part)


def grid(size: Size, patch: Size) -> Size:
    """Patches along each axis."""
    return tuple(n // p for n, p in zip(size, patch, strict=True))


def fits(size: Size, patch: Size) -> bool:
    """Whether patches cover an input of this size."""
    return len(size) == len(patch) and all(
        n > 0 and n % p == 0 for n, p in zip(size, patch, strict=True)
    )


def input_and_patch(input_size: Any, patch_size: Any) -> tuple[Size, Size]:
    """Both sizes along each axis.

    Raises:
        ValueError: the patch does not divide the input.
    """
    size = axes("input_size", input_size)
    patch = axes("patch_size", patch_size, len(size))
    if not fits(size, patch):
        raise ValueError(
            f"patch_size: got {patch_size}, allowed is a divisor of input_size = {input_size}"
        )
    return size, patch


def resized(name: str, value: int | tuple[int, ...], patch: Size) -> Size:
    """Another size of an input with this patch.

    Raises:
        ValueError: the patch does not divide it.
    """
    size = axes(name, value, len(patch))
    if not fits(size, patch):
        raise ValueError(f"{name}: got {value}, allowed is a multiple of the patch {patch}")
    return size


def check_config(config: dict[str, Any], design: Design) -> None:
    """The arguments of a `DiT` that are not sizes of its input.

    Raises:
        ValueError: an argument that does not fit, which is named.
    """
    for name in ("in_channels", "hidden_size", "num_heads"):
        if not _positive(config[name]):
            raise ValueError(f"{name}: got {config[name]!r}, allowed is a positive int")
    for name in ("depth", "num_classes"):
        if not _positive(config[name]) and config[name] != 0:
            raise ValueError(f"{name}: got {config[name]!r}, allowed is an int >= 0")
    if config["hidden_size"] % config["num_heads"]:
        raise ValueError(
            f"num_heads: got {config['num_heads']}, allowed is a divisor of "
            f"hidden_size = {config['hidden_size']}"
        )
    ratio = config["mlp_ratio"]
    if not isinstance(ratio, int | float) or not 1 <= config["hidden_size"] * ratio < math.inf:
        least = f"1/hidden_size = 1/{config['hidden_size']}"
        raise ValueError(f"mlp_ratio: got {ratio!r}, allowed is a number from {least}")
    if not isinstance(config["learn_sigma"], bool):
        raise ValueError(f"learn_sigma: got {config['learn_sigma']!r}, allowed is True or False")
    if not 0 <= config["class_dropout_prob"] <= 1:
        raise ValueError(
            f"class_dropout_prob: got {config['class_dropout_prob']!r}, allowed is 0 to 1"
        )
    if design.condition_dim and config["num_classes"]:
        raise ValueError(
            f"condition_dim: got {design.condition_dim} with num_classes={config['num_classes']}, "
            "allowed is num_classes=0 beside it: y is a vector or a label"
        )


def check_inputs(
    model: Any, x: Tensor, t: Tensor | None, y: Tensor | None, conditioning: Tensor | None = None
) -> Size:
    """The grid of x; whether t and y fit it, or in their place the conditioning's rows.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: an argument has a shape, dtype or device that the model does not take.
    """
    for name, value in (("x", x), ("t", t), ("y", y), ("conditioning", conditioning)):
        if not isinstance(value, Tensor) and (value is not None or name == "x"):
            raise TypeError(f"{name}: got {type(value).__name__}, allowed is a tensor")
    size, batch = _checked_size(model, x), x.shape[0]
    wanted: dict[str, tuple[Tensor | None, tuple[int, ...] | None]]
    if conditioning is None:
        vector = model.design.condition_dim
        condition = None if model.y_embedder is None else (batch, vector) if vector else (batch,)
        wanted = {"t": (t, (batch,)), "y": (y, condition)}
    else:
        wanted = {"conditioning": (conditioning, (batch, sum(model.rows_widths)))}
    for name, (value, shape) in wanted.items():
        got = None if value is None else tuple(value.shape)
        if got != shape:
            raise ValueError(f"{name}: got {got}, allowed is {shape}")
        if value is not None and value.device != x.device:
            raise ValueError(f"{name}: got {described(value)}, allowed is on {x.device}, as x is")
    if conditioning is None and model.num_classes and y.dtype not in LABELS:
        raise ValueError(f"y: got {described(y)}, allowed is int64 or int32 labels")
    return grid(size, model.patch)


def _checked_size(model: Any, x: Tensor) -> Size:
    """The size of x.

    Raises:
        ValueError: it has other channels or axes, or a size that the model does not take.
    """
    size, dims = tuple(x.shape[2:]), len(model.input_size)
    right = x.dim() == 2 + dims and x.shape[1] == model.in_channels
    any_size = model.design.any_size
    if right and (fits(size, model.patch) if any_size else size == model.input_size):
        return size
    sides = ", ".join(map(str, model.input_size))
    if any_size:
        sides = ", ".join(f"{n}·{p}" for n, p in zip("hw", model.patch, strict=False))
    raise ValueError(f"x: got {tuple(x.shape)}, allowed is (B, {model.in_channels}, {sides})")
