"""gated_residual: two reads, one write.

    h = x + gate·y

A program adds one row. Backward: dy = gate·dout and dgate = Σ dout·y over a sample's tokens, in one
pass over dout and y; dx is dout itself. Programs and their sums as in `slot_sums`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastdit.backends import Kernel
from fastdit.kernels import rows, slot_sums
from fastdit.kernels.launch import on_device, result
from fastdit.kernels.rows import Tile, gated_sum, load, load_view, store, zeros
from fastdit.kernels.slot_sums import store_partial

BACKWARD = rows.Backward(columns=12, half=64, full=64)


@triton.jit(do_not_specialize=["tokens"])
def gated_residual_kernel(
    x_ptr, y_ptr, gate, h_ptr, tokens, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr
):
    row = tl.program_id(0)
    sample, token = row // tokens, row % tokens
    start = row.to(tl.int64) * D
    main = gated_sum(x_ptr + start, y_ptr + start, gate, sample, token, 0, MAIN, D)
    tail = gated_sum(x_ptr + start, y_ptr + start, gate, sample, token, MAIN, TAIL, D)
    store(h_ptr + start, main, 0, MAIN, D)
    store(h_ptr + start, tail, MAIN, TAIL, D)


@triton.jit(do_not_specialize=["tokens", "slots"])
def gated_residual_backward_kernel(
    dout_ptr, y_ptr, gate, dy_ptr, token_dgate_ptr, dgate_ptr, tokens, slots,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    sample, slot = tl.program_id(0) // slots, tl.program_id(0) % slots
    gate_main = load_view(gate, sample, slot, 0, MAIN, D)
    gate_tail = load_view(gate, sample, slot, MAIN, TAIL, D)
    dgate_main, dgate_tail = zeros(MAIN), zeros(TAIL)
    for token in range(slot, tokens, slots):
        start = (sample * tokens + token).to(tl.int64) * D
        dout_main = load(dout_ptr + start, 0, MAIN, D)
        dout_tail = load(dout_ptr + start, MAIN, TAIL, D)
        y_main, y_tail = load(y_ptr + start, 0, MAIN, D), load(y_ptr + start, MAIN, TAIL, D)
        if token_dgate_ptr is not None:
            gate_main = load_view(gate, sample, token, 0, MAIN, D)
            gate_tail = load_view(gate, sample, token, MAIN, TAIL, D)
            store(token_dgate_ptr + start, dout_main * y_main, 0, MAIN, D)
            store(token_dgate_ptr + start, dout_tail * y_tail, MAIN, TAIL, D)
        else:
            dgate_main += dout_main * y_main
            dgate_tail += dout_tail * y_tail
        store(dy_ptr + start, gate_main * dout_main, 0, MAIN, D)
        store(dy_ptr + start, gate_tail * dout_tail, MAIN, TAIL, D)
    store_partial(dgate_ptr, dgate_main, dgate_tail, D, MAIN, TAIL)


def gated_residual(x, y, gate, out=None) -> Tensor:
    """Reads x and y, writes h, to `out` if it is given; non-contiguous x and y are copied first."""
    x, y = x.contiguous(), y.contiguous()
    h = result(x, out)
    if x.numel() == 0:
        return h

    def run(tile: Tile) -> None:
        gated_residual_kernel[(x.shape[0] * x.shape[1],)](
            x, y, rows.view(gate), h, x.shape[1], x.shape[2], tile.main, tile.tail,
            **tile.options,
        )  # fmt: skip

    with on_device(x):
        rows.launch("gated_residual", x, rows.forward_tile(x), run)
    return h


def gated_residual_backward(dout, y, gate) -> tuple[Tensor, Tensor]:
    """Reads dout and y, writes dy, and dgate."""
    dout, y = dout.contiguous(), y.contiguous()
    dy, dgate = y.new_empty(y.shape), gate.new_empty(gate.shape)
    if y.numel() == 0:
        return dy, dgate.zero_()
    per_token = gate.dim() == 3

    def run(tile: Tile) -> None:
        slots = slot_sums.slots_for(y, tile)
        partials = slot_sums.Partials.empty(y, slots, dgate=not per_token)
        gated_residual_backward_kernel[(y.shape[0] * slots,)](
            dout, y, rows.view(gate), dy, dgate if per_token else None, partials.dgate, y.shape[1],
            slots, y.shape[2], tile.main, tile.tail, **tile.options,
        )  # fmt: skip
        slot_sums.finish(partials, dgate=dgate)

    with on_device(y):
        rows.launch("gated_residual_backward", y, rows.backward_tile(y, BACKWARD), run, per_token)
    return dy, dgate


def _unsupported(x, y, gate):
    return rows.unsupported(x, y=y, gate=gate)


KERNELS = (
    Kernel("gated_residual", "cuda", "triton", gated_residual, _unsupported, takes_out=True),
    Kernel("gated_residual_backward", "cuda", "triton", gated_residual_backward, _unsupported),
)
