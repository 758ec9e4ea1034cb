"""Ways to break the attention kernels, each of which the tests must notice.

`MUTATIONS` lists (file, text that occurs in it once, what to put there instead); `TESTS` the tests
that must fail.
"""

from __future__ import annotations

FORWARD = "kernels/attention.py"
BACKWARD = "kernels/attention_backward.py"
TILES = "kernels/attention_tiles.py"
PREPARE = "kernels/qk_norm_rope.py"
_NUMERICS = ("tests/kernels/test_attention_numerics.py",)
TESTS = dict.fromkeys((FORWARD, BACKWARD, TILES, PREPARE), _NUMERICS)

MUTATIONS: list[tuple[str, str, str]] = [
    # forward: softmax, mask, indices, strides, statistics
    (FORWARD, "scores * scale_log2 - new_top[:, None]", "scores * scale_log2 + new_top[:, None]"),
    (FORWARD, "shrink = tl.exp2(top - new_top)", "shrink = tl.exp2(new_top - top)"),
    (FORWARD, "total = total * shrink + tl.sum(p, 1)", "total = total + tl.sum(p, 1)"),
    (FORWARD, 'tl.where(present[None, :], scores, float("-inf"))', "scores"),
    (FORWARD, "present = start + keys < N", "present = start + keys <= N"),
    (FORWARD, "batch = (head // H).to(tl.int64)", "batch = (head // N).to(tl.int64)"),
    (FORWARD, "column = head % H * HEAD_DIM", "column = head % 2 * HEAD_DIM"),
    (FORWARD, "k_ptr += BLOCK_N * qk_token", "k_ptr += BLOCK_M * qk_token"),
    (FORWARD, "v_ptr += batch * v_batch * UNIT + column", "v_ptr += batch * v_batch + column"),
    (FORWARD, "(1 / total)[:, None]", "(1 / (total + 1))[:, None]"),
    (FORWARD, "+ tl.log(total)", "- tl.log(total)"),
    (FORWARD, "head_dim**-0.5 if scale is None else scale", "head_dim**-0.5"),
    (FORWARD, "first.to(tl.int64) * qk_token", "first * qk_batch"),
    # backward: signs, δ, lse, divisors, indices, the packed places
    (BACKWARD, "dot_rows(dout, v) - delta[:, None]", "dot_rows(dout, v) + delta[:, None]"),
    (BACKWARD, "dot_rows(v, dout) - delta[None, :]", "dot_rows(v, dout)"),
    (BACKWARD, "tl.store(delta_ptr + statistics, delta", "tl.store(delta_ptr + statistics, lse"),
    (BACKWARD, "dot_rows(k, q) * scale_log2 - lse[None, :]", "dot_rows(k, q) * scale_log2"),
    (BACKWARD, "scaled_tile(dq, scale)", "scaled_tile(dq, scale_log2)"),
    (TILES, "if FLIP:", "if False:"),
    (TILES, "max(abs(scale), LEAST_SCALE)", "abs(scale)"),
    (BACKWARD, "dk = scaled_tile(dk, scale)", "dk = scaled_tile(dk, 1.0)"),
    (BACKWARD, "inside = first + keys < N", "inside = first + keys < N - 1"),
    (BACKWARD, 'tl.where(present[None, :], scores, float("-inf"))', "scores"),
    (BACKWARD, "delta_ptr += head.to(tl.int64) * N", "delta_ptr += batch * N"),
    (BACKWARD, "dout_ptr += BLOCK_M * width", "dout_ptr += BLOCK_N * width"),
    (
        BACKWARD,
        "(batch * N + first) * (3 * width) + column\n    store_tile(dv",
        "(batch * N + first) * (2 * width) + column\n    store_tile(dv",
    ),
    (BACKWARD, "first.to(tl.int64) * v_token) * UNIT", "first.to(tl.int64) * v_token)"),
    (
        BACKWARD,
        "q, k, v, dout, lse, delta, dk, dv, *sizes",
        "q, k, v, dout, lse, delta, dv, dk, *sizes",
    ),
    # tiles: the tails of a head
    (
        TILES,
        "for i in tl.static_range(1, len(a)):\n        product",
        "for i in tl.static_range(1, 1):\n        product",
    ),
    (
        TILES,
        "elif PARTS[i][0] + PARTS[i][1] > HEAD_DIM:\n            part",
        "elif False:\n            part",
    ),
    (TILES, "mask = inside[:, None] & (at[None, :] < HEAD_DIM)", "mask = inside[:, None]"),
    # QK-norm and RoPE
    (PREPARE, "x[0] * cos[0] - x[1] * sin[0]", "x[0] * cos[0] + x[1] * sin[0]"),
    (PREPARE, "dn[0] * cos[0] + dn[1] * sin[1]", "dn[0] * cos[0] + dn[1] * sin[0]"),
    (PREPARE, "tl.where(real, a - mean, 0.0)", "a - mean"),
    (PREPARE, "g[0] - unit[0] * along", "g[0] + unit[0] * along"),
    (PREPARE, "dx = dx[0] - mean, dx[1] - mean", "dx = dx"),
    (
        PREPARE,
        "table_at = places(row, N, H, table_batch, LAYOUT[0], 1, 0)\n    tables",
        "table_at = places(row, N, H, 0, LAYOUT[0], 1, 0)\n    tables",
    ),
    (PREPARE, "sums[1][0] + dbias[0]", "sums[1][0] - dbias[0]"),
    (
        PREPARE,
        "store_sums(partial_ptr + 2 * LAYOUT[0], k_sums",
        "store_sums(partial_ptr + 2 * LAYOUT[0], q_sums",
    ),
]
