"""Sums over rows in a fixed order: the second stage of every gradient that sums over tokens.

    out[e] = Σ_p rows[p, e]

A first stage leaves one row of float32 partial sums for each of its programs; this adds them in one
order, so that a gradient has the same bits in every run. Atomics would be one launch less and
another sum each time. The same kernel sums a batch: `rows` may be any of Triton's dtypes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdit.kernels.launch import on_device


@dataclass(frozen=True)
class Tile:
    """What one program adds at a time: `rows` rows of `columns` columns."""

    rows: int
    columns: int
    num_warps: int


# 16 rows in flight hide the latency of a reduction that has few programs; 128 columns are 512
# bytes of float32, four full lines.
TILE = Tile(rows=16, columns=128, num_warps=4)


@triton.jit
def sum_rows_kernel(rows_ptr, out_ptr, count, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, count, ROWS):
        row = start + tl.arange(0, ROWS)
        at = row.to(tl.int64)[:, None] * width + column[None, :]
        mask = (row < count)[:, None] & inside[None, :]
        total += tl.load(rows_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + column, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=inside)


def sum_rows(rows: Tensor, out: Tensor) -> Tensor:
    """Write the sum of `rows` `(P, E)`, contiguous, into `out`, E contiguous elements.

    Reads `rows` once, writes `out` once.
    """
    count, width = rows.shape
    if width:
        with on_device(rows):
            sum_rows_kernel[(triton.cdiv(width, TILE.columns),)](
                rows, out, count, width, TILE.rows, TILE.columns, num_warps=TILE.num_warps
            )
    return out


def partials(splits: int, width: int, like: Tensor) -> Tensor:
    """Room for the partial sums of `splits` programs, on `like`'s device."""
    return torch.empty((splits, width), dtype=torch.float32, device=like.device)
