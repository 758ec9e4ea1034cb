"""patch_embed: gather patches, project them, add bias and positions, write each token once.

    tokens[m, d] = Σ_k patches[m, k]·weight[d, k] + bias[d] + pos[m mod T, d]

m runs over batch and tokens, k over (channel, row, column) of a patch: K = C·p·q is 16 for a DiT/2.
Patches are never materialised: an element's address follows from m and k, in any strides of x.

A program gathers the patches of BLOCK_M tokens once and walks over D, so the latents cross the bus
once and the tokens once; weight and positions come from the L2 cache. Products of float32 are IEEE
float32, those of 16 bits run on tensor cores.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdit.backends import Kernel
from fastdit.kernels import launch, tuning
from fastdit.kernels.patch_embed_backward import patch_embed_backward
from fastdit.kernels.patch_tiles import Sizes, Tile, load_tile, patch_addresses, product

# By bytes of the products' operands. 32 × 64 sums are 16 registers a thread; 128 columns double the
# kernel's registers and halve its occupancy. In float32, where a product keeps whole operands in
# registers, a depth of 64 spills. 32 tokens keep Hopper on mma.sync at a DiT/2's depth of 16, where
# warp-group products would pass the few operands through shared memory. 512 programs make each
# gather its patches once at 16384 tokens, and twice, from the L2 cache, at 8192.
FORWARD = {2: Tile(32, 64, 64, 4, programs=512), 4: Tile(32, 64, 16, 4, programs=512)}
# Patches of more elements than a tile is deep are gathered a part at a time. 64 of them take 126
# registers where 32 take 80 to 102, and spill one on sm_100 (Triton 3.8).
DEEP = {2: Tile(32, 64, 32, 4, programs=512), 4: FORWARD[4]}
FORWARD_CANDIDATES = [
    Tile(tokens, 64, 16, 4, programs) for tokens in (32, 64) for programs in (256, 512, 1024)
]


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


def patch_embed(x: Tensor, weight: Tensor, bias: Tensor | None, pos: Tensor | None) -> Tensor:
    """The schema op's forward: reads x, writes the tokens."""
    sizes = Sizes.of(x, weight)
    dtype = x.dtype if pos is None else torch.promote_types(x.dtype, pos.dtype)
    out = torch.empty((x.shape[0], sizes.tokens, sizes.width), dtype=dtype, device=x.device)
    if out.numel() == 0:
        return out
    dense = [None if t is None else t.contiguous() for t in (weight, bias, pos)]

    def run(tile: Tile) -> None:
        block_m, block_n, _ = sizes.blocks(tile)
        row_blocks = triton.cdiv(sizes.rows, block_m)
        splits = min(triton.cdiv(sizes.width, block_n), triton.cdiv(tile.programs, row_blocks))
        forward_kernel[(row_blocks, splits)](
            x, *dense, out, *sizes.arguments(x, tile), num_warps=tile.num_warps
        )

    with launch.on_device(x):
        default = FORWARD[x.element_size()]
        if sizes.depth > default.depth:
            default = DEEP[x.element_size()]
        key = sizes.key(x, out)
        run(tuning.choose("patch_embed", key, default, FORWARD_CANDIDATES, run))
    return out


def _unsupported(x, weight, bias, pos) -> str | None:
    if Sizes.of(x, weight).rows >= 2**31:
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
