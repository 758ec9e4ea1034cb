"""bias_gelu: a Linear's bias and the tanh form of GELU in one pass, forward and backward.

With z = x + bias and u = √(2/π)·(z + 0.044715·z³), ½(1 + tanh u) is the logistic function of 2u, so

    gelu(z)  = z/2·(1 + tanh u) = z·σ(2u) = z / (1 + e^(−2u))

which neither cancels where tanh u is near −1 nor overflows: e^(−2u) = ∞ gives −0. In the gradient

    gelu'(z) = σ(2u) + z·2u'·σ(2u)·σ(−2u)

the product of the two logistic functions is even in u: with e = e^(−2|u|) and r = 1/(1 + e) it is
e·r², and σ(2u) is r for z ≥ 0 and e·r below. Beyond |z| = 16 e is 0 in float32, so there the
polynomials are those of 16: they cannot overflow to 0·∞.

Bytes: forward reads x and writes out; backward reads dout and x and writes dx. The bias is read
once a tile of rows. dbias sums the unrounded dx in registers; each program leaves one row of
partial sums, and `partials.sum_rows` adds them in a fixed order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdit.backends import Kernel
from fastdit.kernels import launch, partials, tuning

# 2u·log₂e = z·(LINEAR + CUBIC·z²), and 2u' = SLOPE·(1 + 3·0.044715·z²).
SLOPE = tl.constexpr(1.5957691216057308)
LINEAR = tl.constexpr(2.302208198144325)
CUBIC = tl.constexpr(0.1029432395800235)


@dataclass(frozen=True)
class Tile:
    """A program's tile, `elements` long, in rows of up to `columns`; and, backward, how many
    programs there are for all rows and columns at most."""

    elements: int
    columns: int
    num_warps: int
    programs: int = 0


# Forward two 128-bit accesses a thread and tensor, by bytes of an element; 512 columns divide the
# MLP widths of all DiTs (1536, 3072, 4096, 4608). Backward one: 40 registers, so that 12 programs
# fit on a multiprocessor and all 1024 run at once on 108 of them or more; two take 72 registers and
# would leave a second, nearly empty wave. Their partial sums are 2 % of the traffic at 8192 tokens.
FORWARD = {2: Tile(2048, 512, 4), 4: Tile(1024, 512, 4)}
BACKWARD = {2: Tile(1024, 512, 4, programs=1024), 4: Tile(1024, 512, 4, programs=1024)}
FORWARD_CANDIDATES = [
    Tile(elements, columns, warps)
    for elements, columns, warps in (
        (1024, 512, 4),
        (2048, 512, 4),
        (4096, 512, 8),
        (2048, 1024, 4),
    )
]
BACKWARD_CANDIDATES = [
    Tile(elements, 512, 4, programs) for elements in (1024, 2048) for programs in (512, 1024, 2048)
]


@triton.jit
def gelu(z):
    return z / (1 + tl.exp2(-z * (LINEAR + CUBIC * z * z)))


@triton.jit
def gelu_gradient(z):
    size = tl.minimum(tl.abs(z), 16.0, propagate_nan=tl.PropagateNan.ALL)
    square = size * size
    e = tl.exp2(-size * (LINEAR + CUBIC * square))
    r = 1 / (1 + e)
    bell = size * (SLOPE + 3 * 0.044715 * SLOPE * square) * e * r * r
    return tl.where(z < 0, e * r - bell, r + bell)


@triton.jit
def forward_kernel(
    x_ptr, bias_ptr, out_ptr, rows, width, x_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < width)
    bias = tl.load(bias_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row.to(tl.int64) * x_stride + column, mask=inside, other=0.0)
    out = gelu(x.to(tl.float32) + bias).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row.to(tl.int64) * width + column, out, mask=inside)


@triton.jit
def backward_kernel(
    dout_ptr,
    x_ptr,
    bias_ptr,
    dx_ptr,
    partials_ptr,
    rows,
    width,
    dout_stride,
    x_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    split, splits = tl.program_id(0), tl.num_programs(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    bias = tl.load(bias_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    dbias = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(split * ROWS, rows, splits * ROWS):
        row = (start + tl.arange(0, ROWS))[:, None]
        inside = (row < rows) & (column < width)
        row = row.to(tl.int64)
        x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
        dout = tl.load(dout_ptr + row * dout_stride + column, mask=inside, other=0.0)
        dx = dout.to(tl.float32) * gelu_gradient(x + bias)
        dbias += dx
        tl.store(dx_ptr + row * width + column, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    total = tl.sum(dbias, 0)[None, :]
    tl.store(partials_ptr + split.to(tl.int64) * width + column, total, mask=column < width)


def bias_gelu(x: Tensor, bias: Tensor, out: Tensor | None = None) -> Tensor:
    """The schema op's forward: reads x, writes out, a given one or its own."""
    out = launch.result(x, out)
    if x.numel() == 0:
        return out
    flat, bias = launch.flat_rows(x), bias.contiguous()
    rows, width = flat.shape

    def run(tile: Tile) -> None:
        columns = launch.column_block(width, tile.columns)
        tall = tile.elements // columns
        forward_kernel[(triton.cdiv(rows, tall), triton.cdiv(width, columns))](
            flat, bias, out, rows, width, flat.stride(0), tall, columns, num_warps=tile.num_warps
        )

    with launch.on_device(x):
        key = (tuning.shape_class(rows), width, x.dtype, bias.dtype)
        default = FORWARD[x.element_size()]
        run(tuning.choose("bias_gelu", key, default, FORWARD_CANDIDATES, run))
    return out


def bias_gelu_backward(dout: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The schema op's backward: reads dout and x, writes dx; dbias by partial sums."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return dx, torch.zeros_like(bias)
    flat, dflat, bias = launch.flat_rows(x), launch.flat_rows(dout), bias.contiguous()
    (rows, width), dbias = flat.shape, torch.empty_like(bias)

    def run(tile: Tile) -> None:
        columns = launch.column_block(width, tile.columns)
        tall, blocks = tile.elements // columns, triton.cdiv(width, columns)
        splits = min(triton.cdiv(rows, tall), max(1, tile.programs // blocks))
        sums = partials.partials(splits, width, x)
        strides = (dflat.stride(0), flat.stride(0))
        sizes = (rows, width, *strides, tall, columns)
        backward_kernel[(splits, blocks)](
            dflat, flat, bias, dx, sums, *sizes, num_warps=tile.num_warps
        )
        partials.sum_rows(sums, dbias)

    with launch.on_device(x):
        key = (tuning.shape_class(rows), width, x.dtype, bias.dtype)
        default = BACKWARD[x.element_size()]
        run(tuning.choose("bias_gelu_backward", key, default, BACKWARD_CANDIDATES, run))
    return dx, dbias


def _unsupported(x: Tensor, bias: Tensor) -> str | None:
    if x.numel() // max(1, x.shape[-1]) >= 2**31:
        return "x has 2^31 rows or more"
    return launch.unsupported_dtype(x=x, bias=bias)


def _unsupported_backward(dout: Tensor, x: Tensor, bias: Tensor) -> str | None:
    return launch.unsupported_dtype(dout=dout) or _unsupported(x, bias)


KERNELS = (
    Kernel("bias_gelu", "cuda", "triton", bias_gelu, _unsupported, takes_out=True),
    Kernel("bias_gelu_backward", "cuda", "triton", bias_gelu_backward, _unsupported_backward),
)
