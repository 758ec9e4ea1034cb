"""glu: the gated linear unit act(gate)·up in one pass, forward and backward.

act(z) = z·P(z) and act'(z) = P(z) + z·P'(z) with a distribution function P, P(z) = 1 − P(−z). All
follows from its tail q = P(−|z|), which one exponential gives without cancellation or overflow:

    SiLU        e = e^(−|z|),   q = e/(1 + e),  P' = q·(1 − q)
    tanh GELU   e = e^(−2|u|),  q = e/(1 + e),  P' = 2u'·q·(1 − q),  u as in `bias_gelu`
    GELU        e = e^(−z²/2),  q = e·Q(|z|),   P' = e/√(2π)

Q(a) = ½·erfc(a/√2)·e^(a²/2) is a polynomial in t = 1/(1 + 11/32·a), minimax of the relative error,
2.3e-8: one exponential and one division instead of erf and an exponential.

Bytes: forward reads gate and up and writes out; backward reads dout, gate and up and writes both
gradients, side by side where gate and up came so. The bias is read once a tile of rows. Its
gradient sums the unrounded others in registers; each program leaves one row of partial sums, and
`partials.sum_rows` adds them in a fixed order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdit.backends import Kernel
from fastdit.kernels import launch, partials, tuning
from fastdit.kernels.bias_gelu import (
    BACKWARD_CANDIDATES,
    CUBIC,
    FORWARD,
    FORWARD_CANDIDATES,
    LINEAR,
    SLOPE,
    Tile,
    gelu,
)

LOG2E = tl.constexpr(1.4426950408889634)
DENSITY = tl.constexpr(0.3989422804014327)  # 1/√(2π)

# Forward and to choose from, the tiles of `bias_gelu`; backward its two sums take the registers of
# half the programs.
BACKWARD = {size: Tile(1024, 512, 4, programs=512) for size in (2, 4)}


@triton.jit
def normal_ratio(size):
    """P(−size)·e^(size²/2) of the normal distribution, size from 0 to 14."""
    t = 1 / (1 + 0.34375 * size)
    m = -0.02780931 * t + 0.14384907
    m = m * t - 0.2717139
    m = m * t + 0.1909209
    m = m * t - 0.039307133
    m = m * t + 0.11265798
    m = m * t + 0.11674045
    m = m * t + 0.13754228
    return (m * t + 0.13711967) * t


@triton.jit
def distribution(z, ACTIVATION: tl.constexpr):
    """P(z) and P'(z). From |z| = 16 on, GELU's e is 0 in float32; there its polynomials are those
    of 16, which cannot overflow to 0·∞. A NaN may be lost here; products with z bring it back."""
    size = tl.abs(z)
    if ACTIVATION == "silu":
        e = tl.exp2(-size * LOG2E)
        tail = e / (1 + e)
        density = tail * (1 - tail)
    else:
        size = tl.minimum(size, 16.0)
        square = size * size
        if ACTIVATION == "gelu":
            e = tl.exp2(square * (-0.5 * LOG2E))
            tail = e * normal_ratio(size)
            density = e * DENSITY
        else:
            e = tl.exp2(-size * (LINEAR + CUBIC * square))
            tail = e / (1 + e)
            density = (SLOPE + 3 * 0.044715 * SLOPE * square) * (tail * (1 - tail))
    return tl.where(z < 0, tail, 1 - tail), density


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """z·P(z); where e^(−z) overflows, −0."""
    if ACTIVATION == "silu":
        return z / (1 + tl.exp2(-z * LOG2E))
    elif ACTIVATION == "gelu_tanh":
        return gelu(z)
    else:
        p, _density = distribution(z, ACTIVATION)
        return z * p


@triton.jit
def load_bias(bias_ptr, column, width):
    """A row of it, or 0 where it is absent."""
    if bias_ptr is None:
        return 0.0
    else:
        return tl.load(bias_ptr + column, mask=column < width, other=0.0).to(tl.float32)


@triton.jit
def forward_kernel(
    gate_ptr, up_ptr, gate_bias_ptr, up_bias_ptr, out_ptr, rows, width, gate_stride, up_stride,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < width)
    row = row.to(tl.int64)
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    gate += load_bias(gate_bias_ptr, column, width)
    up += load_bias(up_bias_ptr, column, width)
    out = (activate(gate, ACTIVATION) * up).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * width + column, out, mask=inside)


@triton.jit
def backward_kernel(
    dout_ptr, gate_ptr, up_ptr, gate_bias_ptr, up_bias_ptr, dgate_ptr, dup_ptr, gate_sums_ptr,
    up_sums_ptr, rows, width, dout_stride, gate_stride, up_stride, gradient_stride,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    split, splits = tl.program_id(0), tl.num_programs(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    gate_bias = load_bias(gate_bias_ptr, column, width)
    up_bias = load_bias(up_bias_ptr, column, width)
    gate_sum = tl.zeros([ROWS, COLUMNS], tl.float32)
    up_sum = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(split * ROWS, rows, splits * ROWS):
        row = (start + tl.arange(0, ROWS))[:, None]
        inside = (row < rows) & (column < width)
        row = row.to(tl.int64)
        gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0)
        up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0)
        dout = tl.load(dout_ptr + row * dout_stride + column, mask=inside, other=0.0)
        z, dout = gate.to(tl.float32) + gate_bias, dout.to(tl.float32)
        p, density = distribution(z, ACTIVATION)
        dgate = dout * (up.to(tl.float32) + up_bias) * (p + z * density)
        dup = dout * (z * p)
        if gate_sums_ptr is not None:
            gate_sum += dgate
            up_sum += dup
        at = row * gradient_stride + column
        tl.store(dgate_ptr + at, dgate.to(dgate_ptr.dtype.element_ty), mask=inside)
        tl.store(dup_ptr + at, dup.to(dup_ptr.dtype.element_ty), mask=inside)
    if gate_sums_ptr is not None:
        at = split.to(tl.int64) * 2 * width + column
        tl.store(gate_sums_ptr + at, tl.sum(gate_sum, 0)[None, :], mask=column < width)
        tl.store(up_sums_ptr + at, tl.sum(up_sum, 0)[None, :], mask=column < width)


Halves = tuple[Tensor | None, Tensor | None]


def _halves(packed: Tensor | None, gate_first: bool) -> Halves:
    """The gate's and the up's half of the last axis, where they lie."""
    if packed is None:
        return None, None
    first, second = packed.chunk(2, -1)
    return (first, second) if gate_first else (second, first)


@dataclass(frozen=True)
class _Inputs:
    """Rows `(M, H)` of gate and up, and their biases `(H,)` or None."""

    gate: Tensor
    up: Tensor
    biases: Halves

    @classmethod
    def of(cls, x: Tensor, up: Tensor | None, bias: Tensor | None, gate_first: bool) -> _Inputs:
        flat, bias = launch.flat_rows(x), None if bias is None else bias.contiguous()
        parts = _halves(flat, gate_first) if up is None else (flat, launch.flat_rows(up))
        return cls(*parts, _halves(bias, gate_first))

    def grid(self, tile: Tile) -> tuple[int, int, int, int]:
        """Rows and columns of a tile, and how many tiles there are along each axis."""
        rows, width = self.gate.shape
        columns = launch.column_block(width, tile.columns)
        tall = tile.elements // columns
        return tall, columns, triton.cdiv(rows, tall), triton.cdiv(width, columns)

    def key(self, activation: str) -> tuple:
        """What the choice of a tile depends on."""
        rows, width = self.gate.shape
        biased = self.biases[0]
        kind = None if biased is None else biased.dtype
        return tuning.shape_class(rows), width, self.gate.dtype, kind, activation


def glu(
    x: Tensor, up: Tensor | None, bias: Tensor | None, activation: str, gate_first: bool,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The schema op's forward: reads gate and up, writes out, a given one or its own."""
    width = x.shape[-1] // 2 if up is None else x.shape[-1]
    out = launch.result(x, out, (*x.shape[:-1], width))
    if out.numel() == 0:
        return out
    inputs = _Inputs.of(x, up, bias, gate_first)
    strides = inputs.gate.stride(0), inputs.up.stride(0)

    def run(tile: Tile) -> None:
        tall, columns, *grid = inputs.grid(tile)
        forward_kernel[tuple(grid)](
            inputs.gate, inputs.up, *inputs.biases, out, *inputs.gate.shape, *strides,
            activation, tall, columns, num_warps=tile.num_warps,
        )  # fmt: skip

    with launch.on_device(x):
        key, default = inputs.key(activation), FORWARD[x.element_size()]
        run(tuning.choose("glu", key, default, FORWARD_CANDIDATES, run))
    return out


