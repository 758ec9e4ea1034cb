"""patch_embed, backward: dweight, dbias, dpos and dx, the tokens' gradient crossing the bus once.

    dweight[d, k] = Σ_m dtokens[m, d]·patches[m, k]      dbias[d] = Σ_m dtokens[m, d]
    dx at patches[m, k] = Σ_d dtokens[m, d]·weight[d, k]      dpos[t, d] = Σ_b dtokens[b·T + t, d]

A program that sums over tokens owns BLOCK_N columns and, where dpos is wanted, SPAN tokens of every
sample, over which it walks: it holds dweight's sums, and the sums over samples, which are dpos as
they are and dbias once added up. Where several programs share a sum, each leaves its own in a row
of partial sums, which `partials.sum_rows` adds in a fixed order.

dx sums over D, across those programs. At K = 16 and 16 bits each of them leaves its terms of dx, K
for each token, and `gather_kernel` adds them up and puts them in their places: a quarter of
dtokens, written and read. Terms of a larger K outweigh dtokens, and so would the partial sums of
dweight if programs owned whole tokens instead: with the R columns or tokens whose sums fit its
registers, a program leaves 4·K/R bytes for each byte of dtokens, more than 1 from K = 64 on. There
other programs of the same launch sum over D; they read dtokens again from the L2 cache, the one
second read that costs no bus. So they do for a float32 dtokens, whose two products of one tile take
180 to 255 registers and spill, and for dx alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdit.kernels import launch, partials, tuning
from fastdit.kernels.patch_tiles import (
    Sizes,
    Tile,
    load_tile,
    patch_addresses,
    product,
    strides_of,
)

SPAN = tl.constexpr(16)  # tokens of a program

# By bytes of the products' operands. Loads go through registers (one stage): pipelined through
# shared memory, a tile that is also added up is read with bank conflicts, 1.62 wavefronts for 1.
WEIGHT = {2: Tile(32, 64, 64, 4, programs=640), 4: Tile(32, 64, 32, 4, programs=640)}
# With dpos or dx beside them, by bytes of dtokens: wide tiles, so that few terms of dx do (64
# tokens take 172 registers on sm_80), and few programs, since each that shares a span leaves its
# own sums of dpos; without dpos, one for each multiprocessor.
ALL = {2: Tile(32, 128, 64, 8, programs=64), 4: Tile(32, 64, 32, 4, programs=64)}
WITHOUT_DPOS = {size: replace(tile, programs=128) for size, tile in ALL.items()}
GATHER = Tile(64, 64, 16, 4)
CANDIDATES = [
    Tile(32, columns, 32, columns // 16, programs)
    for columns in (64, 128)
    for programs in (64, 256, 512, 1024)
]


class Wanted(NamedTuple):
    """Which gradients a call asks for."""

    dx: bool
    dweight: bool
    dbias: bool
    dpos: bool


@triton.jit
def gradients_kernel(
    dtokens_ptr, x_ptr, weight_ptr, dweight_ptr, dbias_ptr, dpos_ptr, terms_ptr, dx_ptr,
    dx_strides, splits, parts,
    rows, tokens, grid_width, width, strides,
    DEPTH: tl.constexpr, P: tl.constexpr, Q: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The first `parts` programs of each block of columns and of K sum over tokens; the others,
    where dx is given, over D, one for each BLOCK_M tokens and block of K."""
    part, block = tl.program_id(0), tl.program_id(1)
    if dx_ptr is None or part < parts:
        sum_over_tokens(
            dtokens_ptr, x_ptr, weight_ptr, dweight_ptr, dbias_ptr, dpos_ptr, terms_ptr,
            part, block, splits, rows, tokens, grid_width, width, strides,
            DEPTH, P, Q, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        sum_over_columns(
            dtokens_ptr, weight_ptr, dx_ptr, block * (tl.num_programs(0) - parts) + part - parts,
            rows, tokens, grid_width, width, dx_strides, DEPTH, P, Q, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip


@triton.jit
def sum_over_tokens(
    dtokens_ptr, x_ptr, weight_ptr, dweight_ptr, dbias_ptr, dpos_ptr, terms_ptr,
    part, block, splits, rows, tokens, grid_width, width, strides,
    DEPTH: tl.constexpr, P: tl.constexpr, Q: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dweight, dbias, dpos and terms of dx. A tile is SPAN tokens of BLOCK_M / SPAN periods, which
    are samples where dpos is wanted."""
    period = SPAN if dpos_ptr is None else tokens
    spans = tl.cdiv(period, SPAN)
    column_block, depth_block = block, 0
    if dweight_ptr is not None and DEPTH > BLOCK_K:
        depth_blocks: tl.constexpr = (DEPTH + BLOCK_K - 1) // BLOCK_K
        column_block, depth_block = block // depth_blocks, block % depth_blocks
    lane = tl.arange(0, BLOCK_M)
    token = part % spans * SPAN + lane % SPAN
    column = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = depth_block * BLOCK_K + tl.arange(0, BLOCK_K)
    # Whichever way fills 8 warps with sums, and leaves 4 of them on mma.sync on Hopper.
    tall: tl.constexpr = BLOCK_N >= 128
    dweight = tl.zeros([BLOCK_N, BLOCK_K] if tall else [BLOCK_K, BLOCK_N], tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    step: tl.constexpr = BLOCK_M // SPAN
    for first in range(part // spans * step, tl.cdiv(rows, period), splits * step):
        row = (first + lane // SPAN) * period + token
        inside = (token < period) & (row < rows)
        row = tl.where(inside, row, rows)
        dtokens = load_tile(dtokens_ptr, row, column, rows, width)
        total += dtokens.to(tl.float32)
        if dweight_ptr is not None:
            patch_at = patch_addresses(row, k, tokens, grid_width, strides, P, Q)
            patch_in = inside[:, None] & (k < DEPTH)[None, :]
            patches = tl.load(x_ptr + patch_at, mask=patch_in, other=0.0)
            if tall:
                dweight = product(tl.trans(dtokens), patches, dweight)
            else:
                dweight = product(tl.trans(patches), dtokens, dweight)
        if terms_ptr is not None:
            weight = load_tile(weight_ptr, column, k, width, DEPTH)
            terms = product(dtokens, weight, tl.zeros([BLOCK_M, BLOCK_K], tl.float32))
            at = (column_block.to(tl.int64) * rows + row)[:, None] * DEPTH + k[None, :]
            tl.store(terms_ptr + at, terms, mask=inside[:, None] & (k < DEPTH)[None, :])
    partial = part.to(tl.int64) * width
    if dweight_ptr is not None:
        at = partial * DEPTH + column[:, None] * DEPTH + k[None, :]
        mask = (column < width)[:, None] & (k < DEPTH)[None, :]
        dweight = (dweight if tall else tl.trans(dweight)).to(dweight_ptr.dtype.element_ty)
        tl.store(dweight_ptr + at, dweight, mask=mask)
    if dbias_ptr is not None:  # by the first of the programs that share these columns
        mask = column < tl.where(depth_block == 0, width, 0)
        dbias = tl.sum(total, 0).to(dbias_ptr.dtype.element_ty)
        tl.store(dbias_ptr + partial + column, dbias, mask=mask)
    if dpos_ptr is not None:
        dpos = tl.sum(tl.reshape(total, [BLOCK_M // SPAN, SPAN, BLOCK_N]), 0)
        token = part % spans * SPAN + tl.arange(0, SPAN)
        limit = tl.where(depth_block == 0, tokens, 0)
        mask = (token < limit)[:, None] & (column < width)[None, :]
        at = ((part // spans).to(tl.int64) * tokens + token)[:, None] * width + column[None, :]
        tl.store(dpos_ptr + at, dpos.to(dpos_ptr.dtype.element_ty), mask=mask)


@triton.jit
def sum_over_columns(
    dtokens_ptr, weight_ptr, dx_ptr, index, rows, tokens, grid_width, width, strides,
    DEPTH: tl.constexpr, P: tl.constexpr, Q: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dx of the block of tokens and of K that `index` counts, blocks of K first; the last few
    programs find nothing left."""
    depth_blocks: tl.constexpr = (DEPTH + BLOCK_K - 1) // BLOCK_K
    first = index // depth_blocks * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    k = index % depth_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    dpatches = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for start in range(0, tl.where(first < rows, width, 0), BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        dtokens = load_tile(dtokens_ptr, row, column, rows, width)
        weight = load_tile(weight_ptr, column, k, width, DEPTH)
        dpatches = product(dtokens, weight, dpatches)
    at = patch_addresses(row, k, tokens, grid_width, strides, P, Q)
    mask = (row < rows)[:, None] & (k < DEPTH)[None, :]
    tl.store(dx_ptr + at, dpatches.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gather_kernel(
    terms_ptr, dx_ptr, blocks, rows, tokens, grid_width, width, strides,
    DEPTH: tl.constexpr, P: tl.constexpr, Q: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dx of BLOCK_M tokens: the sum of their terms, always in the same order."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (row < rows)[:, None] & (k < DEPTH)[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for block in range(blocks):
        at = (tl.cast(block, tl.int64) * rows + row)[:, None] * DEPTH + k[None, :]
        total += tl.load(terms_ptr + at, mask=mask, other=0.0)
    at = patch_addresses(row, k, tokens, grid_width, strides, P, Q)
    tl.store(dx_ptr + at, total.to(dx_ptr.dtype.element_ty), mask=mask)


def patch_embed_backward(
    dtokens: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos: Tensor | None,
    output_mask,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The schema op's backward: one launch reads dtokens, for all the gradients that are wanted."""
    sizes, dtokens, weight = Sizes.of(x, weight), dtokens.contiguous(), weight.contiguous()
    gradients = [
        torch.empty(like.shape, dtype=like.dtype, device=x.device) if wanted else None
        for like, wanted in zip((x, weight, bias, pos), output_mask, strict=True)
    ]
    if dtokens.numel() == 0:
        gradients = [None if g is None else g.zero_() for g in gradients]
    elif any(g is not None for g in gradients):
        with launch.on_device(x):
            _launch(dtokens, x, weight, sizes, *gradients)
    return tuple(x.new_empty(0) if g is None else g for g in gradients)


@dataclass(frozen=True)
class Grid:
    """How a launch divides the sums: see `gradients_kernel`.

    Few programs are slow, many leave many partial sums: there are as many splits as the tile asks
    for, but not so many that their sums, written and read, outweigh dtokens, which eager reads a
    second time. With one part there are no partial sums.
    """

    splits: int
    parts: int
    programs: int
    blocks: int

    @staticmethod
    def of(sizes: Sizes, tile: Tile, dtokens: Tensor, wanted: Wanted, terms: bool) -> Grid:
        block_m, block_n, block_k = sizes.blocks(tile)
        period = sizes.tokens if wanted.dpos else SPAN.value
        spans, periods = triton.cdiv(period, SPAN.value), triton.cdiv(sizes.rows, period)
        column_blocks, depth_blocks = triton.cdiv(sizes.width, block_n), 1
        if wanted.dweight:
            depth_blocks = triton.cdiv(sizes.depth, block_k)
        sums = spans * (sizes.depth * wanted.dweight + wanted.dbias) + sizes.tokens * wanted.dpos
        splits = min(
            tile.programs // (spans * column_blocks * depth_blocks),
            triton.cdiv(periods, block_m // SPAN.value),
            dtokens.nbytes // max(1, 8 * sizes.width * sums),
        )
        splits = max(1, splits)
        parts = programs = spans * splits if any(wanted[1:]) else 0
        blocks = column_blocks * depth_blocks if parts else 1
        if wanted.dx and not terms:
            tiles = triton.cdiv(sizes.rows, block_m) * triton.cdiv(sizes.depth, block_k)
            programs += triton.cdiv(tiles, blocks)
        return Grid(splits, parts, programs, blocks)


def _launch(dtokens, x, weight, sizes: Sizes, dx, dweight, dbias, dpos) -> None:
    """Fill in the gradients that are not None."""
    wanted = Wanted(*(g is not None for g in (dx, dweight, dbias, dpos)))
    terms = None
    if dx is not None and any(wanted[1:]):
        blocks = _blocks_of_terms(dtokens, sizes)
        if blocks:
            terms = x.new_empty((blocks, sizes.rows, sizes.depth), dtype=torch.float32)

    direct_dx = dx if terms is None else None

    def run(tile: Tile) -> None:
        grid = Grid.of(sizes, tile, dtokens, wanted, terms is not None)
        left = [
            out if out is None or count == 1 else partials.partials(count, out.numel(), x)
            for out, count in ((dweight, grid.parts), (dbias, grid.parts), (dpos, grid.splits))
        ]
        gradients_kernel[(grid.programs, grid.blocks)](
            dtokens, x, weight, *left, terms, direct_dx, None if dx is None else strides_of(dx),
            grid.splits, grid.parts, *sizes.arguments(x, tile),
            num_warps=tile.num_warps, num_stages=1,
        )  # fmt: skip
        for sums, out in zip(left, (dweight, dbias, dpos), strict=True):
            if sums is not out:
                partials.sum_rows(sums, out)
        if terms is not None:
            _gather(terms, sizes, dx)

    if wanted.dpos:
        default = ALL[dtokens.element_size()]
    elif wanted.dx and any(wanted[1:]):
        default = WITHOUT_DPOS[dtokens.element_size()]
    else:
        default = WEIGHT[x.element_size()]
    # Terms are as many as the default's blocks of columns.
    candidates = [row for row in CANDIDATES if terms is None or row.columns == default.columns]
    key = (*sizes.key(x, dtokens), *wanted)
    run(tuning.choose("patch_embed_backward", key, default, candidates, run))


def _blocks_of_terms(dtokens: Tensor, sizes: Sizes) -> int:
    """How many programs leave terms of a token's dx; 0 where to write and to read them takes more
    than to read dtokens again."""
    if dtokens.element_size() == 4:
        return 0
    _, block_n, block_k = sizes.blocks(ALL[2])
    blocks = triton.cdiv(sizes.width, block_n)
    cheaper = 8 * sizes.depth * blocks < 2 * sizes.width
    return blocks if cheaper and sizes.depth <= block_k else 0


def _gather(terms: Tensor, sizes: Sizes, dx: Tensor) -> None:
    """Add up the terms of dx."""
    block_m, _, block_k = sizes.blocks(GATHER)
    gather_kernel[(triton.cdiv(sizes.rows, block_m), triton.cdiv(sizes.depth, block_k))](
        terms, dx, terms.shape[0], *sizes.arguments(dx, GATHER), num_warps=GATHER.num_warps
    )
