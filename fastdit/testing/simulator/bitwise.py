"""Shifts, bit fields, byte permutations and other instructions on bit patterns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fastdit.testing.simulator.arithmetic import allow
from fastdit.testing.simulator.parser import Immediate, Instruction
from fastdit.testing.simulator.values import Type, type_of

if TYPE_CHECKING:
    from fastdit.testing.simulator.machine import Machine


def _shift(machine: Machine, instruction: Instruction, mask: np.ndarray) -> None:
    allow(instruction)
    type_ = type_of(instruction.type)
    value = machine.read(instruction.operands[1], type_)
    count = machine.read(instruction.operands[2], type_of("u32"))
    by = np.minimum(count, type_.bits - 1).astype(type_.dtype)
    if instruction.name == "shl":
        out = np.where(count >= type_.bits, 0, np.left_shift(value, by))
    else:
        gone = 0 if type_.kind != "s" else np.right_shift(value, by)
        out = np.where(count >= type_.bits, gone, np.right_shift(value, by))
    machine.write(instruction.operands[0], out.astype(type_.dtype), type_, mask)


def _funnel_shift(machine: Machine, instruction: Instruction, mask: np.ndarray) -> None:
    found = allow(instruction, "l", "r", "wrap", "clamp")
    low, high, count = _unsigned(machine, instruction.operands[1:4])
    count = np.minimum(count, 32) if "clamp" in found else count & 31
    both = (high << np.uint64(32)) | low
    out = (both << count) >> np.uint64(32) if "l" in found else both >> count
    _write_low(machine, instruction, out, mask)


def _unsigned(machine: Machine, operands: Any) -> list[np.ndarray]:
    return [machine.read(x, type_of("u32")).astype(np.uint64) for x in operands]


def _write_low(
    machine: Machine, instruction: Instruction, out: np.ndarray, mask: np.ndarray
) -> None:
    low = (out & np.uint64(0xFFFF_FFFF)).astype(np.uint32)
    machine.write(instruction.operands[0], low, type_of("u32"), mask)


def _permute(machine: Machine, instruction: Instruction, mask: np.ndarray) -> None:
    allow(instruction)
    low, high, selector = _unsigned(machine, instruction.operands[1:4])
    both = (high << np.uint64(32)) | low
    out = np.zeros_like(both)
    for byte in range(4):
        choice = (selector >> np.uint64(4 * byte)) & np.uint64(15)
        value = (both >> (np.uint64(8) * (choice & np.uint64(7)))) & np.uint64(255)
        sign = np.where(value & np.uint64(128), np.uint64(255), np.uint64(0))
        out = out | np.where(choice & np.uint64(8), sign, value) << np.uint64(8 * byte)
    _write_low(machine, instruction, out, mask)


def _lookup3(machine: Machine, instruction: Instruction, mask: np.ndarray) -> None:
    allow(instruction)
    u32 = type_of("u32")
    a, b, c = (machine.read(x, u32) for x in instruction.operands[1:4])
    table = instruction.operands[4]
    assert isinstance(table, Immediate)
    out = np.zeros(machine.lanes, np.uint32)
    for case in range(8):
        if table.bits >> case & 1:
            terms = (x if case & bit else ~x for x, bit in ((a, 4), (b, 2), (c, 1)))
            out = out | np.bitwise_and.reduce(np.broadcast_arrays(*terms))
    machine.write(instruction.operands[0], out, u32, mask)


def _extract(machine: Machine, instruction: Instruction, mask: np.ndarray) -> None:
    """`bfe`: a bit field, sign-extended for a signed type."""
    allow(instruction)
    type_ = type_of(instruction.type)
    value = machine.read(instruction.operands[1], Type("u", type_.bits)).astype(np.uint64)
    start, length = (x & np.uint64(255) for x in _unsigned(machine, instruction.operands[2:4]))
    if type_.bits != 32 or (start + length > 32).any():
        raise NotImplementedError("bfe beyond 32 bits")
    field = (value >> start) & ((np.uint64(1) << length) - np.uint64(1))
    if type_.kind == "s":
        sign = np.uint64(1) << (np.maximum(length, 1) - np.uint64(1))
        field = np.where(length == 0, 0, (field ^ sign) - sign).astype(np.uint64)
    _write_low(machine, instruction, field, mask)


def _insert(machine: Machine, instruction: Instruction, mask: np.ndarray) -> None:
    """`bfi`: put the low bits of a into b."""
    allow(instruction)
    a, b, start, length = _unsigned(machine, instruction.operands[1:5])
    field = ((np.uint64(1) << length) - np.uint64(1)) << start
    _write_low(machine, instruction, (b & ~field) | ((a << start) & field), mask)


def _count_bits(machine: Machine, instruction: Instruction, mask: np.ndarray) -> None:
    allow(instruction)
    type_ = type_of(instruction.type)
    value = machine.read(instruction.operands[1], Type("u", type_.bits))
    octets = np.ascontiguousarray(value).view(np.uint8).reshape(value.size, -1)
    bits = np.unpackbits(octets[:, ::-1], axis=1)
    if instruction.name == "popc":
        out = bits.sum(1)
    else:  # clz
        out = np.where(bits.any(1), bits.argmax(1), type_.bits)
    machine.write(instruction.operands[0], out.astype(np.uint32), type_of("u32"), mask)


def _reverse_bits(machine: Machine, instruction: Instruction, mask: np.ndarray) -> None:
    allow(instruction)
    value = np.ascontiguousarray(machine.read(instruction.operands[1], type_of("u32")))
    bits = np.unpackbits(value.view(np.uint8).reshape(-1, 4), axis=1, bitorder="little")
    out = np.packbits(bits[:, ::-1], axis=1, bitorder="little").view(np.uint32)[:, 0]
    machine.write(instruction.operands[0], out, type_of("u32"), mask)


OPERATIONS: dict[str, Any] = {
    "shl": _shift,
    "shr": _shift,
    "shf": _funnel_shift,
    "prmt": _permute,
    "lop3": _lookup3,
    "bfe": _extract,
    "bfi": _insert,
    "popc": _count_bits,
    "clz": _count_bits,
    "brev": _reverse_bits,
}
