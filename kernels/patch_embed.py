"""patch_embed: gather patches, project them, add bias and positions, write each token once.

    tokens[m, d] = Σ_k patches[m, k]·weight[d, k] + bias[d] + pos[m mod T, d]

m runs over batch and tokens, k over (channel, row, column) of a patch: K = C·p·q is 16 for a DiT/2.
Patches are never materialised: an element's address follows from m and k, in any strides of x.

Forward: a program gathers the patches of BLOCK_M tokens once and walks over D, so the latents cross
the bus once and the tokens once; weight and positions come from the L2 cache.

Backward, each from one pass over dtokens:

    dweight[d, k] = Σ_m dtokens[m, d]·patches[m, k]      dbias[d] = Σ_m dtokens[m, d]
    dx at patches[m, k] = Σ_d dtokens[m, d]·weight[d, k]      dpos[t, d] = Σ_b dtokens[b·T + t, d]

dweight and dbias share a pass: each program keeps its sums in registers and leaves one row of
partial sums, which `partials.sum_rows` adds in a fixed order. dpos is such a sum itself, over the
batch. Products of float32 are IEEE float32, those of 16 bits run on tensor cores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdit.backends import Kernel
from fastdit.kernels import launch, partials


@dataclass(frozen=True)
class Tile:
    """A program's tile: tokens, columns of D, elements of a patch; and how many programs there
    should be at least (forward) or are at most (backward)."""

    tokens: int
    columns: int
    depth: int
    num_warps: int
    programs: int = 0


# By bytes of the products' operands. 32 × 64 sums are 16 registers a thread; 128 columns double the
# kernels' registers and halve their occupancy. In float32, where a product keeps whole operands in
# registers, a depth of 64 spills. 32 tokens keep Hopper on mma.sync at a DiT/2's depth of 16, where
# warp-group products would pass the few operands through shared memory. Forward, 512 programs make
# each gather its patches once at 16384 tokens, and twice, from the L2 cache, at 8192.
FORWARD = {2: Tile(32, 64, 64, 4, programs=512), 4: Tile(32, 64, 16, 4, programs=512)}
WEIGHT = {2: Tile(32, 64, 64, 4, programs=512), 4: Tile(32, 64, 32, 4, programs=512)}
INPUT = {2: Tile(32, 64, 64, 4), 4: Tile(32, 32, 32, 4)}


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


@triton.jit
def forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    pos_ptr,
    out_ptr,
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
    row, k = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    row_in = (row < rows)[:, None]
    if DEPTH <= BLOCK_K:  # gathered once, for all of D
        patch_at = patch_addresses(row, k, tokens, grid_width, strides, P, Q)
        kept = tl.load(x_ptr + patch_at, mask=row_in & (k < DEPTH)[None, :], other=0.0)
    for start in range(tl.program_id(1) * BLOCK_N, width, tl.num_programs(1) * BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        out = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if DEPTH <= BLOCK_K:
            weight = load_tile(weight_ptr, column, k, width, DEPTH)
            out = product(kept, tl.trans(weight), out)
        else:
            for first in range(0, DEPTH, BLOCK_K):
                part = first + k
                part_at = patch_addresses(row, part, tokens, grid_width, strides, P, Q)
                part_in = row_in & (part < DEPTH)[None, :]
                patches = tl.load(x_ptr + part_at, mask=part_in, other=0.0)
                weight = load_tile(weight_ptr, column, part, width, DEPTH)
                out = product(patches, tl.trans(weight), out)
        mask = row_in & (column < width)[None, :]
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + column, mask=column < width, other=0.0).to(tl.float32)
            out += bias[None, :]
        if pos_ptr is not None:
            pos_at = (row % tokens)[:, None] * width + column[None, :]
            out += tl.load(pos_ptr + pos_at, mask=mask, other=0.0).to(tl.float32)
        out_at = row.to(tl.int64)[:, None] * width + column[None, :]
        tl.store(out_ptr + out_at, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def weight_kernel(
    dtokens_ptr,
    x_ptr,
    dweight_ptr,
    dbias_ptr,
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
    split, splits = tl.program_id(0), tl.num_programs(0)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    dweight = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
    dbias = tl.zeros([BLOCK_N], tl.float32)
    for start in range(split * BLOCK_M, rows, splits * BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        dtokens = load_tile(dtokens_ptr, row, column, rows, width)
        if dweight_ptr is not None:
            patch_at = patch_addresses(row, k, tokens, grid_width, strides, P, Q)
            patch_in = (row < rows)[:, None] & (k < DEPTH)[None, :]
            patches = tl.load(x_ptr + patch_at, mask=patch_in, other=0.0)
            dweight = product(tl.trans(patches), dtokens, dweight)
        if dbias_ptr is not None:
            dbias += tl.sum(dtokens.to(tl.float32), 0)
    if dweight_ptr is not None:
        at = split.to(tl.int64) * width * DEPTH + column[:, None] * DEPTH + k[None, :]
        mask = (column < width)[:, None] & (k < DEPTH)[None, :]
        tl.store(dweight_ptr + at, tl.trans(dweight), mask=mask)
    if dbias_ptr is not None:  # by the first of the programs that share these columns
        mask = column < tl.where(tl.program_id(2) == 0, width, 0)
        tl.store(dbias_ptr + split.to(tl.int64) * width + column, dbias, mask=mask)


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


@dataclass(frozen=True)
class _Sizes:
    """Of one call: tokens of all samples and of one, the grid's width, D, K and the patch."""

    rows: int
    tokens: int
    grid_width: int
    width: int
    depth: int
    patch: tuple[int, int]

    @staticmethod
    def of(x: Tensor, weight: Tensor) -> _Sizes:
        patch = tuple(weight.shape[2:])
        grid = [size // p for size, p in zip(x.shape[2:], patch, strict=True)]
        pair = patch if len(patch) == 2 else (1, *patch)
        tokens, depth = math.prod(grid), math.prod(weight.shape[1:])
        return _Sizes(x.shape[0] * tokens, tokens, grid[-1], weight.shape[0], depth, pair)

    def blocks(self, tile: Tile) -> tuple[int, int, int]:
        """BLOCK_M, BLOCK_N and BLOCK_K; `tl.dot` takes no side under 16."""
        columns = max(16, launch.column_block(self.width, tile.columns))
        depth = min(tile.depth, max(16, triton.next_power_of_2(self.depth)))
        return tile.tokens, columns, depth

    def arguments(self, image: Tensor, tile: Tile) -> tuple[Any, ...]:
        """What every kernel takes after its tensors."""
        strides = image.stride()
        if image.dim() == 3:
            strides = (*strides[:2], 0, strides[2])
        sizes = (self.rows, self.tokens, self.grid_width, self.width, strides)
        return (*sizes, self.depth, *self.patch, *self.blocks(tile))


def patch_embed(x: Tensor, weight: Tensor, bias: Tensor | None, pos: Tensor | None) -> Tensor:
    """The schema op's forward: reads x, writes the tokens."""
    sizes = _Sizes.of(x, weight)
    dtype = x.dtype if pos is None else torch.promote_types(x.dtype, pos.dtype)
    out = torch.empty((x.shape[0], sizes.tokens, sizes.width), dtype=dtype, device=x.device)
    if out.numel() == 0:
        return out
    tile = FORWARD[x.element_size()]
    block_m, block_n, _ = sizes.blocks(tile)
    row_blocks = triton.cdiv(sizes.rows, block_m)
    splits = min(triton.cdiv(sizes.width, block_n), triton.cdiv(tile.programs, row_blocks))
    dense = [None if t is None else t.contiguous() for t in (weight, bias, pos)]
    with launch.on_device(x):
        forward_kernel[(row_blocks, splits)](
            x, *dense, out, *sizes.arguments(x, tile), num_warps=tile.num_warps
        )
    return out


def _sum_gradients(
    dtokens: Tensor, x: Tensor, sizes: _Sizes, dweight: Tensor | None, dbias: Tensor | None
) -> None:
    """dweight and dbias, those that are not None, from one pass over dtokens."""
    tile = WEIGHT[x.element_size()]
    block_m, block_n, block_k = sizes.blocks(tile)
    column_blocks = triton.cdiv(sizes.width, block_n)
    depth_blocks = 1 if dweight is None else triton.cdiv(sizes.depth, block_k)
    most = max(1, tile.programs // (column_blocks * depth_blocks))
    splits = min(triton.cdiv(sizes.rows, block_m), most)
    outs = (dweight, dbias)
    sums = [None if o is None else partials.partials(splits, o.numel(), x) for o in outs]
    with launch.on_device(x):
        weight_kernel[(splits, column_blocks, depth_blocks)](
            dtokens, x, *sums, *sizes.arguments(x, tile), num_warps=tile.num_warps
        )
    for rows, out in zip(sums, outs, strict=True):
        if out is not None:
            partials.sum_rows(rows, out)


def _input_gradient(dtokens: Tensor, weight: Tensor, sizes: _Sizes, dx: Tensor) -> None:
    tile, weight = INPUT[weight.element_size()], weight.contiguous()
    block_m, _, block_k = sizes.blocks(tile)
    with launch.on_device(dx):
        input_kernel[(triton.cdiv(sizes.rows, block_m), triton.cdiv(sizes.depth, block_k))](
            dtokens, weight, dx, *sizes.arguments(dx, tile), num_warps=tile.num_warps
        )


def patch_embed_backward(
    dtokens: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos: Tensor | None,
    output_mask,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The schema op's backward: each of dx, (dweight, dbias) and dpos reads dtokens once."""
    sizes, dtokens = _Sizes.of(x, weight), dtokens.contiguous()
    gradients = [
        torch.empty(like.shape, dtype=like.dtype, device=x.device) if wanted else None
        for like, wanted in zip((x, weight, bias, pos), output_mask, strict=True)
    ]
    dx, dweight, dbias, dpos = gradients
    if dtokens.numel() == 0:
        gradients = [None if g is None else g.zero_() for g in gradients]
    else:
        if dweight is not None or dbias is not None:
            _sum_gradients(dtokens, x, sizes, dweight, dbias)
        if dx is not None:
            _input_gradient(dtokens, weight, sizes, dx)
        if dpos is not None:
            partials.sum_rows(dtokens.view(x.shape[0], -1), dpos)
    return tuple(x.new_empty(0) if g is None else g for g in gradients)


def _unsupported(x, weight, bias, pos) -> str | None:
    if _Sizes.of(x, weight).rows >= 2**31:
        return "x has 2^31 patches or more"
    return (
        launch.unsupported_dtype(x=x, weight=weight, bias=bias, pos=pos)
        or launch.unsupported_extent(x=x, weight=weight.unsqueeze(0))
        or launch.unsupported_extent(pos=pos if pos is None else pos.view(1, *pos.shape[-2:]))
    )


def _unsupported_backward(dtokens, x, weight, bias, pos, output_mask) -> str | None:
    if dtokens.dtype not in (x.dtype, torch.float32):
        return f"dtokens is {dtokens.dtype} beside {x.dtype} x, allowed are that and float32"
    return _unsupported(x, weight, bias, pos)


KERNELS = (
    Kernel("patch_embed", "cuda", "triton", patch_embed, _unsupported),
    Kernel("patch_embed_backward", "cuda", "triton", patch_embed_backward, _unsupported_backward),
)
