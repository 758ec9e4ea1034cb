"""QK-norm and RoPE of packed queries and keys, before attention, and their gradients after it.

With x one head of one token, d channels, u its normalised form (LN or RMS, or x itself) and (a, b)
the two channels of each pair of n = u·weight + bias:

    ya = a·cosₐ − b·sinₐ        yb = b·cos_b + a·sin_b

The backward turns dy back (da = dya·cosₐ + dyb·sin_b, db = dyb·cos_b − dya·sinₐ), then with
g = dn·weight: dx = rstd·(g − mean(g) − u·mean(g·u)), without mean(g) for RMS.

A pair meets in one thread: interleaved pairs are loaded side by side and split in registers, those
of two halves are two loads. Statistics take two steps over the registers and live in them only.

Traffic: forward reads q and k and writes them once; backward reads q, k, dq and dk and writes dq
and dk where attention's backward left them. The tables are read by every program, from the L2
cache. Sums over tokens go to one partial sum a program, added up in a fixed order: no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdit import reference
from fastdit.kernels import launch
from fastdit.kernels.attention_tiles import stride_unit

ELEMENTS = 1024  # of one tile, in fp32: 8 a thread; 16 take 168 registers in the backward
PROGRAMS = 1024  # share the rows where sums over tokens are wanted: 7 a multiprocessor and more


@triton.jit
def load_pairs(ptr, at, mask, LAYOUT: tl.constexpr):
    """The channels of the rows that start at the offsets `at`, in float32, as (a, b).

    LAYOUT is (head_dim, columns of a and of b, whether a pair's channels are adjacent).
    """
    if LAYOUT[2]:
        channel = tl.arange(0, 2 * LAYOUT[1])[None, :]
        x = tl.load(ptr + at + channel, mask=mask & (channel < LAYOUT[0]), other=0.0)
        pair = tl.split(tl.reshape(x.to(tl.float32), [x.shape[0], LAYOUT[1], 2]))
    else:
        channel = tl.arange(0, LAYOUT[1])[None, :]
        real = mask & (channel < LAYOUT[0] // 2)
        a = tl.load(ptr + at + channel, mask=real, other=0.0)
        b = tl.load(ptr + at + LAYOUT[0] // 2 + channel, mask=real, other=0.0)
        pair = (a.to(tl.float32), b.to(tl.float32))
    return pair


@triton.jit
def store_pairs(ptr, at, x, mask, LAYOUT: tl.constexpr):
    if LAYOUT[2]:
        channel = tl.arange(0, 2 * LAYOUT[1])[None, :]
        y = tl.reshape(tl.join(x[0], x[1]), [x[0].shape[0], 2 * LAYOUT[1]])
        tl.store(ptr + at + channel, y.to(ptr.dtype.element_ty), mask=mask & (channel < LAYOUT[0]))
    else:
        channel = tl.arange(0, LAYOUT[1])[None, :]
        real = mask & (channel < LAYOUT[0] // 2)
        tl.store(ptr + at + channel, x[0].to(ptr.dtype.element_ty), mask=real)
        tl.store(ptr + at + LAYOUT[0] // 2 + channel, x[1].to(ptr.dtype.element_ty), mask=real)


@triton.jit
def load_parameters(ptr, LAYOUT: tl.constexpr):
    """A weight or bias as a row (a, b)."""
    return load_pairs(ptr, tl.zeros([1, 1], tl.int32), tl.full([1, 1], 1, tl.int1), LAYOUT)


@triton.jit
def row_mean(x, y, LAYOUT: tl.constexpr):
    """The mean of x·y over the channels of each row, `(rows, 1)`."""
    return ((tl.sum(x[0] * y[0], 1) + tl.sum(x[1] * y[1], 1)) / LAYOUT[0])[:, None]


@triton.jit
def normalised(x, eps, NORM: tl.constexpr, LAYOUT: tl.constexpr):
    """The rows' unit forms and 1/std; the columns past head_dim stay 0."""
    a, b = x[0], x[1]
    if NORM == "layer":
        real = tl.arange(0, LAYOUT[1])[None, :] < LAYOUT[0] // 2
        mean = ((tl.sum(a, 1) + tl.sum(b, 1)) / LAYOUT[0])[:, None]
        a, b = tl.where(real, a - mean, 0.0), tl.where(real, b - mean, 0.0)
    rstd = 1 / tl.sqrt_rn(row_mean((a, b), (a, b), LAYOUT) + eps)
    return (a * rstd, b * rstd), rstd


@triton.jit
def places(row, N, H, batch_stride, token_stride, UNIT: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Where rows (sample, token, head) start, `(rows, 1)`; 64 bits, as `row` has."""
    token = row // H
    at = (token // N * batch_stride + token % N * token_stride) * UNIT + row % H * HEAD_DIM
    return at[:, None]


@triton.jit
def dense_places(row, H, stride, HEAD_DIM: tl.constexpr):
    """Where they start in a buffer without gaps between samples."""
    return (row // H * stride + row % H * HEAD_DIM)[:, None]


@triton.jit
def load_tables(cos_ptr, sin_ptr, at, mask, LAYOUT: tl.constexpr):
    tables = None
    if cos_ptr is not None:
        tables = load_pairs(cos_ptr, at, mask, LAYOUT), load_pairs(sin_ptr, at, mask, LAYOUT)
    return tables


@triton.jit
def prepare_rows(
    x_ptr, at, out_ptr, out_at, weight_ptr, bias_ptr, tables, eps, mask,
    NORM: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    x = load_pairs(x_ptr, at, mask, LAYOUT)
    if NORM != "none":
        x, _rstd = normalised(x, eps, NORM, LAYOUT)
    if weight_ptr is not None:
        weight = load_parameters(weight_ptr, LAYOUT)
        x = x[0] * weight[0], x[1] * weight[1]
    if bias_ptr is not None:
        bias = load_parameters(bias_ptr, LAYOUT)
        x = x[0] + bias[0], x[1] + bias[1]
    if tables is not None:
        cos, sin = tables
        x = x[0] * cos[0] - x[1] * sin[0], x[1] * cos[1] + x[0] * sin[1]
    store_pairs(out_ptr, out_at, x, mask, LAYOUT)


@triton.jit
def prepare_kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, q_weight_ptr, q_bias_ptr, k_weight_ptr, k_bias_ptr,
    cos_ptr, sin_ptr, table_batch, eps, rows, N, H, batch_stride, token_stride,
    UNIT: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """A row is one head of one token of one sample; q's and k's strides are in units of UNIT."""
    width = H * LAYOUT[0]
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    mask = (row < rows)[:, None]
    at = places(row, N, H, batch_stride, token_stride, UNIT, LAYOUT[0])
    out_at = dense_places(row, H, 2 * width, LAYOUT[0])
    table_at = places(row, N, H, table_batch, LAYOUT[0], 1, 0)
    tables = load_tables(cos_ptr, sin_ptr, table_at, mask, LAYOUT)
    prepare_rows(
        q_ptr, at, q_out_ptr, out_at, q_weight_ptr, q_bias_ptr, tables, eps, mask, NORM, LAYOUT
    )
    prepare_rows(
        k_ptr, at, k_out_ptr, out_at, k_weight_ptr, k_bias_ptr, tables, eps, mask, NORM, LAYOUT
    )


@triton.jit
def prepare_rows_backward(
    dx_ptr, dx_at, x_ptr, at, weight_ptr, tables, eps, mask,
    NORM: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Writes dx over dy; returns the rows' terms of dweight and dbias, dn·u and dn."""
    dn = load_pairs(dx_ptr, dx_at, mask, LAYOUT)
    if tables is not None:
        cos, sin = tables
        dn = dn[0] * cos[0] + dn[1] * sin[1], dn[1] * cos[1] - dn[0] * sin[0]
    dx = dn
    terms = dn, dn
    if NORM != "none":
        unit, rstd = normalised(load_pairs(x_ptr, at, mask, LAYOUT), eps, NORM, LAYOUT)
        terms = (dn[0] * unit[0], dn[1] * unit[1]), dn
        g = dn
        if weight_ptr is not None:
            weight = load_parameters(weight_ptr, LAYOUT)
            g = g[0] * weight[0], g[1] * weight[1]
        along = row_mean(g, unit, LAYOUT)
        dx = g[0] - unit[0] * along, g[1] - unit[1] * along
        if NORM == "layer":
            mean = ((tl.sum(g[0], 1) + tl.sum(g[1], 1)) / LAYOUT[0])[:, None]
            dx = dx[0] - mean, dx[1] - mean
        dx = dx[0] * rstd, dx[1] * rstd
    store_pairs(dx_ptr, dx_at, dx, mask, LAYOUT)
    return terms


@triton.jit
def add_terms(sums, terms):
    """Element by element: the rows are added up once, when a program ends."""
    dweight, dbias = terms
    return (
        (sums[0][0] + dweight[0], sums[0][1] + dweight[1]),
        (sums[1][0] + dbias[0], sums[1][1] + dbias[1]),
    )


@triton.jit
def store_sums(ptr, sums, LAYOUT: tl.constexpr):
    at, one = tl.zeros([1, 1], tl.int32), tl.full([1, 1], 1, tl.int1)
    for i in tl.static_range(2):
        row = tl.sum(sums[i][0], 0)[None, :], tl.sum(sums[i][1], 0)[None, :]
        store_pairs(ptr + i * LAYOUT[0], at, row, one, LAYOUT)


@triton.jit
def prepare_backward_kernel(
    dq_ptr, dk_ptr, q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, partial_ptr, cos_ptr, sin_ptr,
    table_batch, eps, rows, N, H, batch_stride, token_stride,
    UNIT: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """A program takes every num_programs-th tile of rows, and keeps its sums over them."""
    width = H * LAYOUT[0]
    zero = tl.zeros([ROWS, LAYOUT[1]], tl.float32)
    q_sums = (zero, zero), (zero, zero)
    k_sums = (zero, zero), (zero, zero)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        mask = (row < rows)[:, None]
        at = places(row, N, H, batch_stride, token_stride, UNIT, LAYOUT[0])
        dx_at = dense_places(row, H, 3 * width, LAYOUT[0])
        table_at = places(row, N, H, table_batch, LAYOUT[0], 1, 0)
        tables = load_tables(cos_ptr, sin_ptr, table_at, mask, LAYOUT)
        terms = prepare_rows_backward(
            dq_ptr, dx_at, q_ptr, at, q_weight_ptr, tables, eps, mask, NORM, LAYOUT
        )
        if partial_ptr is not None:
            q_sums = add_terms(q_sums, terms)
        terms = prepare_rows_backward(
            dk_ptr, dx_at, k_ptr, at, k_weight_ptr, tables, eps, mask, NORM, LAYOUT
        )
        if partial_ptr is not None:
            k_sums = add_terms(k_sums, terms)
    if partial_ptr is not None:
        partial_ptr += tl.program_id(0) * (4 * LAYOUT[0])
        store_sums(partial_ptr, q_sums, LAYOUT)
        store_sums(partial_ptr + 2 * LAYOUT[0], k_sums, LAYOUT)


def _layout(head_dim: int, interleaved: bool) -> tuple[tuple[int, int, bool], int]:
    half = triton.next_power_of_2(head_dim // 2)
    return (head_dim, half, interleaved), max(1, ELEMENTS // (2 * half))


def _tables(cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor | None, Tensor | None, int]:
    """The tables without gaps, and the distance of two samples' tables."""
    if cos is None:
        return None, None, 0
    cos, sin = cos.contiguous(), sin.contiguous()
    return cos, sin, cos.stride(0) if cos.dim() == 3 else 0


def _shared(q: Tensor, cos, sin, eps: float, norm: str | None, layout: tuple, rows: int):
    """What both kernels take last: their arguments in order, and those by name."""
    batch, heads, tokens, _ = q.shape
    unit = stride_unit(q)
    counts = (batch * tokens * heads, tokens, heads)
    sizes = (*_tables(cos, sin), eps, *counts, q.stride(0) // unit, q.stride(2) // unit)
    return sizes, {"UNIT": unit, "ROWS": rows, "NORM": norm or "none", "LAYOUT": layout}


def _contiguous(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()


def prepare(
    qkv, num_heads, q_weight, q_bias, k_weight, k_bias, norm, eps, cos, sin, interleaved
) -> tuple[Tensor, Tensor, Tensor]:
    """Q, K, V `(B, H, N, d)` as attention multiplies them: views of qkv where nothing is asked.

    Reads q and k, writes them in one buffer `(B, N, 2, H, d)`.
    """
    q, k, v = reference.split_heads(qkv, num_heads)
    if norm is None and cos is None:
        return q, k, v
    batch, heads, tokens, head_dim = q.shape
    layout, rows = _layout(head_dim, interleaved)
    out = qkv.new_empty(batch, tokens, 2, heads, head_dim)
    q_out, k_out = out.permute(2, 0, 3, 1, 4).unbind(0)
    affine = map(_contiguous, (q_weight, q_bias, k_weight, k_bias))
    sizes, options = _shared(q, cos, sin, eps, norm, layout, rows)
    with launch.on_device(qkv):
        prepare_kernel[(triton.cdiv(batch * tokens * heads, rows),)](
            q, k, q_out, k_out, *affine, *sizes, **options
        )
    return q_out, k_out, v


def prepare_backward(
    dqkv, qkv, num_heads, q_weight, q_bias, k_weight, k_bias, norm, eps, cos, sin, interleaved
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Turn dqkv's dq and dk, those of prepared queries and keys, into qkv's, where they are.

    Returns dq_weight, dq_bias, dk_weight and dk_bias, empty where there is no such parameter.
    """
    parameters = (q_weight, q_bias, k_weight, k_bias)
    wanted = any(parameter is not None for parameter in parameters)
    q, k, _v = reference.split_heads(qkv, num_heads)
    dq, dk, _dv = reference.split_heads(dqkv, num_heads)
    batch, heads, tokens, head_dim = q.shape
    layout, rows = _layout(head_dim, interleaved)
    tiles = triton.cdiv(batch * tokens * heads, rows)
    programs = min(tiles, PROGRAMS) if wanted else tiles
    partial = qkv.new_empty(programs, 4, head_dim, dtype=torch.float32) if wanted else None
    sizes, options = _shared(q, cos, sin, eps, norm, layout, rows)
    with launch.on_device(qkv):
        prepare_backward_kernel[(programs,)](
            dq, dk, q, k, _contiguous(q_weight), _contiguous(k_weight), partial, *sizes, **options
        )
    sums = partial.sum(0) if wanted else None
    return tuple(
        qkv.new_empty(0) if parameter is None else sums[i].to(parameter.dtype, copy=True)
        for i, parameter in enumerate(parameters)
    )
