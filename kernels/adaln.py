"""adaln: one read of x, one write of the result.

    out = LN(x)·(1 + scale) + shift

A program keeps one row in registers from the load to the store (see `rows`): its mean, then the
mean square of the centred row, both in float32, then the modulation and one rounding. Bytes: x in,
out out, 8 a row for the statistics; shift and scale come from the cache, which all rows of a
sample share.

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
from fastdit.kernels.rows import Tile, load, normalise, store_modulated_row


@triton.jit(do_not_specialize=["tokens"])
def adaln_kernel(
    x_ptr, shift, scale, weight_ptr, bias_ptr, out_ptr, mean_ptr, rstd_ptr, tokens, eps,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    LAYER: tl.constexpr, PLUS_ONE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    sample, token = row // tokens, row % tokens
    x_row, out_row = x_ptr + row.to(tl.int64) * D, out_ptr + row.to(tl.int64) * D
    main, tail = load(x_row, 0, MAIN, D), load(x_row, MAIN, TAIL, D)
    full: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
    main, tail = normalise(main, tail, mean_ptr, rstd_ptr, row, eps, D, MAIN, TAIL, LAYER, full)
    store_modulated_row(
        out_row, main, tail, shift, scale, weight_ptr, bias_ptr, sample, token,
        D, MAIN, TAIL, PLUS_ONE,
    )  # fmt: skip


def adaln(
    x, shift, scale, weight, bias, eps, norm, plus_one, out=None
) -> tuple[Tensor, Tensor, Tensor]:
    """Reads x, writes out, a given one or its own, mean and rstd; a non-contiguous x is copied
    first."""
    x = x.contiguous()
    out = result(x, out)
    mean, rstd = rows.empty_statistics(x, norm)
    if x.numel() == 0:
        return out, mean, rstd

    def run(tile: Tile) -> None:
        adaln_kernel[(x.shape[0] * x.shape[1],)](
            x, rows.view(shift), rows.view(scale), weight, bias, out, mean, rstd, x.shape[1], eps,
            x.shape[2], tile.main, tile.tail, norm == "layer", plus_one, **tile.options,
        )  # fmt: skip

    with on_device(x):
        rows.launch("adaln", x, rows.forward_tile(x), run, norm)
    return out, mean, rstd


def adaln_backward(dout, x, mean, rstd, shift, scale, weight, bias, norm, plus_one):
    """Reads dout and x, writes dx, and the gradients of what modulated x."""
    dx, _dy, _dgate, *gradients = row_gradients(
        dout, x, mean, rstd, shift, scale, weight, bias, norm, plus_one
    )
    return dx, *gradients


def _unsupported(x, shift, scale, weight, bias, *_options):
    return rows.unsupported(x, shift=shift, scale=scale, weight=weight, bias=bias)


def _unsupported_backward(_dout, x, _mean, _rstd, *rest):
    return _unsupported(x, *rest)


KERNELS = (
    Kernel("adaln", "cuda", "triton", adaln, _unsupported, takes_out=True),
    Kernel("adaln_backward", "cuda", "triton", adaln_backward, _unsupported_backward),
)
