"""Small Triton kernels whose traffic, instructions and faults are known by hand."""

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def vector_add(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    x = tl.load(x_ptr + at, mask=inside)
    y = tl.load(y_ptr + at, mask=inside)
    tl.store(out_ptr + at, x + y, mask=inside)


@triton.jit
def strided_copy(x_ptr, out_ptr, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at * STRIDE))


@triton.jit
def unmasked_copy(x_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at))


@triton.jit
def load_a_pair(x_ptr, out_ptr, start):
    """8 bytes at once, from 4-byte elements."""
    pair = tl.load((x_ptr + start).to(tl.pointer_type(tl.int64)))
    tl.store(out_ptr, pair)


@triton.jit
def overlapping_copy(x_ptr, out_ptr, STEP: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at))


@triton.jit
def one_cell_store(out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at // 2, at.to(tl.float32))


@triton.jit
def shift_in_place(x_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + at, tl.load(x_ptr + at + BLOCK))


@triton.jit
def count_up(counter_ptr, BLOCK: tl.constexpr):
    tl.atomic_add(counter_ptr + tl.arange(0, BLOCK) % 2, 1.0)


@triton.jit
def columns_sum(x_ptr, out_ptr, stride, D: tl.constexpr):
    row = tl.program_id(0)
    tl.store(out_ptr + row, tl.sum(tl.load(x_ptr + row * stride + tl.arange(0, D)), 0))


@triton.jit
def centre_and_scale(x, mean, scale):
    return (x - mean) * scale


@triton.jit
def keep_a_row(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """A row that lives in registers from its load to its second use."""
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    mean = tl.sum(x, 0) / BLOCK
    tl.store(out_ptr + at, centre_and_scale(x, mean, tl.sum(x * x, 0)))


@triton.jit
def tile_product(
    a_ptr,
    b_ptr,
    out_ptr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    rows, columns, depth = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + rows[:, None] * K + depth[None, :])
    b = tl.load(b_ptr + depth[:, None] * N + columns[None, :])
    product = tl.dot(a, b, input_precision=PRECISION)
    tl.store(out_ptr + rows[:, None] * N + columns[None, :], product)


@triton.jit
def pipelined_product(
    a_ptr, b_ptr, out_ptr, depth, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr
):
    """Tiles of K columns at a time, loaded ahead with asynchronous copies."""
    rows, columns, at = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    total = tl.zeros([M, N], tl.float32)
    for start in range(0, depth, K):
        a = tl.load(a_ptr + rows[:, None] * depth + (start + at)[None, :])
        b = tl.load(b_ptr + (start + at)[:, None] * N + columns[None, :])
        total = tl.dot(a, b, total)
    tl.store(out_ptr + rows[:, None] * N + columns[None, :], total)


@triton.jit
def copy_and_cast(x_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at).to(out_ptr.dtype.element_ty))


@triton.jit
def bfloat16_arithmetic(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + at), tl.load(y_ptr + at)
    tl.store(out_ptr + at, x * y)
    tl.store(out_ptr + BLOCK + at, -x + y)
    tl.store(out_ptr + 2 * BLOCK + at, tl.where(x < y, x, y))
    tl.store(out_ptr + 3 * BLOCK + at, tl.full([BLOCK], 1.5, tl.bfloat16) - x)


@triton.jit
def many_functions(x_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    tl.store(out_ptr + at, tl.exp(x))
    tl.store(out_ptr + BLOCK + at, tl.log(x))
    tl.store(out_ptr + 2 * BLOCK + at, tl.rsqrt(x))
    tl.store(out_ptr + 3 * BLOCK + at, tl.erf(x))
    tl.store(out_ptr + 4 * BLOCK + at, tl.sigmoid(x))
    tl.store(out_ptr + 5 * BLOCK + at, tl.cumsum(x, 0))
    tl.store(out_ptr + 6 * BLOCK + at, tl.math.fma(x, x, x))


@triton.jit
def tanh_of(x_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, libdevice.tanh(tl.load(x_ptr + at)))


@triton.autotune(
    configs=[triton.Config({"BLOCK": 64}), triton.Config({"BLOCK": 128}, num_warps=2)], key=["n"]
)
@triton.jit
def tuned_double(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at, mask=at < n) * 2, mask=at < n)


@triton.jit
def uniform_noise(out_ptr, seed, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.randn(seed, at), mask=at < n)
