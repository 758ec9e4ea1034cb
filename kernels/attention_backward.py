"""attention, backward: dqkv in two kernels, without atomics and without the N × N matrix.

With S = QKᵀ·scale, P = exp(S − lse), recomputed a tile at a time, and δ = rowsum(dO∘O):

    dV = Pᵀ·dO        dS = P∘(dO·Vᵀ − δ)        dQ = scale·dS·K        dK = scale·dSᵀ·Q

`dq_kernel` owns a tile of queries and walks over the keys: three products a pair of tiles. It
computes δ of its rows first, from tiles it holds anyway, and leaves it for `dkv_kernel`, which owns
a tile of keys and walks over the queries: four products, of the transposed scores, so that Pᵀ and
dSᵀ enter the next product from registers as they are. Seven products where one kernel with atomics
does five; in return two runs give the same bits and nothing is cleared or converted afterwards.

Traffic: qkv, out, dout and lse once, and again for each tile of the other side from the L2 cache;
dq, dk and dv once, into one packed buffer, where autograd would concatenate three.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdit import reference
from fastdit.kernels import launch
from fastdit.kernels.attention_tiles import (
    Table,
    Tile,
    add_product,
    dot_rows,
    dot_same_rows,
    flipped_tile,
    kernel_options,
    launch_tile,
    load_tile,
    readable,
    scaled_tile,
    size_of_log2,
    store_tile,
    stride_unit,
    zero_tile,
)
from fastdit.kernels.qk_norm_rope import prepare, prepare_backward


@triton.jit
def dq_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, scale, scale_log2, N, H,
    qk_batch, qk_token, v_batch, v_token,
    HEAD_DIM: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    UNIT: tl.constexpr, EVEN: tl.constexpr, FLIP: tl.constexpr,
):  # fmt: skip
    """δ and dQ of BLOCK_M queries of one head; q's, k's and v's strides are in units of UNIT."""
    qk_token *= UNIT
    v_token *= UNIT
    blocks = tl.cdiv(N, BLOCK_M)
    first = tl.program_id(0) % blocks * BLOCK_M
    head = tl.program_id(0) // blocks
    batch, column, width = (head // H).to(tl.int64), head % H * HEAD_DIM, H * HEAD_DIM
    rows, keys = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    inside = first + rows < N
    k_ptr += batch * qk_batch * UNIT + column
    v_ptr += batch * v_batch * UNIT + column
    q_ptr += batch * qk_batch * UNIT + first.to(tl.int64) * qk_token + column
    out_at = (batch * N + first) * width + column
    statistics = head.to(tl.int64) * N + first + rows
    q = flipped_tile(load_tile(q_ptr, qk_token, rows, inside, HEAD_DIM, PARTS, EVEN), FLIP)
    dout = load_tile(dout_ptr + out_at, width, rows, inside, HEAD_DIM, PARTS, EVEN)
    out = load_tile(out_ptr + out_at, width, rows, inside, HEAD_DIM, PARTS, EVEN)
    delta = dot_same_rows(dout, out)
    tl.store(delta_ptr + statistics, delta, mask=inside)
    lse = tl.load(lse_ptr + statistics, mask=inside, other=0.0) * 1.4426950408889634
    dq = zero_tile(BLOCK_M, PARTS)
    for start in range(0, N, BLOCK_N):
        present = start + keys < N
        k = load_tile(k_ptr, qk_token, keys, present, HEAD_DIM, PARTS, EVEN)
        v = load_tile(v_ptr, v_token, keys, present, HEAD_DIM, PARTS, EVEN)
        scores = dot_rows(q, k)
        if not EVEN:  # a score of 0 could be exp(large) where all others are very negative
            scores = tl.where(present[None, :], scores, float("-inf"))
        p = tl.exp2(scores * scale_log2 - lse[:, None])
        ds = p * (dot_rows(dout, v) - delta[:, None])
        dq = add_product(dq, ds.to(k[0].dtype), k)
        k_ptr += BLOCK_N * qk_token
        v_ptr += BLOCK_N * v_token
    dq_ptr += (batch * N + first) * (3 * width) + column
    store_tile(dq_ptr, 3 * width, rows, inside, scaled_tile(dq, scale), HEAD_DIM, PARTS, EVEN)


@triton.jit
def dkv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, scale, scale_log2, N, H,
    qk_batch, qk_token, v_batch, v_token,
    HEAD_DIM: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    UNIT: tl.constexpr, EVEN: tl.constexpr, FLIP: tl.constexpr,
):  # fmt: skip
    """dK and dV of BLOCK_N keys of one head. Queries past N are rows of zeros, which add nothing;
    keys past N are rows that are not stored: neither needs a mask on the scores."""
    qk_token *= UNIT
    blocks = tl.cdiv(N, BLOCK_N)
    first = tl.program_id(0) % blocks * BLOCK_N
    head = tl.program_id(0) // blocks
    batch, column, width = (head // H).to(tl.int64), head % H * HEAD_DIM, H * HEAD_DIM
    rows, keys = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    inside = first + keys < N
    q_ptr += batch * qk_batch * UNIT + column
    k_ptr += batch * qk_batch * UNIT + first.to(tl.int64) * qk_token + column
    v_ptr += (batch * v_batch + first.to(tl.int64) * v_token) * UNIT + column
    dout_ptr += batch * N * width + column
    lse_ptr += head.to(tl.int64) * N
    delta_ptr += head.to(tl.int64) * N
    k = flipped_tile(load_tile(k_ptr, qk_token, keys, inside, HEAD_DIM, PARTS, EVEN), FLIP)
    v = load_tile(v_ptr, v_token * UNIT, keys, inside, HEAD_DIM, PARTS, EVEN)
    dk, dv = zero_tile(BLOCK_N, PARTS), zero_tile(BLOCK_N, PARTS)
    for start in range(0, N, BLOCK_M):
        present = start + rows < N
        q = load_tile(q_ptr, qk_token, rows, present, HEAD_DIM, PARTS, EVEN)
        lse = tl.load(lse_ptr + start + rows, mask=present, other=0.0) * 1.4426950408889634
        p = tl.exp2(dot_rows(k, q) * scale_log2 - lse[None, :])
        dout = load_tile(dout_ptr, width, rows, present, HEAD_DIM, PARTS, EVEN)
        dv = add_product(dv, p.to(dout[0].dtype), dout)
        delta = tl.load(delta_ptr + start + rows, mask=present, other=0.0)
        ds = p * (dot_rows(v, dout) - delta[None, :])
        dk = add_product(dk, ds.to(q[0].dtype), q)
        q_ptr += BLOCK_M * qk_token
        dout_ptr += BLOCK_M * width
    at = (batch * N + first) * (3 * width) + column
    store_tile(dv_ptr + at, 3 * width, keys, inside, dv, HEAD_DIM, PARTS, EVEN)
    dk = scaled_tile(dk, scale)
    store_tile(dk_ptr + at, 3 * width, keys, inside, dk, HEAD_DIM, PARTS, EVEN)


DQ: Table = {
    # HMMA: 64 keys would take 248 registers at 72 channels, 32 take 168 and leave 12 warps.
    "sm_80": (Tile(128, 64, 32, 4, 2),),
    "sm_86": (Tile(120, 64, 32, 4, 2), Tile(128, 64, 32, 4, 2, max_registers=192)),
    "sm_90": (Tile(128, 64, 64, 4, 2, tokens=64), Tile(128, 128, 64, 8, 2)),
    # 104 and 112 channels are three parts: with 64 keys 576 columns of tensor memory, of 512.
    "sm_100": (
        Tile(128, 64, 64, 4, 2, tokens=64),
        Tile(32, 128, 64, 8, 2),
        Tile(40, 128, 64, 8, 2, max_registers=144),
        Tile(96, 128, 64, 8, 2),
        Tile(112, 128, 32, 8, 2),
        Tile(128, 128, 64, 8, 2),
    ),
    "gfx942": (Tile(16, 64, 64, 2, 1), Tile(128, 64, 32, 4, 1)),
}
DKV: Table = {
    # k and v stay in registers beside two accumulators: with 32 queries a tile, 72 channels take
    # 255 registers and spill on sm_120; with 16, 168 and leave 12 warps where 255 leave 8.
    "sm_80": (Tile(64, 32, 64, 4, 2), Tile(112, 16, 64, 4, 2), Tile(128, 64, 64, 8, 2)),
    "sm_86": (
        Tile(16, 32, 64, 4, 2, max_registers=96),
        Tile(64, 32, 64, 4, 2),
        Tile(96, 16, 64, 4, 2),
        Tile(112, 16, 32, 4, 2),
        Tile(128, 64, 64, 8, 2),
    ),
    # WGMMA takes k and v from shared memory: 242 registers at 72 channels, spills at 128 only.
    "sm_90": (
        Tile(128, 32, 64, 4, 2, tokens=64),
        Tile(80, 64, 128, 8, 2),
        Tile(128, 32, 128, 8, 2),
    ),
    # A second stage spills from 72 channels on: it is loaded through registers.
    "sm_100": (
        Tile(128, 64, 64, 4, 1, tokens=64),
        Tile(64, 64, 128, 8, 2),
        Tile(128, 64, 128, 8, 1),
    ),
    "gfx942": (Tile(16, 64, 64, 2, 1), Tile(128, 32, 64, 4, 1)),
}
DQ_FP32: Table = {
    "sm_80": (
        Tile(64, 32, 16, 4, 2),
        Tile(80, 32, 16, 8, 2, max_registers=80),
        Tile(128, 32, 16, 4, 2),
    ),
    "any": (Tile(128, 32, 16, 4, 2),),
    "gfx942": (Tile(16, 32, 16, 2, 1), Tile(128, 32, 16, 4, 1)),
}
DKV_FP32: Table = {
    # 104 channels on 4 warps take 255 registers and spill, on 8 at most 122. 32 channels on 8 warps
    # would load 64 bits a thread. Unlimited, ptxas keeps the limited rows to 80 and spills.
    "sm_80": (
        Tile(32, 16, 32, 4, 2),
        Tile(64, 16, 32, 8, 2),
        Tile(72, 16, 32, 8, 2, max_registers=128),
        Tile(112, 16, 32, 8, 2),
        Tile(128, 16, 32, 8, 2, max_registers=128),
    ),
    "sm_90": (
        Tile(32, 16, 32, 4, 2),
        Tile(48, 16, 32, 8, 2, max_registers=128),
        Tile(112, 16, 32, 8, 2),
        Tile(128, 16, 32, 4, 2),
    ),
    "any": (Tile(32, 16, 32, 4, 2), Tile(128, 16, 32, 8, 2)),
    "gfx942": (Tile(16, 16, 32, 2, 1), Tile(128, 16, 32, 4, 1)),
}


def attention_backward(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, num_heads: int, scale: float | None,
    *qk_options,
) -> tuple[Tensor, ...]:  # fmt: skip
    """dqkv and the gradients of QK-norm's parameters, as `torch.ops.fastdit.attention_backward`.

    Reads qkv, out, dout and lse, writes dqkv; QK-norm and RoPE write their q and k once more (they
    are not kept from the forward) and read and write dq and dk.
    """
    qkv = readable(qkv)
    batch, tokens, width = out.shape
    dqkv = qkv.new_empty(batch, tokens, 3 * width)
    if not lse.numel():
        zeros = (qkv.new_empty(0) if p is None else torch.zeros_like(p) for p in qk_options[:4])
        return dqkv, *zeros
    q, k, v = prepare(qkv, num_heads, *qk_options)
    dq, dk, dv = reference.split_heads(dqkv, num_heads)
    delta = torch.empty_like(lse)
    head_dim = width // num_heads
    scale = head_dim**-0.5 if scale is None else scale
    unit = stride_unit(q, v)
    sizes = (
        *(scale, size_of_log2(scale), tokens, num_heads),
        *(stride // unit for h in (q, v) for stride in (h.stride(0), h.stride(2))),
    )
    dout, out = dout.contiguous(), out.contiguous()

    def run_dq(tile: Tile) -> None:
        dq_kernel[(triton.cdiv(tokens, tile.block_m) * batch * num_heads,)](
            q, k, v, out, dout, lse, delta, dq, *sizes,
            **kernel_options(tile, tokens, head_dim, unit, scale),
        )  # fmt: skip

    def run_dkv(tile: Tile) -> None:
        dkv_kernel[(triton.cdiv(tokens, tile.block_n) * batch * num_heads,)](
            q, k, v, dout, lse, delta, dk, dv, *sizes,
            **kernel_options(tile, tokens, head_dim, unit, scale),
        )  # fmt: skip

    with launch.on_device(qkv):
        launch_tile("attention_backward_dq", DQ, DQ_FP32, qkv, head_dim, run_dq)
        launch_tile("attention_backward_dkv", DKV, DKV_FP32, qkv, head_dim, run_dkv)
    if qk_options[4] is None and qk_options[6] is None:
        return dqkv, *(qkv.new_empty(0) for _ in range(4))
    return dqkv, *prepare_backward(dqkv, qkv, num_heads, *qk_options)
