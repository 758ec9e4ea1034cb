"""attention, forward: softmax(QKᵀ·scale)V one tile of queries at a time, without the N × N matrix.

A program owns BLOCK_M queries of one head and walks over the keys, BLOCK_N at a time. It keeps the
running maximum m of each query's scores, the sum l of exp(s − m), and the unnormalised output
o = Σ exp(s − m)·v; when a larger maximum m' turns up, l and o are multiplied by exp(m − m')
(Milakov & Gimelshein 2018, Dao et al. 2022). At the end out = o / l, and lse = m + log l is kept
for the backward. Exponentials are powers of two: scale·log₂e is one factor.

Traffic: q once, out and lse once; k and v once for each tile of queries, from the L2 cache but for
the first time. qkv is read where the projection wrote it, in whatever strides.

With QK-norm or RoPE, `fastdit.kernels.qk_norm_rope` first writes normalised and rotated queries and
keys, and this kernel reads those. Doing it to keys as they are loaded repeats the work for every
tile of queries and takes their asynchronous copies away: at 72 channels on sm_80 LayerNorm alone
costs 252 registers instead of 168 and 1.8 times the instructions, with RoPE it spills.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdit.backends import Kernel
from fastdit.kernels import launch
from fastdit.kernels.attention_backward import attention_backward
from fastdit.kernels.attention_tiles import (
    Table,
    Tile,
    add_product,
    dot_rows,
    family_of,
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
from fastdit.kernels.qk_norm_rope import prepare


@triton.jit
def attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    scale_log2,
    N,
    H,
    qk_batch,
    qk_token,
    v_batch,
    v_token,
    HEAD_DIM: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNIT: tl.constexpr,
    EVEN: tl.constexpr,
    FLIP: tl.constexpr,
):
    """`*_batch` and `*_token` are strides in units of UNIT elements."""
    qk_token *= UNIT
    v_token *= UNIT
    blocks = tl.cdiv(N, BLOCK_M)
    first = tl.program_id(0) % blocks * BLOCK_M
    head = tl.program_id(0) // blocks
    batch = (head // H).to(tl.int64)
    column = head % H * HEAD_DIM
    rows, keys = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    inside = first + rows < N
    k_ptr += batch * qk_batch * UNIT + column
    v_ptr += batch * v_batch * UNIT + column
    q_ptr += batch * qk_batch * UNIT + first.to(tl.int64) * qk_token + column
    q = flipped_tile(load_tile(q_ptr, qk_token, rows, inside, HEAD_DIM, PARTS, EVEN), FLIP)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    out = zero_tile(BLOCK_M, PARTS)
    for start in range(0, N, BLOCK_N):
        present = start + keys < N
        k = load_tile(k_ptr, qk_token, keys, present, HEAD_DIM, PARTS, EVEN)
        scores = dot_rows(q, k)
        if not EVEN:
            scores = tl.where(present[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * scale_log2)
        p = tl.exp2(scores * scale_log2 - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        v = load_tile(v_ptr, v_token, keys, present, HEAD_DIM, PARTS, EVEN)
        out = add_product(scaled_tile(out, shrink[:, None]), p.to(v[0].dtype), v)
        top = new_top
        k_ptr += BLOCK_N * qk_token
        v_ptr += BLOCK_N * v_token
    out = scaled_tile(out, (1 / total)[:, None])
    width = H * HEAD_DIM
    out_ptr += (batch * N + first) * width + column
    store_tile(out_ptr, width, rows, inside, out, HEAD_DIM, PARTS, EVEN)
    lse = top * 0.6931471805599453 + tl.log(total)
    tl.store(lse_ptr + head.to(tl.int64) * N + first + rows, lse, mask=inside)


FORWARD: Table = {
    # HMMA, 16 rows a warp. 128 rows on 4 warps would halve the reads of k and v from shared memory,
    # but take 255 registers at 72 channels and spill on sm_120; on 8 warps, 186 registers leave one
    # block of 8 warps on an A100 where these leave three of 4.
    "sm_80": (Tile(80, 64, 64, 4, 3), Tile(128, 64, 32, 4, 3)),
    # 99 KiB of shared memory a block: a third stage would leave one block of 4 warps.
    "sm_86": (Tile(80, 64, 64, 4, 2), Tile(128, 64, 32, 4, 2)),
    # WGMMA: two groups of 64 rows share each tile of k and v. 128 keys take 209 registers at 72
    # channels, 64 take 140.
    "sm_90": (
        Tile(128, 64, 64, 4, 1, tokens=64),
        Tile(64, 128, 128, 8, 2),
        Tile(128, 128, 64, 8, 2),
    ),
    # UTCMMA: accumulators live in tensor memory. At 72 channels 128 keys take 208 registers (Triton
    # 3.8), 64 take 117. At 88 and 96, of two parts, ptxas keeps to 128 and spills with 64 keys.
    "sm_100": (
        Tile(128, 64, 64, 4, 1, tokens=64),
        Tile(64, 128, 128, 8, 2),
        Tile(80, 128, 64, 8, 2),
        Tile(96, 128, 32, 8, 2),
        Tile(128, 128, 64, 8, 2),
    ),
    # A second stage takes 226 registers where one takes 159, half the waves. Of 16 channels 4 warps
    # would load 64 bits a thread.
    "gfx942": (
        Tile(16, 64, 64, 2, 1),
        Tile(128, 64, 32, 4, 1, tokens=64),
        Tile(64, 128, 64, 4, 1),
        Tile(128, 128, 32, 4, 1),
    ),
}
FORWARD_FP32: Table = {
    # IEEE products are fused multiply-adds of operands in registers: 64 rows spill, and wide heads
    # on 4 warps do where keys are masked (128 channels, sm_90: 255 registers, 266 spilled).
    "sm_100": (
        Tile(64, 32, 32, 4, 2),
        Tile(80, 32, 32, 4, 2, max_registers=128),
        Tile(96, 32, 16, 8, 2, max_registers=128),
        Tile(112, 32, 16, 8, 2),
        Tile(128, 32, 16, 8, 2, max_registers=128),
    ),
    "any": (Tile(80, 32, 32, 4, 2), Tile(128, 32, 16, 8, 2, max_registers=128)),
    "gfx942": (Tile(16, 32, 32, 2, 1), Tile(128, 32, 32, 4, 1)),
}


def attention(qkv: Tensor, num_heads: int, scale: float | None, *qk_options) -> tuple:
    """out `(B, N, D)` and lse `(B, H, N)` float32, as `torch.ops.fastdit.attention`.

    Reads qkv, writes out; QK-norm and RoPE read q and k once more and write them once.
    """
    qkv = readable(qkv)
    batch, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    head_dim = width // num_heads
    out = qkv.new_empty(batch, tokens, width)
    lse = qkv.new_empty(batch, num_heads, tokens, dtype=torch.float32)
    if not lse.numel():
        return out, lse
    q, k, v = prepare(qkv, num_heads, *qk_options)
    unit = stride_unit(q, v)
    scale = head_dim**-0.5 if scale is None else scale

    def run(tile: Tile) -> None:
        attention_kernel[(triton.cdiv(tokens, tile.block_m) * batch * num_heads,)](
            q, k, v, out, lse, size_of_log2(scale), tokens, num_heads,
            q.stride(0) // unit, q.stride(2) // unit, v.stride(0) // unit, v.stride(2) // unit,
            **kernel_options(tile, tokens, head_dim, unit, scale),
        )  # fmt: skip

    with launch.on_device(qkv):
        launch_tile("attention", FORWARD, FORWARD_FP32, qkv, head_dim, run)
    return out, lse


ROPE_TOKENS: Mapping[str, int] = {
    "sm_80": 1024,
    "sm_86": 2048,
    "sm_90": 512,
    "sm_100": 512,
    "gfx942": 1024,
}
"""Up to how many tokens `auto` prefers these kernels to eager RoPE and SDPA: *modelled*.

