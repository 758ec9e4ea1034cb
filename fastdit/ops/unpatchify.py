"""unpatchify: token rows back to an image.

    image[c, h·p + i, w·q + j] = tokens[h·W + w, (i, j, c)]

The order inside a row, (row, column, channel), is the published final layer's. It differs from
the order (channel, row, column) in which `patch_embed` reads an image. Least traffic: the tokens
once in, the image once out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor
from torch.compiler import is_dynamo_compiling

from fastdit import reference
from fastdit.backends import direct_calls
from fastdit.ops import _checks
from fastdit.ops._library import Op, define


def _fake(tokens, patch, grid, channels):
    size = [g * p for g, p in zip(grid, patch, strict=True)]
    return tokens.new_empty(tokens.shape[0], channels, *size)


def _fake_backward(dimage, patch, grid, channels):
    rows = math.prod(grid)
    return dimage.new_empty(dimage.shape[0], rows, math.prod(patch) * channels)


def _setup_context(ctx, inputs, output):
    _tokens, ctx.patch, ctx.grid, ctx.channels = inputs


def _backward(ctx, dimage):
    dtokens = _unpatchify_backward(dimage.contiguous(), ctx.patch, ctx.grid, ctx.channels)
    return dtokens, None, None, None


_unpatchify_backward = define(
    "unpatchify_backward(Tensor dimage, SymInt[] patch, SymInt[] grid, SymInt channels) -> Tensor",
    reference.unpatchify_backward,
    _fake_backward,
)
_unpatchify = Op(
    "unpatchify(Tensor tokens, SymInt[] patch, SymInt[] grid, SymInt channels) -> Tensor",
    reference=reference.unpatchify,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)


def _axes(name: str, value: int | Sequence[int], dims: int) -> list[int]:
    sizes = [value] * dims if isinstance(value, int) else list(value)
    if len(sizes) != dims:
        _checks.fail(
            name, repr(value), f"a positive int or {dims} of them, one for each axis of grid"
        )
    for size in sizes:
        _checks.positive(name, size)
    return sizes


def _arguments(tokens, patch, grid, channels):
    _checks.tensor("tokens", tokens, (3,), "(B, T, prod(patch)·channels)")
    grid = _axes("grid", grid, 1 if isinstance(grid, int) else len(grid))
    if len(grid) not in (1, 2):
        _checks.fail("grid", repr(tuple(grid)), "one or two positive ints")
    patch = _axes("patch", patch, len(grid))
    _checks.positive("channels", channels)
    rows = (math.prod(grid), math.prod(patch) * channels)
    if tuple(tokens.shape[1:]) != rows:
        _checks.fail("tokens", _checks.described(tokens), f"(B, {rows[0]}, {rows[1]})")
    return tokens, patch, grid, channels


@_unpatchify.public(_arguments)
def unpatchify(
    tokens: Tensor, patch: int | Sequence[int], grid: int | Sequence[int], channels: int
) -> Tensor:
    """Token rows `(B, T, prod(patch)·channels)` as an image `(B, channels, *size)`.

    Args:
        tokens: rows in (*patch, channel) order, tokens in row-major order of the grid.
        patch: patch size, one int or one for each axis.
        grid: tokens along each axis: `(rows, columns)`, or `(length,)` for signals.
        channels: channels of the image.

    Returns:
        `(B, channels, grid·patch...)`, contiguous, in `tokens`' dtype.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or value, which is named.

    Source: the published `DiT.unpatchify`.
    """
    if not is_dynamo_compiling():
        image = direct_calls["unpatchify"](tokens, patch, grid, channels)
        if image is not None:
            return image
    if isinstance(tokens, Tensor) and isinstance(grid, tuple | list):
        patches = [patch] * len(grid) if isinstance(patch, int) else patch
        return _unpatchify.checked(tokens, patches, grid, channels)
    return _unpatchify(*_arguments(tokens, patch, grid, channels))
