"""A row of a (B, N, D) tensor in one program's registers: what the row-wise kernels share.

**Main and tail.** A block's size is a power of two, a model's width is not: 1152 columns masked
into 2048 leave 44 % of the lanes idle. So a row is two blocks, 1024 + 128, and every line of a
kernel stands twice, once for each. `fold` adds up the main block's neighbours until it has the
tail's size and adds the tail to it, so that warps meet at one barrier for a sum, not at two.
PTX warp instructions a row of `adaln`, bfloat16, sm_80:

    width   masked to a power of two   two blocks, two sums   two blocks, folded
    1152    1256 (2048, 4 warps)       1016 (4 warps)         868 (1024 + 128, 4 warps)
     768     800 (1024, 4 warps)        570 (2 warps)         502 (512 + 256, 2 warps)
     384     392 ( 512, 2 warps)        414 (2 warps)         348 (256 + 128, 2 warps)

At 384 two warps of folded blocks give a thread only 4 columns of bfloat16, 64-bit accesses.

**Modulation** is a `View`: a tensor and its strides, so that slices such as `chunk(6, -1)` are
read where they lie. What is absent is None, and the compiler drops what would be done with it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdit.kernels import tuning
from fastdit.kernels.launch import split_width, unsupported_dtype

View = tuple[Tensor, int, int | None, int]
"""A tensor, and its strides of sample, token (None: the same for all tokens) and column."""

WIDEST = 65536
"""Up to 6144 columns nothing spills, up to 32768 the forward does not; beyond 65536 a row in
registers is the wrong idea, and the kernels decline."""
MOST_ROWS = 2**31 - 1
"""Programs of a grid."""


# ---- on the host -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """How a program holds a row: two blocks, the second perhaps empty, in so many warps."""

    main: int
    tail: int
    num_warps: int
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """Triton's launch options."""
        limit = {} if self.max_registers is None else {"maxnreg": self.max_registers}
        return {"num_warps": self.num_warps, **limit}


@dataclass(frozen=True)
class Backward:
    """What a thread of a backward kernel may hold: columns of a row, beyond which a row is padded
    to a power of two, and registers, for 16-bit numbers and for 32-bit ones.

    Left to itself, ptxas takes 96 registers where 80 do, or spills two to reach the next occupancy.
    """

    columns: int
    half: int
    full: int


def forward_tile(x: Tensor) -> Tile:
    """A thread holds 8 columns of the main block, a 128-bit access of 16-bit numbers, and at most
    4 of the tail: 32 registers do, and every warp of a multiprocessor is resident."""
    return _forward_tile(x.shape[-1], _lanes(triton.runtime.driver.active))


