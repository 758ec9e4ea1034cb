"""gated_adaln: the end of one branch and the start of the next in one pass.

    h = x + gate·y,    out = LN(h)·(1 + scale) + shift

As `adaln`, after a gated addition that leaves the row in registers. h is rounded to x's dtype once,
where it is stored, and it is this rounded h that is normalised: the next block reads no other.
Bytes: x and y in, h and out out, 8 a row for the statistics.

The backward is `row_gradients`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastdit.backends import Kernel
from fastdit.kernels import rows
from fastdit.kernels.launch import on_device, result
from fastdit.kernels.row_gradients import row_gradients
from fastdit.kernels.rows import Tile, gated_sum, normalise, store, store_modulated_row


@triton.jit(do_not_specialize=["tokens"])
def gated_adaln_kernel(
    x_ptr, y_ptr, gate, shift, scale, weight_ptr, bias_ptr, h_ptr, out_ptr, mean_ptr, rstd_ptr,
    tokens, eps, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    LAYER: tl.constexpr, PLUS_ONE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    sample, token = row // tokens, row % tokens
    start = row.to(tl.int64) * D
    x_row, y_row, h_row, out_row = x_ptr + start, y_ptr + start, h_ptr + start, out_ptr + start
    main = gated_sum(x_row, y_row, gate, sample, token, 0, MAIN, D)
    tail = gated_sum(x_row, y_row, gate, sample, token, MAIN, TAIL, D)
    store(h_row, main, 0, MAIN, D)
    store(h_row, tail, MAIN, TAIL, D)
    full: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
    main, tail = normalise(main, tail, mean_ptr, rstd_ptr, row, eps, D, MAIN, TAIL, LAYER, full)
    store_modulated_row(
        out_row, main, tail, shift, scale, weight_ptr, bias_ptr, sample, token,
        D, MAIN, TAIL, PLUS_ONE,
    )  # fmt: skip


def gated_adaln(
    x, y, gate, shift, scale, weight, bias, eps, norm, plus_one, out=(None, None)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Reads x and y, writes h and out, given ones or its own, mean and rstd; non-contiguous x and y
    are copied first."""
    x, y = x.contiguous(), y.contiguous()
    h, out = (result(x, given) for given in out)
    mean, rstd = rows.empty_statistics(x, norm)
    if x.numel() == 0:
        return h, out, mean, rstd

    def run(tile: Tile) -> None:
        gated_adaln_kernel[(x.shape[0] * x.shape[1],)](
            x, y, rows.view(gate), rows.view(shift), rows.view(scale), weight, bias, h, out, mean,
            rstd, x.shape[1], eps, x.shape[2], tile.main, tile.tail, norm == "layer", plus_one,
            **tile.options,
        )  # fmt: skip

    with on_device(x):
        rows.launch("gated_adaln", x, rows.forward_tile(x), run, norm)
    return h, out, mean, rstd


def gated_adaln_backward(
    dh, dout, h, mean, rstd, y, gate, shift, scale, weight, bias, norm, plus_one
):
    """Reads dh, dout, h and y, writes dx and dy, and the gradients of gate and modulation."""
    return row_gradients(
        dout, h, mean, rstd, shift, scale, weight, bias, norm, plus_one, dh=dh, y=y, gate=gate
    )


def _unsupported(x, y, gate, shift, scale, weight, bias, *_options):
    return rows.unsupported(x, y=y, gate=gate, shift=shift, scale=scale, weight=weight, bias=bias)


def _unsupported_backward(_dh, _dout, h, _mean, _rstd, *rest):
    return _unsupported(h, *rest)


KERNELS = (
    Kernel("gated_adaln", "cuda", "triton", gated_adaln, _unsupported, takes_out=True),
    Kernel("gated_adaln_backward", "cuda", "triton", gated_adaln_backward, _unsupported_backward),
)
