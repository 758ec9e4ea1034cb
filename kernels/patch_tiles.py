"""What patch_embed's kernels share: tiles, products of them, and where patches lie in an image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastdit.kernels import launch, tuning


@dataclass(frozen=True)
class Tile:
    """A program's tile: tokens, columns of D, elements of a patch; and how many programs there
    should be at least (forward) or are at most (backward)."""

    tokens: int
    columns: int
    depth: int
    num_warps: int
    programs: int = 0


@triton.jit
def product(a, b, total):
    """total + a·b. Tiles of float32 are summed alone and added as a whole: a chain of K sums has
    twice the error. Fused with a 1, for the compiler turns a plain addition back into the chain.
    float32 beside 16 bits, as autocast leaves dtokens where positions are float32, counts as the
    sum of two 16-bit numbers: 2^-17 off, on tensor cores."""
    if a.dtype == tl.float32 and b.dtype == tl.float32:
        one = tl.full(total.shape, 1.0, tl.float32)
        total = tl.fma(tl.dot(a, b, input_precision="ieee"), one, total)
    elif a.dtype == tl.float32:
        high = a.to(b.dtype)
        total = tl.dot(high, b, total)
        total = tl.dot((a - high.to(tl.float32)).to(b.dtype), b, total)
    elif b.dtype == tl.float32:
        high = b.to(a.dtype)
        total = tl.dot(a, high, total)
        total = tl.dot(a, (b - high.to(tl.float32)).to(a.dtype), total)
    else:
        total = tl.dot(a, b, total)
    return total


@triton.jit
def patch_addresses(row, k, tokens, grid_width, strides, P: tl.constexpr, Q: tl.constexpr):
    """Offsets in x of elements k, (channel, i, j), of the patches of tokens `row`, all samples'."""
    token = row % tokens
    h, w = token // grid_width, token % grid_width
    begin = (row // tokens).to(tl.int64) * strides[0] + h * P * strides[2] + w * Q * strides[3]
    inside = k // (P * Q) * strides[1] + k // Q % P * strides[2] + k % Q * strides[3]
    return begin[:, None] + inside[None, :]


@triton.jit
def load_tile(base_ptr, row, column, rows, width):
    """The tile of these rows and columns of a matrix of `rows` dense rows, 0 outside."""
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    mask = (row < rows)[:, None] & (column < width)[None, :]
    return tl.load(base_ptr + at, mask=mask, other=0.0)


def strides_of(image: Tensor) -> tuple[int, ...]:
    """Of sample, channel, row and column; a 1-D image is one row."""
    strides = image.stride()
    return strides if image.dim() == 4 else (*strides[:2], 0, strides[2])


@dataclass(frozen=True)
class Sizes:
    """Of one call: tokens of all samples and of one, the grid's width, D, K and the patch."""

    rows: int
    tokens: int
    grid_width: int
    width: int
    depth: int
    patch: tuple[int, int]

    @staticmethod
    def of(x: Tensor, weight: Tensor) -> Sizes:
        patch = tuple(weight.shape[2:])
        grid = [size // p for size, p in zip(x.shape[2:], patch, strict=True)]
        pair = patch if len(patch) == 2 else (1, *patch)
        tokens, depth = math.prod(grid), math.prod(weight.shape[1:])
        return Sizes(x.shape[0] * tokens, tokens, grid[-1], weight.shape[0], depth, pair)

    def blocks(self, tile: Tile) -> tuple[int, int, int]:
        """BLOCK_M, BLOCK_N and BLOCK_K; `tl.dot` takes no side under 16."""
        columns = max(16, launch.column_block(self.width, tile.columns))
        depth = min(tile.depth, max(16, triton.next_power_of_2(self.depth)))
        return tile.tokens, columns, depth

    def key(self, x: Tensor, tokens: Tensor) -> tuple[Any, ...]:
        """What a tuned tile depends on."""
        return (tuning.shape_class(self.rows), self.width, self.depth, x.dtype, tokens.dtype)

    def arguments(self, image: Tensor, tile: Tile) -> tuple[Any, ...]:
        """What every kernel takes after its tensors."""
        sizes = (self.rows, self.tokens, self.grid_width, self.width, strides_of(image))
        return (*sizes, self.depth, *self.patch, *self.blocks(tile))
