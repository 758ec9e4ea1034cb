"""Sums over a sample's tokens: a partial sum of each program, then one kernel that adds them up.

The backward kernels give every sample `slots` programs. Each leaves its float32 sums in its row of
an array (B, slots, D), and `finish_kernel` adds the rows in an order that depends on the shape
alone: no atomics, the same bits in every run and on every GPU. Bytes: 8·B·slots·D for each sum,
which were written just before and come from the second-level cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdit.kernels.rows import Tile, store, view


@dataclass(frozen=True)
class SlotTable:
    """How many programs share a sample's tokens.

    2048 warps are 14 to 19 for each of 108 to 148 multiprocessors: about as many as the registers
    of the backward kernels let be resident at once, and enough to keep loads of 16 KiB in flight
    on each: a thread loads 16 bytes of a row. With fewer than 8 rows for each program the sums
    would outweigh the rows. Constants, not the GPU's, so that every GPU sums in one order.
    """

    warps: int = 2048
    least_rows: int = 8


@dataclass(frozen=True)
class FinishTable:
    """A program of `finish_kernel` adds up blocks of `elements`, at most `slots` rows at a time.

    With 2048 slots, the most, 64 rows at a time take 32 rounds; a round of 32 columns still reads
    128 bytes of each row.
    """

    elements: int = 2048
    slots: int = 64
    columns: int = 128
    num_warps: int = 4


SLOTS, FINISH = SlotTable(), FinishTable()


@dataclass(frozen=True)
class Partials:
    """Float32 sums (B, slots, D) as `row_gradients` names them; None where nothing needs them."""

    u: Tensor | None = None
    v: Tensor | None = None
    dshift: Tensor | None = None
    dgate: Tensor | None = None

    @staticmethod
    def empty(x: Tensor, slots: int, **wanted: bool) -> Partials:
        names = [name for name, want in wanted.items() if want]
        shape = (len(names), x.shape[0], slots, x.shape[2])
        sums = torch.empty(shape, dtype=torch.float32, device=x.device).unbind(0)
        return Partials(**dict(zip(names, sums, strict=True)))

    def first(self) -> Tensor | None:
        """Any of the sums, for the shape and device that they share; None if nothing is summed."""
        sums = (self.u, self.v, self.dshift, self.dgate)
        return next((t for t in sums if t is not None), None)


def slots_for(x: Tensor, tile: Tile) -> int:
    """Programs for one sample of `x` (B, N, D)."""
    wanted = triton.cdiv(max(1, SLOTS.warps // tile.num_warps), x.shape[0])
    return min(wanted, triton.cdiv(x.shape[1], SLOTS.least_rows))


@triton.jit
def store_partial(ptr, main, tail, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    """Write a program's sum to its row, where one is wanted."""
    if ptr is not None:
        row_ptr = ptr + tl.program_id(0).to(tl.int64) * D
        store(row_ptr, main, 0, MAIN, D)
        store(row_ptr, tail, MAIN, TAIL, D)


@triton.jit
def sum_slots(
    ptr, sample, column, slots, D: tl.constexpr, SLOTS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Σ over the slots of a sample's partial sums, always in the same order."""
    total = tl.zeros((SLOTS, COLUMNS), tl.float32)
    for first in range(0, slots, SLOTS):
        slot = first + tl.arange(0, SLOTS)[:, None]
        at = (sample.to(tl.int64) * slots + slot) * D + column[None, :]
        total += tl.load(ptr + at, mask=(slot < slots) & (column[None, :] < D), other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["slots"])
def finish_kernel(
    u_ptr, v_ptr, dshift_sums_ptr, dgate_sums_ptr, scale, weight_ptr, bias_ptr,
    dshift_ptr, dscale_ptr, dgate_ptr, dweight_ptr, dbias_ptr, slots,
    D: tl.constexpr, SLOTS: tl.constexpr, COLUMNS: tl.constexpr, PLUS_ONE: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    sample = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < D
    at = sample.to(tl.int64) * D + column
    u, v = 0.0, 0.0
    if u_ptr is not None:
        u = sum_slots(u_ptr, sample, column, slots, D, SLOTS, COLUMNS)
    if v_ptr is not None:
        v = sum_slots(v_ptr, sample, column, slots, D, SLOTS, COLUMNS)
    if dshift_ptr is not None:
        dshift = u
        if dshift_sums_ptr is not None:
            dshift = sum_slots(dshift_sums_ptr, sample, column, slots, D, SLOTS, COLUMNS)
        tl.store(dshift_ptr + at, dshift.to(dshift_ptr.dtype.element_ty), mask=inside)
    if dscale_ptr is not None:
        dscale = v
        if weight_ptr is not None:
            dscale *= tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            dscale += u * tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(dscale_ptr + at, dscale.to(dscale_ptr.dtype.element_ty), mask=inside)
    if dgate_ptr is not None:
        dgate = sum_slots(dgate_sums_ptr, sample, column, slots, D, SLOTS, COLUMNS)
        tl.store(dgate_ptr + at, dgate.to(dgate_ptr.dtype.element_ty), mask=inside)
    if dweight_ptr is not None:
        m = 1.0
        if scale is not None:
            where = scale[0] + sample.to(tl.int64) * scale[1] + column.to(tl.int64) * scale[3]
            m = tl.load(where, mask=inside, other=0.0).to(tl.float32)
            if PLUS_ONE:
                m += 1.0
        tl.store(dweight_ptr + at, m * v, mask=inside)
        if dbias_ptr is not None:
            tl.store(dbias_ptr + at, m * u, mask=inside)


def finish(
    partials: Partials, *, scale=None, weight=None, bias=None, plus_one=True,
    dshift=None, dscale=None, dgate=None,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Fill in the per-sample gradients; return those of weight and bias, None where absent.

    `scale` is per sample, or None. Reads the partial sums once; call it on their device.
    """
    first = partials.first()
    if first is None:
        return None, None
    batch, slots, width = first.shape
    dweight, dbias = (
        None if t is None else t.new_empty((batch, width), dtype=torch.float32)
        for t in (weight, bias)
    )
    rows = min(FINISH.slots, triton.next_power_of_2(slots))
    columns = min(FINISH.columns, FINISH.elements // rows)
    finish_kernel[(batch * triton.cdiv(width, columns),)](
        partials.u, partials.v, partials.dshift, partials.dgate, view(scale), weight, bias,
        dshift, dscale, dgate, dweight, dbias, slots, width, rows, columns, plus_one,
        num_warps=FINISH.num_warps,
    )  # fmt: skip
    # Over samples PyTorch's own sum, which is deterministic; only affine norms come here.
    return tuple(
        None if t is None else t.sum(0).to(like.dtype)
        for t, like in ((dweight, weight), (dbias, bias))
    )
