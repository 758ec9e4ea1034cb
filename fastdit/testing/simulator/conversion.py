"""`cvt` and `cvta`: conversions between number types and between address spaces."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fastdit.testing.simulator.parser import Instruction
from fastdit.testing.simulator.values import Type, flush, type_of

if TYPE_CHECKING:
    from fastdit.testing.simulator.machine import Machine

_TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
_MODIFIERS = {"rn", "rna", "ftz", "sat", *_TO_INTEGER}


def _convert(machine: Machine, instruction: Instruction, mask: np.ndarray) -> None:
    *before, target, source = instruction.modifiers
    found = set(before)
    if found - _MODIFIERS:
        raise NotImplementedError(f"modifiers {sorted(found - _MODIFIERS)}")
    destination, *operands = instruction.operands
    if target == "tf32":
        _to_tf32(machine, instruction, mask)
        return
    result, type_ = type_of(target), type_of(source)
    values = [machine.read(x, type_) for x in operands]
    if "ftz" in found:
        values = [flush(value) for value in values]
    if len(values) == 2:  # two fp32 into one packed register, the second operand in the low half
        packed = np.stack(np.broadcast_arrays(values[1], values[0]), -1)
        machine.write(destination, packed.astype(result.dtype), result, mask)
        return
    out = _number(values[0], type_, result, found)
    machine.write(destination, flush(out) if "ftz" in found else out, result, mask)


def _number(value: np.ndarray, source: Type, result: Type, found: set[str]) -> np.ndarray:
    rounding = next((_TO_INTEGER[m] for m in found if m in _TO_INTEGER), None)
    if not source.is_float:
        if "sat" in found:
            raise NotImplementedError("saturating integer conversion")
        return value.astype(result.dtype)
    if result.is_float:
        value = value if rounding is None else rounding(value)
        if "sat" in found:
            value = np.clip(np.nan_to_num(value, nan=0.0), 0, 1)
        return value.astype(result.dtype)
    if rounding is None:
        raise NotImplementedError("conversion to an integer without a rounding")
    limits = np.iinfo(result.dtype)
    rounded = np.nan_to_num(rounding(value).astype(np.float64), nan=0.0)
    inside = np.clip(rounded, limits.min, limits.max)
    # The largest 64-bit integers are not fp64 numbers: astype would wrap them round.
    too_large = rounded >= float(limits.max)
    out = np.where(too_large, 0, inside).astype(result.dtype)
    return np.where(too_large, limits.max, out).astype(result.dtype)


def _to_tf32(machine: Machine, instruction: Instruction, mask: np.ndarray) -> None:
    """`cvt.rna.tf32.f32`: 10 bits of mantissa, to nearest, ties away from zero."""
    if "rna" not in instruction.modifiers:
        raise NotImplementedError("conversion to tf32 other than .rna")
    u32 = type_of("u32")
    bits = machine.read(instruction.operands[1], u32)
    finite = (bits & 0x7F80_0000) != 0x7F80_0000
    rounded = np.where(finite, (bits + np.uint32(0x1000)) & np.uint32(0xFFFF_E000), bits)
    machine.write(instruction.operands[0], rounded, u32, mask)


def _convert_address(machine: Machine, instruction: Instruction, mask: np.ndarray) -> None:
    """Global and generic addresses are one; shared and local ones are never dereferenced as
    generic, or the access is out of bounds."""
    type_ = type_of(instruction.type)
    machine.write(
        instruction.operands[0], machine.read(instruction.operands[1], type_), type_, mask
    )


OPERATIONS: dict[str, Any] = {"cvt": _convert, "cvta": _convert_address}
