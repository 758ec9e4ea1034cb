"""unpatchify: token rows in (*patch, channel) order to an image, and back.

    image[c, h·p + i, w·q + j] = tokens[h·W + w, (i, j, c)]

A program moves one tile of four axes, (w, i, j, c) as the tokens have them and (c, i, w, j) as the
image has them. It loads along one memory's contiguous axes, permutes in registers and shared
memory, and stores along the other's, so that both sides are accessed 128 bits at a time where a run
is that long: whole tokens, or w·q elements of an image's row. Backward is the same tile the other
way.

Bytes: each element in once and out once. A signal is an image of one row.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from fastdit.backends import Kernel
from fastdit.kernels import launch, tuning


@dataclass(frozen=True)
class Tile:
    """A program's block along each axis, powers of two: tokens of one row of the grid, rows and
    columns of a patch, channels."""

    tokens: int
    rows: int
    columns: int
    channels: int
    num_warps: int


# Two 128-bit accesses of 16-bit elements a thread, or four of float32 (48 registers; twice as many
# take 70). A DiT/2's row of 16 tokens is one warp's.
ELEMENTS = 4096
ELEMENTS_OF_A_WARP = 512


CANDIDATES = (1024, 2048, 4096, 8192)


@functools.cache
def tile(patch: tuple[int, int], grid_width: int, channels: int, room: int = ELEMENTS) -> Tile:
    """The tile that fits these sizes: whole patches where they are up to `room` long, then as many
    tokens beside each other as that leaves room for."""
    blocks = []
    for size in (channels, patch[1], patch[0], grid_width):
        blocks.append(min(triton.next_power_of_2(size), room))
        room //= blocks[-1]
    warps = max(1, min(8, math.prod(blocks) // ELEMENTS_OF_A_WARP))
    return Tile(*reversed(blocks), num_warps=warps)


@triton.jit
def permute_kernel(
    tokens_ptr,
    image_ptr,
    grid_height,
    grid_width,
    width,
    token_stride_b,
    image_stride_b,
    image_stride_c,
    image_stride_h,
    TOKEN_STRIDE: tl.constexpr,
    CHANNELS: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    strip, first = tl.program_id(0), tl.program_id(1) * TOKENS
    batch, h = (strip // grid_height).to(tl.int64), strip % grid_height
    i_blocks: tl.constexpr = tl.cdiv(P, ROWS)
    j_blocks: tl.constexpr = tl.cdiv(Q, COLUMNS)
    block = tl.program_id(2)
    i0, j0 = block % i_blocks * ROWS, block // i_blocks % j_blocks * COLUMNS
    c0 = block // (i_blocks * j_blocks) * BLOCK
    lane = tl.arange(0, TOKENS * ROWS * COLUMNS * BLOCK)

    # As the tokens have them: c fastest, then j, i, w. Whole tokens beside each other are one run.
    c, j = lane % BLOCK, lane // BLOCK % COLUMNS
    i, w = lane // (BLOCK * COLUMNS) % ROWS, first + lane // (BLOCK * COLUMNS * ROWS)
    whole: tl.constexpr = BLOCK == CHANNELS and COLUMNS == Q and ROWS == P
    if whole and TOKEN_STRIDE == P * Q * CHANNELS:
        token_at = first * TOKEN_STRIDE + lane
        token_mask = token_at < grid_width * TOKEN_STRIDE
    elif whole:
        token_at = w * TOKEN_STRIDE + lane % (P * Q * CHANNELS)
        token_mask = w < grid_width
    else:
        token_at = w * TOKEN_STRIDE + ((i0 + i) * Q + j0 + j) * CHANNELS + c0 + c
        token_mask = (w < grid_width) & (i0 + i < P) & (j0 + j < Q) & (c0 + c < CHANNELS)
    tokens_ptr += batch * token_stride_b + h.to(tl.int64) * grid_width * TOKEN_STRIDE

    # As the image has them: j fastest, then w, i, c. A row of whole patches is one run.
    j, w = lane % COLUMNS, first + lane // COLUMNS % TOKENS
    i, c = i0 + lane // (COLUMNS * TOKENS) % ROWS, c0 + lane // (COLUMNS * TOKENS * ROWS)
    if COLUMNS == Q:
        along = first * Q + lane % (COLUMNS * TOKENS)
        image_mask = along < width
    else:
        along = w * Q + j0 + j
        image_mask = (w < grid_width) & (j0 + j < Q)
    if P % ROWS:
        image_mask &= i < P
    if CHANNELS % BLOCK:
        image_mask &= c < CHANNELS
    image_at = c * image_stride_c + i * image_stride_h + along
    image_ptr += batch * image_stride_b + h.to(tl.int64) * P * image_stride_h

    if BACKWARD:
        pixels = tl.load(image_ptr + image_at, mask=image_mask, other=0.0)
        pixels = pixels.reshape(BLOCK, ROWS, TOKENS, COLUMNS).permute(2, 1, 3, 0)
        tl.store(
            tokens_ptr + token_at, pixels.reshape(TOKENS * ROWS * COLUMNS * BLOCK), mask=token_mask
        )
    else:
        pixels = tl.load(tokens_ptr + token_at, mask=token_mask, other=0.0)
        pixels = pixels.reshape(TOKENS, ROWS, COLUMNS, BLOCK).permute(3, 1, 0, 2)
        tl.store(
            image_ptr + image_at, pixels.reshape(TOKENS * ROWS * COLUMNS * BLOCK), mask=image_mask
        )


def _pair(values) -> tuple[int, int]:
    return (1, *values) if len(values) == 1 else tuple(values)


def _launch(tokens: Tensor, image: Tensor, patch, grid, channels: int, backward: bool) -> None:
    if tokens.numel() == 0:
        return
    patch, (height, width) = _pair(patch), _pair(grid)
    image = image.unsqueeze(2) if image.dim() == 3 else image

    def run(fit: Tile) -> None:
        blocks = (
            triton.cdiv(patch[0], fit.rows)
            * triton.cdiv(patch[1], fit.columns)
            * triton.cdiv(channels, fit.channels)
        )
        permute_kernel[(tokens.shape[0] * height, triton.cdiv(width, fit.tokens), blocks)](
            tokens,
            image,
            height,
            width,
            width * patch[1],
            tokens.stride(0),
            *image.stride()[:3],
            tokens.stride(1),
            channels,
            *patch,
            fit.tokens,
            fit.rows,
            fit.columns,
            fit.channels,
            backward,
            num_warps=fit.num_warps,
        )

    with launch.on_device(tokens):
        sizes = (patch, width, channels)
        candidates = [tile(*sizes, room) for room in CANDIDATES]
        key = (tuning.shape_class(tokens.numel()), *sizes, tokens.dtype)
        op = "unpatchify_backward" if backward else "unpatchify"
        run(tuning.choose(op, key, tile(*sizes), candidates, run))


def _dense(tensor: Tensor) -> Tensor:
    """`tensor`, copied only if its last axis is strided."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def unpatchify(tokens: Tensor, patch, grid, channels: int) -> Tensor:
    """The schema op's forward: reads the tokens, writes the image."""
    size = [g * p for g, p in zip(grid, patch, strict=True)]
    image = tokens.new_empty(tokens.shape[0], channels, *size)
    _launch(_dense(tokens), image, patch, grid, channels, backward=False)
    return image


def unpatchify_backward(dimage: Tensor, patch, grid, channels: int) -> Tensor:
    """The schema op's backward: reads the image, writes the tokens."""
    width = math.prod(patch) * channels
    tokens = dimage.new_empty(dimage.shape[0], math.prod(grid), width)
    _launch(tokens, _dense(dimage), patch, grid, channels, backward=True)
    return tokens


def _unsupported(tokens: Tensor, patch, grid, channels: int) -> str | None:
    return launch.unsupported_dtype(tokens=tokens) or launch.unsupported_extent(tokens=tokens)


def _unsupported_backward(dimage: Tensor, patch, grid, channels: int) -> str | None:
    return launch.unsupported_dtype(dimage=dimage) or launch.unsupported_extent(dimage=dimage)


KERNELS = (
    Kernel("unpatchify", "cuda", "triton", unpatchify, _unsupported),
    Kernel("unpatchify_backward", "cuda", "triton", unpatchify_backward, _unsupported_backward),
)