@functools.cache
def _forward_tile(width: int, lanes: int) -> Tile:
    main, tail = split_width(width)
    if main < 16 * lanes and tail:
        # One warp for 384 columns takes 248 instructions a row instead of 414, but the 32 blocks
        # of a multiprocessor are then only 32 warps, half of what it can hold.
        main, tail = 2 * main, 0
    return Tile(main, tail, max(1, min(1024, main // 8) // lanes))


def backward_tile(x: Tensor, limits: Backward) -> Tile:
    """A thread holds one 128-bit access of the main block, and of the tail what `limits` allow.

    One warp will do: registers, not blocks, limit the warps that are resident. One holds 384
    columns in 268 instructions a row instead of two in 395, two hold 768 in 552 instead of four in
    806.
    """
    return _backward_tile(x.shape[-1], x.itemsize, limits, _lanes(triton.runtime.driver.active))


@functools.cache
def _backward_tile(width: int, itemsize: int, limits: Backward, lanes: int) -> Tile:
    main, tail = split_width(width)
    access = 16 // itemsize
    num_warps = max(1, min(512, main // access) // lanes)
    if tail and (main < access * lanes or (main + tail) // (num_warps * lanes) > limits.columns):
        main, tail = 2 * main, 0
        num_warps = max(1, min(512, main // access) // lanes)
    # 16 warps of 128 registers are all that a multiprocessor has; wider rows, of more than 8
    # columns a thread, need them all and still spill. AMD's compiler takes no limit.
    most = limits.half if itemsize == 2 else limits.full
    limit = 128 if main > 4096 else min(most, 2048 // num_warps)
    return Tile(main, tail, num_warps, limit if lanes == 32 else None)


def launch(op: str, x: Tensor, default: Tile, run: Callable[[Tile], Any], *options: Any) -> Any:
    """What `run` returns for the default tile, or for the fastest where autotuning is on; `options`
    are what else the choice depends on."""
    key = (tuning.shape_class(x.shape[0] * x.shape[1]), x.shape[2], x.dtype, *options)
    return run(tuning.choose(op, key, default, _candidates(x.shape[2], default), run))


@functools.cache
def _candidates(width: int, default: Tile) -> list[Tile]:
    """Half and twice the warps, the row split or masked, and, where registers are limited, more."""
    whole = triton.next_power_of_2(width)
    limits = [None] if default.max_registers is None else [64, 80, 96, 128]
    warps = {max(1, default.num_warps // 2), default.num_warps, min(16, 2 * default.num_warps)}
    return [
        Tile(main, tail, count, limit)
        for main, tail in sorted({split_width(width), (whole, 0)})
        for count in sorted(warps)
        for limit in limits
    ]


@functools.lru_cache(maxsize=8)
def _lanes(driver: Any) -> int:
    """Threads of a warp: 32, or 64 on AMD."""
    return driver.get_current_target().warp_size


def view(modulation: Tensor | None) -> View | None:
    """Modulation `(B, D)` or `(B, N, D)` as kernels take it."""
    if modulation is None:
        return None
    if modulation.dim() == 2:
        sample, column = modulation.stride()
        return modulation, sample, None, column
    return modulation, *modulation.stride()


def unsupported(x: Tensor, **others: Tensor | None) -> str | None:
    """Why the row-wise kernels cannot run a call with these tensors, or None."""
    if not 1 <= x.shape[-1] <= WIDEST:
        return f"x is {x.shape[-1]} wide, the Triton kernels take widths from 1 to {WIDEST}"
    if x.shape[0] * x.shape[1] > MOST_ROWS:
        return f"x has {x.shape[0] * x.shape[1]} rows, the Triton kernels take {MOST_ROWS}"
    return unsupported_dtype(x=x, **others)


def empty_statistics(x: Tensor, norm: str) -> tuple[Tensor, Tensor]:
    """Mean and 1/std of the rows of `x`, to be written; the mean is empty for RMS."""
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return torch.empty_like(rstd) if norm == "layer" else rstd.new_empty(0), rstd


# ---- on the device -----------------------------------------------------------------------------
# A part is one of a row's two blocks: SIZE columns from START on, of the row's D. A part without
# columns is the number 0.0, which the compiler removes with all that is done to it.


@triton.jit
def load(row_ptr, START: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr):
    """A part of a contiguous row in float32; zeros beyond D."""
    if SIZE == 0:
        return 0.0
    else:
        column = START + tl.arange(0, SIZE)
        if START + SIZE > D:
            return tl.load(row_ptr + column, mask=column < D, other=0.0).to(tl.float32)
        else:
            return tl.load(row_ptr + column).to(tl.float32)


@triton.jit
def zeros(SIZE: tl.constexpr):
    """A part to add to."""
    return 0.0 if SIZE == 0 else tl.zeros((SIZE,), tl.float32)


@triton.jit
def view_row(view, sample, token):
    """The first column of a modulation's row."""
    ptr = view[0] + sample.to(tl.int64) * view[1]
    if view[2] is not None:
        ptr += tl.cast(token, tl.int64) * view[2]
    return ptr


@triton.jit
def load_view(view, sample, token, START: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr):
    """A part of a modulation's row in float32."""
    if SIZE == 0:
        return 0.0
    else:
        column = START + tl.arange(0, SIZE)
        ptr = view_row(view, sample, token) + column.to(tl.int64) * view[3]
        if START + SIZE > D:
            return tl.load(ptr, mask=column < D, other=0.0).to(tl.float32)
        else:
            return tl.load(ptr).to(tl.float32)


@triton.jit
def store(row_ptr, part, START: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr):
    """Round a part to the tensor's dtype and write it."""
    if SIZE > 0:
        column = START + tl.arange(0, SIZE)
        rounded = part.to(row_ptr.dtype.element_ty)
        if START + SIZE > D:
            tl.store(row_ptr + column, rounded, mask=column < D)
        else:
            tl.store(row_ptr + column, rounded)


@triton.jit
def inside(part, START: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr):
    """The part with zeros beyond D."""
    if SIZE > 0 and START + SIZE > D:
        return tl.where(START + tl.arange(0, SIZE) < D, part, 0.0)
    else:
        return part


@triton.jit
def fold(main, tail, MAIN: tl.constexpr, TAIL: tl.constexpr):
    """What is left to sum of a row: the main block's neighbours added up, and the tail."""
    if TAIL == 0:
        return main
    else:
        return tl.sum(tl.reshape(main, (TAIL, MAIN // TAIL)), 1) + tail


@triton.jit
def add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def totals(a_main, a_tail, b_main, b_tail, MAIN: tl.constexpr, TAIL: tl.constexpr):
    """The sums of two rows, behind one barrier."""
    a, b = fold(a_main, a_tail, MAIN, TAIL), fold(b_main, b_tail, MAIN, TAIL)
    return tl.reduce((a, b), 0, add_pairs)


@triton.jit
def normalise(
    main, tail, mean_ptr, rstd_ptr, row, eps, D: tl.constexpr, MAIN: tl.constexpr,
    TAIL: tl.constexpr, LAYER: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """The row normalised; writes its mean and 1/std.

    FULL, for rows of 32-bit numbers: what the first mean missed by rounding is the mean of the
    centred row, which is summed beside its square. Mean 100, deviation 1: the error falls from
    6e-6 to 3e-7. In 16-bit numbers such a row has lost more than that.
    """
    mean = 0.0
    if LAYER:
        mean = tl.sum(fold(main, tail, MAIN, TAIL), 0) / D
        main = inside(main - mean, 0, MAIN, D)
        tail = inside(tail - mean, MAIN, TAIL, D)
    if LAYER and FULL:
        squares, missed = totals(main * main, tail * tail, main, tail, MAIN, TAIL)
        missed /= D
        variance = squares / D - missed * missed
        main, tail, mean = main - missed, tail - missed, mean + missed
    else:
        variance = tl.sum(fold(main * main, tail * tail, MAIN, TAIL), 0) / D
    rstd = tl.rsqrt(variance + eps)
    if LAYER:
        tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)
    return main * rstd, tail * rstd


@triton.jit
def store_modulated(
    row_ptr, part, shift, scale, weight_ptr, bias_ptr, sample, token,
    START: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, PLUS_ONE: tl.constexpr,
):  # fmt: skip
    """Write (part·weight + bias)·(1 + scale) + shift, without what is absent."""
    if weight_ptr is not None:
        part *= load(weight_ptr, START, SIZE, D)
    if bias_ptr is not None:
        part += load(bias_ptr, START, SIZE, D)
    if scale is not None:
        factor = load_view(scale, sample, token, START, SIZE, D)
        part *= factor + 1.0 if PLUS_ONE else factor
    if shift is not None:
        part += load_view(shift, sample, token, START, SIZE, D)
    store(row_ptr, part, START, SIZE, D)


@triton.jit
def store_modulated_row(
    row_ptr, main, tail, shift, scale, weight_ptr, bias_ptr, sample, token,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, PLUS_ONE: tl.constexpr,
):  # fmt: skip
    """Both parts. The tail first: the other order takes 40 registers instead of 32 (width 768,
    sm_80)."""
    store_modulated(
        row_ptr, tail, shift, scale, weight_ptr, bias_ptr, sample, token, MAIN, TAIL, D, PLUS_ONE
    )
    store_modulated(
        row_ptr, main, shift, scale, weight_ptr, bias_ptr, sample, token, 0, MAIN, D, PLUS_ONE
    )


@triton.jit
def gated_sum(
    x_row, y_row, gate, sample, token, START: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """A part of x + gate·y, rounded to x's dtype."""
    if SIZE == 0:
        return 0.0
    else:
        x, y = load(x_row, START, SIZE, D), load(y_row, START, SIZE, D)
        sum = x + load_view(gate, sample, token, START, SIZE, D) * y
        return sum.to(x_row.dtype.element_ty).to(tl.float32)
