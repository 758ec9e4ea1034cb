"""Tiles of one head: `rows × head_dim` as power-of-two column blocks, without padding to 128.

`tl.arange` and `tl.dot` take powers of two, a head of DiT-XL has 72 channels. Padded to 128, its
products would cost 78 % more; as 64 + 16, the last half masked, 11 %, which is the least that
tensor cores with a depth of 16 allow. A tile is therefore a tuple of blocks, its `PARTS` a tuple of
(first column, width): products over the channels add one `tl.dot` a part, products that make
channels keep one accumulator a part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from fastdit.kernels import launch, tuning

HEAD_DIMS = range(16, 129, 8)
LOG2_E = math.log2(math.e)
LEAST_SCALE = 1e-37  # times a score it is 0 beside 1 in every dtype
LEAST_PART = 16  # the depth of a tensor-core instruction for 16-bit operands


def parts_of(head_dim: int) -> tuple[tuple[int, int], ...]:
    """(first column, width) of the parts that cover `head_dim` with the fewest columns.

    The columns are `head_dim` rounded up to a multiple of 16, the parts its binary digits; two
    16s or a 16 and a 32 that complete a power of two are one part: 56 is 64, not 32 + 16 + 16.
    72 is 64 + 16, 80 is 64 + 16, 96 is 64 + 32, 104 and 112 are 64 + 32 + 16.
    """
    rest, start, parts = -(-head_dim // LEAST_PART) * LEAST_PART, 0, []
    while rest:
        width = 1 << (rest.bit_length() - 1)
        parts.append((start, width))
        start, rest = start + width, rest - width
    return tuple(parts)


def stride_unit(*heads: Tensor) -> int:
    """The largest power of two up to 16 that divides the batch and token strides of `heads`.

    Triton notices that an argument is a multiple of 16 and nothing less. A row of 72 channels
    starts at multiples of 8, enough for 128-bit accesses, but without the hint they are of 16 bits
    (0 wide loads and 120 narrow ones against 35 and 0, one head of 72 on sm_80). Strides are
    therefore passed in units of this number, which the kernel multiplies again.
    """
    return math.gcd(16, *(h.stride(axis) for h in heads for axis in (0, 2)))


@dataclass(frozen=True)
class Tile:
    """One row of a table of heuristics: for heads of up to `head_dim` channels and samples of up
    to `tokens`.

    Left to itself, ptxas spills a few registers to reach the next occupancy; `max_registers` tells
    it not to. AMD's compiler takes no limit.
    """

    head_dim: int
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tokens: float = math.inf
    max_registers: int | None = None


Table = Mapping[str, tuple[Tile, ...]]


def family_of(arch: int | str) -> str:
    """The row of a table of heuristics for Triton's architecture `arch`."""
    if isinstance(arch, str):
        return "gfx942"
    if arch in (86, 89) or arch >= 120:
        return "sm_86"
    return f"sm_{min(max(arch // 10 * 10, 80), 100)}"


def fitting(table: Table, family: str, head_dim: int, tokens: int) -> Tile:
    """The first row of a family, or of any, that takes such heads and samples."""
    return next(
        row
        for row in table.get(family, table.get("any", ()))
        if head_dim <= row.head_dim and tokens <= row.tokens
    )


def launch_tile(
    op: str, half: Table, single: Table, qkv: Tensor, head_dim: int, run: Callable[[Tile], None]
) -> None:
    """Launch with the first row that fits, of `half` for 16-bit and of `single` for 32-bit numbers,
    or, where autotuning is on, with the fastest row of any family."""
    table, tokens = half if qkv.element_size() == 2 else single, qkv.shape[1]
    family = family_of(launch.arch_of(qkv.device))
    default = fitting(table, family, head_dim, tokens)
    candidates = [row for rows in table.values() for row in rows] if tuning.enabled() else []
    if family == "gfx942":
        candidates = [row for row in candidates if row.max_registers is None]
    key = (tuning.shape_class(tokens), head_dim, qkv.dtype)
    run(tuning.choose(op, key, default, candidates, run))


def kernel_options(tile: Tile, tokens: int, head_dim: int, unit: int, scale: float) -> dict:
    """What every kernel takes by name."""
    limit = {} if tile.max_registers is None else {"maxnreg": tile.max_registers}
    return {
        "HEAD_DIM": head_dim,
        "PARTS": parts_of(head_dim),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "UNIT": unit,
        "EVEN": tokens % tile.block_m == 0 and tokens % tile.block_n == 0,
        "FLIP": scale < 0,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        **limit,
    }


