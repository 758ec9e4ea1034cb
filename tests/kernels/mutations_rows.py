"""Ways to break the row-wise kernels, each of which the tests must notice.

`(file, old, new)`: replace the first `old` in the file by `new`.
"""

from __future__ import annotations

ROWS, GRADIENTS, SUMS = (f"kernels/{name}.py" for name in ("rows", "row_gradients", "slot_sums"))
ADALN, GATED, RESIDUAL = (f"kernels/{n}.py" for n in ("adaln", "gated_adaln", "gated_residual"))

_SHARED = [  # of all three
    (ROWS, "row_ptr + column, mask=column < D", "row_ptr + column, mask=column <= D"),
    (ROWS, "rounded, mask=column < D", "rounded, mask=column <= D"),
    (ROWS, "sample.to(tl.int64) * view[1]", "token.to(tl.int64) * view[1]"),
    (ROWS, "tl.cast(token, tl.int64) * view[2]", "tl.cast(sample, tl.int64) * view[2]"),
    (ROWS, "column.to(tl.int64) * view[3]", "column.to(tl.int64)"),
    (ROWS, "return modulation, sample, None, column", "return modulation, column, None, sample"),
    (ROWS, "MAIN // TAIL)), 1) + tail", "MAIN // TAIL)), 1)"),
    (ROWS, "MAIN // TAIL)), 1) + tail", "MAIN // TAIL)), 1) - tail"),
    (ROWS, "if main < 16 * lanes and tail:", "if False:"),  # 128-bit loads at width 384
]
_NORMALISE = [  # of the forward of adaln and gated_adaln
    (
        ROWS,
        "MAIN, TAIL), 0) / D\n        main = inside",
        "MAIN, TAIL), 0) / MAIN\n        main = inside",
    ),
    (ROWS, "main = inside(main - mean", "main = inside(main + mean"),
    (ROWS, "main = inside(main - mean, 0, MAIN, D)", "main = main - mean"),
    (ROWS, "tail = inside(tail - mean, MAIN, TAIL, D)", "tail = tail - mean"),
    (ROWS, "if LAYER and FULL:", "if False:"),
    (ROWS, "squares / D - missed * missed", "squares / D + missed"),
    (ROWS, "tail - missed, mean + missed", "tail - missed, mean"),
    (ROWS, "tail * tail, MAIN, TAIL), 0) / D", "tail * tail, MAIN, TAIL), 0) / (D - 1)"),
    (ROWS, "rsqrt(variance + eps)", "rsqrt(variance)"),
    (ROWS, "factor + 1.0 if PLUS_ONE else factor", "factor if PLUS_ONE else factor"),
    (ROWS, "factor + 1.0 if PLUS_ONE else factor", "factor + 1.0"),
    (ROWS, "part += load(bias_ptr", "part -= load(bias_ptr"),
    (ROWS, "part += load_view(shift", "part -= load_view(shift"),
]
_ADALN = [
    (ADALN, "row // tokens, row % tokens", "row % tokens, row // tokens"),
    (ADALN, "x_ptr + row.to(tl.int64) * D", "x_ptr + row * D"),  # 2^31 elements
    (ADALN, "out_ptr + row.to(tl.int64) * D", "out_ptr + sample.to(tl.int64) * D"),
    (ADALN, "load(x_row, MAIN, TAIL, D)", "load(x_row, 0, TAIL, D)"),
    (ROWS, "token, MAIN, TAIL, D, PLUS_ONE", "token, MAIN, TAIL, D, not PLUS_ONE"),
    (ADALN, "x = x.contiguous()", "x = x"),
    (ADALN, "x.shape[1], eps", "x.shape[0], eps"),
]
_GATED = [
    (GATED, "row // tokens, row % tokens", "row % tokens, row // tokens"),
    (GATED, "row.to(tl.int64) * D", "row * D"),
    (
        GATED,
        "gated_sum(x_row, y_row, gate, sample, token, MAIN",
        "gated_sum(x_row, x_row, gate, sample, token, MAIN",
    ),
    (GATED, "store(h_row, tail, MAIN, TAIL, D)", "store(h_row, tail, 0, TAIL, D)"),
    (GATED, "x, y = x.contiguous(), y.contiguous()", "x, y = x.contiguous(), y"),
    (ROWS, "sum = x + load_view(gate", "sum = x - load_view(gate"),
    (ROWS, "sum.to(x_row.dtype.element_ty).to(tl.float32)", "sum"),  # normalises an unrounded h
    (GATED, "h_ptr + start, out_ptr + start", "out_ptr + start, h_ptr + start"),
]
_RESIDUAL = [
    (RESIDUAL, "row // tokens, row % tokens", "row % tokens, row // tokens"),
    (RESIDUAL, "row.to(tl.int64) * D", "row * D"),
    (
        RESIDUAL,
        "store(h_ptr + start, tail, MAIN, TAIL, D)",
        "store(h_ptr + start, tail, 0, TAIL, D)",
    ),
    (
        RESIDUAL,
        "x_ptr + start, y_ptr + start, gate, sample, token, MAIN",
        "x_ptr + start, y_ptr, gate, sample, token, MAIN",
    ),
    (RESIDUAL, "range(slot, tokens, slots)", "range(0, tokens, slots)"),
    (RESIDUAL, "(sample * tokens + token).to(tl.int64) * D", "(sample + token).to(tl.int64) * D"),
    (RESIDUAL, "dgate_main += dout_main * y_main", "dgate_main = dout_main * y_main"),
    (RESIDUAL, "gate_tail * dout_tail, MAIN", "gate_tail + dout_tail, MAIN"),
    (
        RESIDUAL,
        "gate_main = load_view(gate, sample, token, 0",
        "gate_main = load_view(gate, sample, slot, 0",
    ),
    (RESIDUAL, "dout_main * y_main, 0, MAIN", "dout_main * gate_main, 0, MAIN"),
    (RESIDUAL, "dgate.zero_()", "dgate + float('nan')"),
]
_BACKWARD = [  # of adaln and gated_adaln
    (GRADIENTS, "level / D, g_tail - level / D", "level / MAIN, g_tail - level / MAIN"),
    (GRADIENTS, "along /= D", "along /= D - 1"),
    (GRADIENTS, "unit_main * along) * rstd", "unit_main + along) * rstd"),
    (
        GRADIENTS,
        "(load(x_ptr + start, 0, MAIN, D) - mean)",
        "(load(x_ptr + start, 0, MAIN, D) + mean)",
    ),
    (GRADIENTS, "            factor += 1.0", "            factor -= 1.0"),
    (GRADIENTS, "factor *= load(weight_ptr", "factor += load(weight_ptr"),
    (GRADIENTS, "normed *= load(weight_ptr", "normed += load(weight_ptr"),
    (GRADIENTS, "normed += load(bias_ptr", "normed -= load(bias_ptr"),
    (GRADIENTS, "range(slot, tokens, slots)", "range(slot, tokens - 1, slots)"),
    (GRADIENTS, "row = sample * tokens + token", "row = sample * slots + token"),
    (GRADIENTS, "start = row.to(tl.int64) * D", "start = row * D"),
    (GRADIENTS, "v_main + du_main * unit_main", "v_main + du_main"),
    (GRADIENTS, "u_tail + du_tail", "u_tail - du_tail"),
    (GRADIENTS, "dshift_main + dout_main", "dshift_main + du_main"),
    (GRADIENTS, "dx_tail + dh_tail", "dx_tail"),
    (
        GRADIENTS,
        "gate_main * dx_main, gate_tail * dx_tail",
        "gate_main * dx_main, gate_tail + dx_tail",
    ),
    (GRADIENTS, "dgate_tail += dx_tail * y_tail", "dgate_tail += dx_tail"),
    (
        GRADIENTS,
        "store(token_dgate_ptr + start, dx_main * y_main",
        "store(token_dgate_ptr + start, dy_main * y_main",
    ),
    (
        GRADIENTS,
        "dy_tail *= load_view(gate, sample, token",
        "dy_tail *= load_view(gate, sample, slot",
    ),
    (GRADIENTS, "du_tail *= factor(scale, None", "du_tail *= factor(scale, weight_ptr"),
    (GRADIENTS, "dout, x = dout.contiguous(), x.contiguous()", "dout, x = dout.contiguous(), x"),
]
_SUMS = [
    (SUMS, "mask=(slot < slots) &", "mask=(slot <= slots) &"),
    (SUMS, "range(0, slots, SLOTS)", "range(0, SLOTS, SLOTS)"),
    (SUMS, "sample.to(tl.int64) * slots + slot", "sample.to(tl.int64) + slot"),
    (SUMS, "dscale *= tl.load(weight_ptr", "dscale += tl.load(weight_ptr"),
    (SUMS, "dscale += u * tl.load(bias_ptr", "dscale += v * tl.load(bias_ptr"),
    (SUMS, "                m += 1.0", "                m += 0.0"),
    (SUMS, "dbias_ptr + at, m * u", "dbias_ptr + at, u"),
    (SUMS, "% blocks * COLUMNS", "% blocks"),
    (SUMS, "t.sum(0)", "t.mean(0)"),
]
MUTATIONS: list[tuple[str, str, str]] = [
    *_SHARED, *_NORMALISE, *_ADALN, *_GATED, *_RESIDUAL, *_BACKWARD, *_SUMS,
]  # fmt: skip

_TESTS = tuple(f"tests/kernels/test_row_{name}.py" for name in ("numerics", "ops", "compiled"))
TESTS = dict.fromkeys((ROWS, GRADIENTS, SUMS, ADALN, GATED, RESIDUAL), _TESTS)
