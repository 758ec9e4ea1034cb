"""Integer and floating-point arithmetic, logic, comparisons and moves.

Approximate instructions (`ex2.approx`, `div.full`, ...) are computed to the last bit of the type;
the hardware's differ by an ulp or two. Any modifier that is not listed raises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdit.testing.simulator.parser import Instruction, Pair, Vector
from fastdit.testing.simulator.values import SIGNED, UNSIGNED, Type, encode, flush, type_of

if TYPE_CHECKING:
    from fastdit.testing.simulator.machine import Machine


def allow(instruction: Instruction, *modifiers: str) -> set[str]:
    """The modifiers before the type; raises where one is not among those the caller handles."""
    found = set(instruction.modifiers[:-1])
    if found - set(modifiers):
        raise NotImplementedError(f"modifiers {sorted(found - set(modifiers))}")
    return found


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.dtype.kind == "f":
        return a / b
    divisor = np.where(b == 0, np.ones_like(b), b)
    quotient = (a - np.fmod(a, divisor)) // divisor
    return np.where(b == 0, ~np.zeros_like(a), quotient)  # all ones, as the hardware gives


def _remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.where(b == 0, a, np.fmod(a, np.where(b == 0, np.ones_like(b), b)))


def _fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    if a.dtype.kind != "f":
        return a * b + c
    # Exact product in fp64, so that fp32 and narrower are rounded (nearly always) once.
    return (a.astype(np.float64) * b + c).astype(a.dtype)


def _least(a: np.ndarray, *rest: np.ndarray) -> np.ndarray:
    for b in rest:
        a = np.fmin(a, b)
    return a


def _greatest(a: np.ndarray, *rest: np.ndarray) -> np.ndarray:
    for b in rest:
        a = np.fmax(a, b)
    return a


_ROUND = ("rn", "ftz", "sat")
_APPROXIMATE = ("approx", "full", "rn", "ftz")
_ELEMENTWISE: dict[str, tuple[Callable[..., np.ndarray], tuple[str, ...]]] = {
    "add": (np.add, _ROUND),
    "sub": (np.subtract, _ROUND),
    "mul": (np.multiply, (*_ROUND, "lo")),
    "mad": (_fused, (*_ROUND, "lo")),
    "fma": (_fused, _ROUND),
    "div": (_divide, _APPROXIMATE),
    "rem": (_remainder, ()),
    "min": (_least, ("ftz",)),
    "max": (_greatest, ("ftz",)),
    "neg": (np.negative, ("ftz",)),
    "abs": (np.abs, ("ftz",)),
    "and": (np.bitwise_and, ()),
    "or": (np.bitwise_or, ()),
    "xor": (np.bitwise_xor, ()),
    "not": (np.invert, ()),
    "copysign": (lambda sign, magnitude: np.copysign(magnitude, sign), ()),
    "sqrt": (np.sqrt, _APPROXIMATE),
    "rsqrt": (lambda a: 1 / np.sqrt(a), _APPROXIMATE),
    "rcp": (lambda a: 1 / a, _APPROXIMATE),
    "ex2": (np.exp2, _APPROXIMATE),
    "lg2": (np.log2, _APPROXIMATE),
    "sin": (np.sin, _APPROXIMATE),
    "cos": (np.cos, _APPROXIMATE),
    "tanh": (np.tanh, _APPROXIMATE),
}
_APPROXIMATED = {"sqrt", "rsqrt", "rcp", "ex2", "lg2", "sin", "cos", "tanh"}


def _elementwise(machine: Machine, instruction: Instruction, mask: np.ndarray) -> None:
    if {"cc", "hi", "wide"} & set(instruction.modifiers):
        (_carry if "cc" in instruction.modifiers else _wide)(machine, instruction, mask)
        return
    if {"NaN", "xorsign"} & set(instruction.modifiers):
        _nan_extremum(machine, instruction, mask)
        return
    function, modifiers = _ELEMENTWISE[instruction.name]
    result, inputs = _types(instruction)
    found = allow(instruction, *modifiers, *(("f32",) if result != inputs[0] else ()))
    destination, *operands = instruction.operands
    values = [machine.read(x, t) for x, t in zip(operands, inputs, strict=False)]
    if "ftz" in found:
        values = [flush(value) for value in values]
    if result != inputs[0]:
        values = [value.astype(result.dtype) for value in values]
    if instruction.name in _APPROXIMATED:
        values = [value.astype(np.float64) for value in values]
    out = function(*values)
    if "sat" in found:
        out = np.clip(np.nan_to_num(out, nan=0.0), 0, 1)
    out = out.astype(result.dtype)
    machine.write(destination, flush(out) if "ftz" in found else out, result, mask)


def _types(instruction: Instruction) -> tuple[Type, list[Type]]:
    """Result and inputs. Blackwell's `fma.f32.bf16` multiplies bfloat16 and adds to fp32."""
    last = type_of(instruction.type)
    count = len(instruction.operands) - 1
    if last.bits == 16 and "f32" in instruction.modifiers[:-1]:
        wide = type_of("f32")
        return wide, [last] * (count - 1) + [wide]
    return last, [last] * count


def _nan_extremum(machine: Machine, instruction: Instruction, mask: np.ndarray) -> None:
    allow(instruction, "ftz", "NaN")
    type_ = type_of(instruction.type)
    first, *rest = (machine.read(x, type_) for x in instruction.operands[1:])
    for value in rest:
        first = (np.minimum if instruction.name == "min" else np.maximum)(first, value)
    machine.write(instruction.operands[0], first, type_, mask)