def size_of_log2(scale: float) -> float:
    """|scale|·log₂e; kernels flip a tile where scale is negative. Never 0, for a masked score of
    −∞ has to stay −∞."""
    return max(abs(scale), LEAST_SCALE) * LOG2_E


def readable(qkv: Tensor) -> Tensor:
    """`qkv`, copied only where the kernels cannot address it: channels apart, or tokens so far
    apart that a tile of 128 rows leaves 32 bits."""
    if qkv.stride(2) != 1 or qkv.stride(1) * 128 >= 2**31:
        return qkv.contiguous()
    return qkv


@triton.jit
def load_tile(
    ptr, stride, rows, inside, HEAD_DIM: tl.constexpr, PARTS: tl.constexpr, EVEN: tl.constexpr
):
    """The rows `rows` of one head, zero where `inside` is False; EVEN: it is True everywhere."""
    tile = ()
    for i in tl.static_range(len(PARTS)):
        at = PARTS[i][0] + tl.arange(0, PARTS[i][1])
        address = ptr + (rows[:, None] * stride + at[None, :])
        if not EVEN:
            mask = inside[:, None] & (at[None, :] < HEAD_DIM)
            part = tl.load(address, mask=mask, other=0.0)
        elif PARTS[i][0] + PARTS[i][1] > HEAD_DIM:
            part = tl.load(address, mask=at[None, :] < HEAD_DIM, other=0.0)
        else:
            part = tl.load(address)
        tile = tile + (part,)  # noqa: RUF005, Triton has no unpacking
    return tile


@triton.jit
def store_tile(
    ptr, stride, rows, inside, tile, HEAD_DIM: tl.constexpr, PARTS: tl.constexpr, EVEN: tl.constexpr
):
    """Round `tile` to the dtype of `ptr` and store its rows where `inside` is True."""
    for i in tl.static_range(len(PARTS)):
        at = PARTS[i][0] + tl.arange(0, PARTS[i][1])
        address = ptr + (rows[:, None] * stride + at[None, :])
        part = tile[i].to(ptr.dtype.element_ty)
        if not EVEN:
            tl.store(address, part, mask=inside[:, None] & (at[None, :] < HEAD_DIM))
        elif PARTS[i][0] + PARTS[i][1] > HEAD_DIM:
            tl.store(address, part, mask=at[None, :] < HEAD_DIM)
        else:
            tl.store(address, part)


@triton.jit
def flipped_tile(tile, FLIP: tl.constexpr):
    """`tile`, negated where the scale of its products is negative."""
    flipped = tile
    if FLIP:
        flipped = ()
        for i in tl.static_range(len(tile)):
            flipped = flipped + (-tile[i],)  # noqa: RUF005
    return flipped


@triton.jit
def zero_tile(ROWS: tl.constexpr, PARTS: tl.constexpr):
    """An accumulator in float32."""
    tile = ()
    for i in tl.static_range(len(PARTS)):
        tile = tile + (tl.zeros([ROWS, PARTS[i][1]], tl.float32),)  # noqa: RUF005
    return tile


@triton.jit
def scaled_tile(tile, factor):
    """`tile` times a number, or times one number a row."""
    scaled = ()
    for i in tl.static_range(len(tile)):
        scaled = scaled + (tile[i] * factor,)  # noqa: RUF005
    return scaled


@triton.jit
def dot_rows(a, b):
    """A·Bᵀ in float32: the dot product of every row of `a` with every row of `b`."""
    product = tl.dot(a[0], tl.trans(b[0]), input_precision="ieee")
    for i in tl.static_range(1, len(a)):
        product = tl.dot(a[i], tl.trans(b[i]), product, input_precision="ieee")
    return product


@triton.jit
def add_product(total, weights, tile):
    """`total` + `weights`·`tile`, the weights `(rows, rows of tile)`."""
    out = ()
    for i in tl.static_range(len(tile)):
        part = tl.dot(weights, tile[i], total[i], input_precision="ieee")
        out = out + (part,)  # noqa: RUF005
    return out


@triton.jit
def dot_same_rows(a, b):
    """The dot product of each row of `a` with the same row of `b`, in float32."""
    total = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), 1)
    for i in tl.static_range(1, len(a)):
        total += tl.sum(a[i].to(tl.float32) * b[i].to(tl.float32), 1)
    return total