Eager RoPE moves q and k 18 times in the forward and 28 times in the backward, these kernels 2 and 5
times; SDPA's products are assumed faster: 190 against 190 TFLOPS in the forward and 130 against 110
in the backward on A100, 326 and 300 against 180 and 150 on H100, 1200 and 800 against 500 and 350
on B200, with seven products in this backward and five in theirs. The rows are the powers of two
below the number of tokens at which both cost the same. Without RoPE there is no such saving, and
SDPA stays the choice until a GPU has measured otherwise.
"""


def unsupported(qkv: Tensor, num_heads: int, scale: float | None, *qk_options) -> str | None:
    """Why the kernels cannot run this call of `attention`, or None."""
    reason = launch.unsupported_dtype(qkv=qkv, rope=qk_options[6])
    if reason:
        return reason
    head_dim = qkv.shape[2] // (3 * num_heads)
    if not 16 <= head_dim <= 128 or head_dim % 8:
        return f"head_dim is {head_dim}, the Triton kernels take multiples of 8 from 16 to 128"
    return None


def unsupported_backward(dout, qkv, out, lse, num_heads, scale, *qk_options) -> str | None:
    """Why the kernels cannot run this call of `attention_backward`, or None."""
    return unsupported(qkv, num_heads, scale, *qk_options)


def slower(qkv: Tensor, num_heads: int, scale: float | None, *qk_options) -> str | None:
    """Why `auto` prefers scaled_dot_product_attention, or None: the table above."""
    if qk_options[6] is None:
        return "SDPA is modelled to be as fast or faster without RoPE to fuse"
    if torch.compiler.is_compiling():
        return "torch.compile is modelled to fuse RoPE as well, beside a faster SDPA"
    if qkv.dtype == torch.float32:
        return "SDPA is modelled to be faster in float32"
    family = family_of(launch.arch_of(qkv.device))
    if qkv.shape[1] > ROPE_TOKENS[family]:
        return (
            f"SDPA is modelled to be faster from {ROPE_TOKENS[family]} tokens on {family}, "
            f"got {qkv.shape[1]}"
        )
    return None


KERNELS = (
    Kernel("attention", "cuda", "triton", attention, unsupported, slower),
    Kernel("attention_backward", "cuda", "triton", attention_backward, unsupported_backward),
)