def _high(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The upper half of the double-width product."""
    bits = a.dtype.itemsize * 8
    if bits < 64:
        wide = (SIGNED if a.dtype.kind == "i" else UNSIGNED)[2 * bits]
        return (a.astype(wide) * b.astype(wide) >> wide(bits)).astype(a.dtype)
    product = np.multiply(*np.broadcast_arrays(a.astype(object), b.astype(object))) >> 64
    return (product & (2**64 - 1)).astype(np.uint64).view(a.dtype)


def _wide(machine: Machine, instruction: Instruction, mask: np.ndarray) -> None:
    """`mul` and `mad` with `.wide` (all bits of the product) or `.hi` (the upper half)."""
    found = allow(instruction, "wide", "hi")
    type_ = type_of(instruction.type)
    result = Type(type_.kind, 2 * type_.bits) if "wide" in found else type_
    a, b = (machine.read(x, type_) for x in instruction.operands[1:3])
    product = a.astype(result.dtype) * b.astype(result.dtype) if "wide" in found else _high(a, b)
    if instruction.name == "mad":
        product = product + machine.read(instruction.operands[3], result)
    machine.write(instruction.operands[0], product, result, mask)


def _carry(machine: Machine, instruction: Instruction, mask: np.ndarray) -> None:
    """`add.cc`, `addc`, `mad.lo.cc`, `madc.hi`: 32-bit sums that pass a carry on."""
    found = allow(instruction, "cc", "lo", "hi")
    type_ = type_of(instruction.type)
    if type_.bits != 32:
        raise NotImplementedError(f"carry of .{instruction.type}")
    u32 = type_of("u32")
    values = [machine.read(x, u32).astype(np.uint64) for x in instruction.operands[1:]]
    if instruction.name.startswith("mad"):
        product = values.pop(0) * values.pop(0)
        half = product >> 32 if "hi" in found else product & 0xFFFF_FFFF
        values.insert(0, half.astype(np.uint64))
    total = values[0] + values[1]
    if instruction.name.endswith("c"):
        total = total + machine.carry
    if "cc" in found:
        machine.carry = np.where(mask, total >> np.uint64(32), machine.carry).astype(np.uint64)
    machine.write(instruction.operands[0], (total & 0xFFFF_FFFF).astype(np.uint32), u32, mask)


def _unordered(compare: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    return lambda a, b: compare(a, b) | np.isnan(a) | np.isnan(b)


_ORDERED: dict[str, Callable[..., np.ndarray]] = {
    "eq": np.equal,
    "ne": lambda a, b: (a < b) | (a > b),
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
}
_COMPARE = (
    _ORDERED
    | {"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}
    | {f"{name}u": _unordered(_ORDERED[name]) for name in ("eq", "ne", "lt", "le", "gt", "ge")}
    | {"nan": lambda a, b: np.isnan(a) | np.isnan(b)}
)
_COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _set_predicate(machine: Machine, instruction: Instruction, mask: np.ndarray) -> None:
    type_ = type_of(instruction.type)
    found = allow(instruction, *_COMPARE, *_COMBINE, "ftz")
    a, b = (machine.read(x, type_) for x in instruction.operands[1:3])
    if "ftz" in found:
        a, b = flush(a), flush(b)
    out = _COMPARE[instruction.modifiers[0]](a, b)
    destination = instruction.operands[0]
    both = destination if isinstance(destination, Pair) else Pair(destination, destination)
    results = [(both.second, ~out), (both.first, out)]
    for operand, value in results:
        if len(instruction.operands) == 4:
            combine = next(_COMBINE[m] for m in instruction.modifiers if m in _COMBINE)
            value = combine(value, machine.read(instruction.operands[3], type_of("pred")))
        machine.write(operand, value, type_of("pred"), mask)


def _select(machine: Machine, instruction: Instruction, mask: np.ndarray) -> None:
    allow(instruction)
    bits = Type("b", type_of(instruction.type).width)
    a, b = (machine.read(x, bits) for x in instruction.operands[1:3])
    chosen = np.where(machine.read(instruction.operands[3], type_of("pred")), a, b)
    machine.write(instruction.operands[0], chosen, bits, mask)


def _move(machine: Machine, instruction: Instruction, mask: np.ndarray) -> None:
    allow(instruction)
    type_ = type_of(instruction.type)
    destination, source = instruction.operands
    bits = type_ if type_.kind == "p" else Type("b", type_.width)
    if isinstance(source, Vector):
        part = Type("b", bits.bits // len(source.items))
        parts = [machine.spread(machine.read(item, part)) for item in source.items]
        value = encode(np.stack(parts, -1), Type("b", part.bits, len(parts)))
        value = value.view(UNSIGNED[bits.bits]).reshape(machine.lanes)
    else:
        value = machine.read(source, bits)
    if isinstance(destination, Vector):
        part = Type("b", bits.bits // len(destination.items))
        pieces = np.ascontiguousarray(machine.spread(value)).view(part.dtype)
        for item, piece in zip(destination.items, pieces.reshape(machine.lanes, -1).T, strict=True):
            machine.write(item, piece, part, mask)
    else:
        machine.write(destination, value, bits, mask)


OPERATIONS: dict[str, Any] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    "addc": _carry,
    "madc": _carry,
    "setp": _set_predicate,
    "selp": _select,
    "mov": _move,
}