def glu_backward(
    dout: Tensor, x: Tensor, up: Tensor | None, bias: Tensor | None, activation: str,
    gate_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The schema op's backward: reads dout, gate and up, writes their gradients; the bias's by
    partial sums."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dup = x.new_empty(0 if up is None else up.shape)
    dbias = x.new_empty(0) if bias is None else torch.empty_like(bias.contiguous())
    if dout.numel() == 0:
        return dx, dup, dbias.zero_()
    inputs, dflat = _Inputs.of(x, up, bias, gate_first), launch.flat_rows(dout)
    width = inputs.gate.shape[1]
    if up is None:
        gradients = _halves(dx.view(-1, 2 * width), gate_first)
    else:
        gradients = dx.view(-1, width), dup.view(-1, width)
    strides = dflat.stride(0), inputs.gate.stride(0), inputs.up.stride(0), gradients[0].stride(0)

    def run(tile: Tile) -> None:
        tall, columns, splits, blocks = inputs.grid(tile)
        sums = None
        if bias is not None:
            splits = min(splits, max(1, tile.programs // blocks))
            sums = partials.partials(splits, 2 * width, x)
        backward_kernel[(splits, blocks)](
            dflat, inputs.gate, inputs.up, *inputs.biases, *gradients, *_halves(sums, gate_first),
            *inputs.gate.shape, *strides, activation, tall, columns, num_warps=tile.num_warps,
        )  # fmt: skip
        if sums is not None:
            partials.sum_rows(sums, dbias)

    with launch.on_device(x):
        key, default = inputs.key(activation), BACKWARD[x.element_size()]
        run(tuning.choose("glu_backward", key, default, BACKWARD_CANDIDATES, run))
    return dx, dup, dbias


def _unsupported(x, up, bias, activation, gate_first) -> str | None:
    if x.numel() // max(1, x.shape[-1]) >= 2**31:
        return "x has 2^31 rows or more"
    return launch.unsupported_dtype(x=x, up=up, bias=bias)


def _unsupported_backward(dout, *args) -> str | None:
    return launch.unsupported_dtype(dout=dout) or _unsupported(*args)


KERNELS = (
    Kernel("glu", "cuda", "triton", glu, _unsupported, takes_out=True),
    Kernel("glu_backward", "cuda", "triton", glu_backward, _unsupported_backward),
)
