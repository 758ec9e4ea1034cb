"""Registers hold bit patterns; PTX types say what numbers they are.

`decode` and `encode` translate between unsigned integers and numpy's numbers. A packed type such
as `f16x2` becomes a second axis of two; `bf16` is computed in fp32 and rounded when encoded.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastdit.testing.bfloat16 import bfloat16_to_float, float_to_bfloat16

UNSIGNED: dict[int, Any] = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED: dict[int, Any] = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOAT: dict[int, Any] = {16: np.float16, 32: np.float32, 64: np.float64}


@dataclass(frozen=True)
class Type:
    """A PTX type: kind `u`, `s`, `b`, `f`, `bf` or `p`, bits of one lane, lanes of a register."""

    kind: str
    bits: int
    lanes: int = 1

    @property
    def is_float(self) -> bool:
        return self.kind in ("f", "bf")

    @property
    def width(self) -> int:
        return self.bits * self.lanes

    @property
    def dtype(self) -> np.dtype:
        """The numpy type that numbers of this type are computed in."""
        if self.kind == "bf":
            return np.dtype(np.float32)
        table = {"f": FLOAT, "s": SIGNED}.get(self.kind, UNSIGNED)
        return np.dtype(bool) if self.kind == "p" else np.dtype(table[self.bits])


@functools.cache
def type_of(name: str) -> Type:
    """The type of a PTX modifier such as `f32` or `bf16x2`.

    Raises:
        NotImplementedError: it is none that the simulator computes with.
    """
    if name == "pred":
        return Type("p", 1)
    match = re.fullmatch(r"(u|s|b|f|bf)(8|16|32|64)(?:x(2))?", name)
    if match is None or (match[1] == "bf" and match[2] != "16"):
        raise NotImplementedError(f"type .{name}")
    return Type(match[1], int(match[2]), int(match[3] or 1))


def decode(bits: np.ndarray, type_: Type) -> np.ndarray:
    """Numbers of bit patterns of any width; a wider pattern gives its low bits."""
    if bits.dtype == bool:
        return bits
    if type_.kind == "p":
        return bits.astype(bool)
    bits = np.ascontiguousarray(bits.astype(UNSIGNED[type_.width], copy=False))
    if type_.lanes > 1:
        bits = bits.view(UNSIGNED[type_.bits]).reshape(*bits.shape, type_.lanes)
    if type_.kind == "bf":
        return bfloat16_to_float(bits)
    return bits.view(type_.dtype)


def encode(values: np.ndarray, type_: Type) -> np.ndarray:
    """Bit patterns of numbers, rounded to the type where it is narrower."""
    if type_.kind == "p":
        return values.astype(bool)
    if type_.kind == "bf":
        bits = float_to_bfloat16(values)
    else:
        bits = np.ascontiguousarray(values.astype(type_.dtype, copy=False))
        bits = bits.view(UNSIGNED[type_.bits])
    if type_.lanes > 1:
        bits = np.ascontiguousarray(bits).view(UNSIGNED[type_.width])[..., 0]
    return bits


def flush(values: np.ndarray) -> np.ndarray:
    """`.ftz`: fp32 subnormals become zeros of their sign."""
    if values.dtype != np.float32:
        return values
    tiny = np.abs(values) < np.finfo(np.float32).tiny
    return np.where(tiny, np.copysign(np.float32(0), values), values)
