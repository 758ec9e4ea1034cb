"""patch_embed, backward: dweight, dbias, dpos and dx from one pass over the tokens' gradient.

    dweight[d, k] = Σ_m dtokens[m, d]·patches[m, k]      dbias[d] = Σ_m dtokens[m, d]
    dx at patches[m, k] = Σ_d dtokens[m, d]·weight[d, k]      dpos[t, d] = Σ_b dtokens[b·T + t, d]

A program of `gradients_kernel` owns SPAN tokens and BLOCK_N columns, and walks over the samples: it
holds dweight's sums, and the sums over samples, which are dpos as they are and dbias once added up.
dweight and dbias leave one row of partial sums a program, which `partials.sum_rows` adds in a fixed
order; so does dpos, where several programs share the samples of a span.

dx sums over D, which the programs of a row divide among them: each leaves its terms of dx, K for
each token, and `gather_kernel` adds them up and puts them in their places. With K = 16 and 128
columns these terms are a quarter of dtokens, written and read; where they would outweigh a second
pass over dtokens (K of 32 and more), `input_kernel` takes that pass. It also serves dx alone, and a
float32 dtokens, whose two products beside each other take 180 to 255 registers and spill.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdit.kernels import launch, partials, tuning
from fastdit.kernels.patch_tiles import Sizes, Tile, load_tile, patch_addresses, product

SPAN = tl.constexpr(16)  # tokens of a program

# By bytes of the products' operands. Loads go through registers (one stage): pipelined through
# shared memory, a tile that is also added up is read with bank conflicts, 1.62 wavefronts for 1.
WEIGHT = {2: Tile(32, 64, 64, 4, programs=640), 4: Tile(32, 64, 32, 4, programs=640)}
# With dpos or dx beside them, by bytes of dtokens: wide tiles, so that few terms of dx do (64
# tokens take 172 registers on sm_80), and few programs, since each that shares a span leaves its
# own sums of dpos.
ALL = {2: Tile(32, 128, 64, 8, programs=64), 4: Tile(32, 64, 32, 4, programs=64)}
INPUT = {2: Tile(32, 64, 64, 4), 4: Tile(32, 32, 32, 4)}
GATHER = Tile(64, 64, 16, 4)
CANDIDATES = [
    Tile(32, columns, 32, columns // 16, programs)
    for columns in (64, 128)
    for programs in (64, 256, 512, 1024)
]
INPUT_CANDIDATES = [Tile(tokens, columns, 32, 4) for tokens in (32, 64) for columns in (32, 64)]


@triton.jit
def gradients_kernel(
    dtokens_ptr, x_ptr, weight_ptr, dweight_ptr, dbias_ptr, dpos_ptr, terms_ptr,
    rows, tokens, grid_width, width, strides,
    DEPTH: tl.constexpr, P: tl.constexpr, Q: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile is SPAN tokens of BLOCK_M / SPAN samples."""
    spans = tl.cdiv(tokens, SPAN)
    split, splits = tl.program_id(0) // spans, tl.num_programs(0) // spans
    lane = tl.arange(0, BLOCK_M)
    token = tl.program_id(0) % spans * SPAN + lane % SPAN
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    # Whichever way fills 8 warps with sums, and leaves 4 of them on mma.sync on Hopper.
    tall: tl.constexpr = BLOCK_N >= 128
    dweight = tl.zeros([BLOCK_N, BLOCK_K] if tall else [BLOCK_K, BLOCK_N], tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(split * (BLOCK_M // SPAN), rows // tokens, splits * (BLOCK_M // SPAN)):
        sample = first + lane // SPAN
        inside = (token < tokens) & (sample < rows // tokens)
        row = tl.where(inside, sample * tokens + token, rows)
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
            at = (tl.program_id(1).to(tl.int64) * rows + row)[:, None] * DEPTH + k[None, :]
            tl.store(terms_ptr + at, terms, mask=inside[:, None] & (k < DEPTH)[None, :])
    partial = tl.program_id(0).to(tl.int64) * width
    if dweight_ptr is not None:
        at = partial * DEPTH + column[:, None] * DEPTH + k[None, :]
        mask = (column < width)[:, None] & (k < DEPTH)[None, :]
        tl.store(dweight_ptr + at, dweight if tall else tl.trans(dweight), mask=mask)
    if dbias_ptr is not None:  # by the first of the programs that share these columns
        mask = column < tl.where(tl.program_id(2) == 0, width, 0)
        tl.store(dbias_ptr + partial + column, tl.sum(total, 0), mask=mask)
    if dpos_ptr is not None:
        dpos = tl.sum(tl.reshape(total, [BLOCK_M // SPAN, SPAN, BLOCK_N]), 0)
        token = tl.program_id(0) % spans * SPAN + tl.arange(0, SPAN)
        limit = tl.where(tl.program_id(2) == 0, tokens, 0)
        mask = (token < limit)[:, None] & (column < width)[None, :]
        at = (split.to(tl.int64) * tokens + token)[:, None] * width + column[None, :]
        tl.store(dpos_ptr + at, dpos.to(dpos_ptr.dtype.element_ty), mask=mask)


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


@triton.jit
def input_kernel(
    dtokens_ptr,
    weight_ptr,
    dx_ptr,
    rows,
    tokens,
    grid_width,
    width,
    strides,
    DEPTH: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    dpatches = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for start in range(0, width, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        dtokens = load_tile(dtokens_ptr, row, column, rows, width)
        weight = load_tile(weight_ptr, column, k, width, DEPTH)
        dpatches = product(dtokens, weight, dpatches)
    at = patch_addresses(row, k, tokens, grid_width, strides, P, Q)
    mask = (row < rows)[:, None] & (k < DEPTH)[None, :]
    tl.store(dx_ptr + at, dpatches.to(dx_ptr.dtype.element_ty), mask=mask)


def patch_embed_backward(
    dtokens: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos: Tensor | None,
    output_mask,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The schema op's backward: reads dtokens once, twice where K is large and dx is wanted."""
    sizes, dtokens, weight = Sizes.of(x, weight), dtokens.contiguous(), weight.contiguous()
    gradients = [
        torch.empty(like.shape, dtype=like.dtype, device=x.device) if wanted else None
        for like, wanted in zip((x, weight, bias, pos), output_mask, strict=True)
    ]
    dx, *sums = gradients
    if dtokens.numel() == 0:
        gradients = [None if g is None else g.zero_() for g in gradients]
    else:
        with launch.on_device(x):
            blocks = 0
            if any(g is not None for g in sums):
                blocks = 0 if dx is None else _blocks_of_terms(dtokens, sizes)
                terms = None
                if blocks:
                    terms = x.new_empty((blocks, sizes.rows, sizes.depth), dtype=torch.float32)
                _sum_gradients(dtokens, x, weight, sizes, *sums, terms)
            if blocks:
                _gather(terms, sizes, dx)
            elif dx is not None:
                _input_gradient(dtokens, weight, sizes, dx)
    return tuple(x.new_empty(0) if g is None else g for g in gradients)


def _blocks_of_terms(dtokens: Tensor, sizes: Sizes) -> int:
    """How many programs leave terms of a token's dx; 0 where a second pass over dtokens is cheaper
    than to write and to read them."""
    if dtokens.element_size() == 4:
        return 0
    _, block_n, block_k = sizes.blocks(ALL[2])
    blocks = triton.cdiv(sizes.width, block_n)
    cheaper = 8 * sizes.depth * blocks < 2 * sizes.width
    return blocks if cheaper and sizes.depth <= block_k else 0


def _sum_gradients(dtokens, x, weight, sizes: Sizes, dweight, dbias, dpos, terms) -> None:
    """dweight, dbias, dpos and the terms of dx, those that are not None, from one pass."""
    spans = triton.cdiv(sizes.tokens, SPAN.value)

    def run(tile: Tile) -> None:
        block_m, block_n, block_k = sizes.blocks(tile)
        column_blocks = triton.cdiv(sizes.width, block_n)
        depth_blocks = 1 if dweight is None else triton.cdiv(sizes.depth, block_k)
        tiles = triton.cdiv(sizes.rows // sizes.tokens, block_m // SPAN.value)
        splits = min(tiles, max(1, tile.programs // (spans * column_blocks * depth_blocks)))
        left = [
            None if out is None else partials.partials(count, out.numel(), x)
            for out, count in ((dweight, spans * splits), (dbias, spans * splits), (dpos, splits))
        ]
        direct = splits == 1  # then dpos has no partial sums
        gradients_kernel[(spans * splits, column_blocks, depth_blocks)](
            dtokens, x, weight, *left[:2], dpos if direct else left[2], terms,
            *sizes.arguments(x, tile), num_warps=tile.num_warps, num_stages=1,
        )  # fmt: skip
        for sums, out in zip(left, (dweight, dbias, None if direct else dpos), strict=True):
            if out is not None:
                partials.sum_rows(sums, out)

    alone = dpos is None and terms is None
    wanted = tuple(t is not None for t in (dweight, dbias, dpos, terms))
    key = (*sizes.key(x, dtokens), *wanted)
    default = WEIGHT[x.element_size()] if alone else ALL[dtokens.element_size()]
    # Terms are as many as the default's blocks of columns.
    candidates = [row for row in CANDIDATES if terms is None or row.columns == default.columns]
    run(tuning.choose("patch_embed_backward", key, default, candidates, run))


def _gather(terms: Tensor, sizes: Sizes, dx: Tensor) -> None:
    """Add up the terms of dx."""
    block_m, _, block_k = sizes.blocks(GATHER)
    gather_kernel[(triton.cdiv(sizes.rows, block_m), triton.cdiv(sizes.depth, block_k))](
        terms, dx, terms.shape[0], *sizes.arguments(dx, GATHER), num_warps=GATHER.num_warps
    )


def _input_gradient(dtokens: Tensor, weight: Tensor, sizes: Sizes, dx: Tensor) -> None:
    """dx from a pass of its own."""

    def run(tile: Tile) -> None:
        block_m, _, block_k = sizes.blocks(tile)
        input_kernel[(triton.cdiv(sizes.rows, block_m), triton.cdiv(sizes.depth, block_k))](
            dtokens, weight, dx, *sizes.arguments(dx, tile), num_warps=tile.num_warps
        )

    key, default = sizes.key(dx, dtokens), INPUT[weight.element_size()]
    run(tuning.choose("patch_embed_backward_input", key, default, INPUT_CANDIDATES, run))
