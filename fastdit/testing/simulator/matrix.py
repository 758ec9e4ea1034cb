"""Tensor-core instructions: ldmatrix, stmatrix and mma.sync of 16×8 tiles.

A warp holds a tile in fragments: lane l has group g = l // 4 and place t = l % 4, and each register
of a fragment holds fixed elements of the tile, by the tables of the PTX ISA.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fastdit.testing.simulator.parser import Address, Instruction, Vector
from fastdit.testing.simulator.values import Type, decode, type_of

if TYPE_CHECKING:
    from fastdit.testing.simulator.machine import Machine

_LANE = np.arange(32)
_GROUP, _PLACE = _LANE // 4, _LANE % 4


def _whole_warps(machine: Machine, mask: np.ndarray) -> np.ndarray:
    """Indices of the active warps; these instructions need all 32 lanes."""
    if not machine.whole_warps(mask):
        raise RuntimeError("a warp-wide matrix instruction with inactive lanes")
    return np.flatnonzero(mask[::32])


def _matrix_move(machine: Machine, instruction: Instruction, mask: np.ndarray) -> None:
    """ldmatrix and stmatrix: 8×8 matrices of 16-bit elements, a row's address from each lane."""
    modifiers = set(instruction.modifiers)
    number = {"x1": 1, "x2": 2, "x4": 4}[(modifiers & {"x1", "x2", "x4"}).pop()]
    known = {"sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared", "shared::cta", "b16"}
    if modifiers - known:
        raise NotImplementedError(f"modifiers {sorted(modifiers - known)}")
    warps = _whole_warps(machine, mask)
    loads = instruction.name == "ldmatrix"
    registers, address = instruction.operands if loads else instruction.operands[::-1]
    assert isinstance(registers, Vector)
    assert isinstance(address, Address)
    base = machine.spread(machine.read(address.base, type_of("u32"))).astype(np.int64)
    rows = (base + address.offset).reshape(-1, 32)[warps, : 8 * number]
    machine.shared.check(rows.ravel(), 16, instruction.name)
    phases = np.repeat(np.arange(warps.size * number), 8)
    machine.shared.traffic.requests += warps.size
    machine.shared.count(rows.ravel(), phases, 16)
    block = np.repeat(machine.block[32 * warps], 8).reshape(-1, 8, 1)
    for index, register in enumerate(registers.items):
        at = rows[:, 8 * index : 8 * index + 8, None] + np.arange(16)
        if loads:
            tile = np.ascontiguousarray(machine.shared.bytes[block, at]).view(np.uint16)
            tile = tile.transpose(0, 2, 1) if "trans" in modifiers else tile
            low, high = tile[:, _GROUP, 2 * _PLACE], tile[:, _GROUP, 2 * _PLACE + 1]
            value = np.zeros((machine.lanes // 32, 32), np.uint32)
            value[warps] = low | high.astype(np.uint32) << np.uint32(16)
            machine.write(register, value.ravel(), type_of("b32"), mask)
        else:
            value = machine.spread(machine.read(register, type_of("b32"))).reshape(-1, 32)[warps]
            tile = np.zeros((warps.size, 8, 8), np.uint16)
            tile[:, _GROUP, 2 * _PLACE] = value & np.uint32(0xFFFF)
            tile[:, _GROUP, 2 * _PLACE + 1] = value >> np.uint32(16)
            tile = tile.transpose(0, 2, 1) if "trans" in modifiers else tile
            machine.shared.bytes[block, at] = np.ascontiguousarray(tile).view(np.uint8)


def _fragments(machine: Machine, operand: Any, type_: Type, warps: np.ndarray) -> list[np.ndarray]:
    """Each register's numbers as (warp, lane, element) arrays."""
    assert isinstance(operand, Vector)
    values = (machine.spread(machine.read(item, type_)) for item in operand.items)
    return [value.reshape(machine.lanes // 32, 32, type_.lanes)[warps] for value in values]


def _multiply(machine: Machine, instruction: Instruction, mask: np.ndarray) -> None:
    """`mma.sync.m16n8k*.row.col`: D = A·B + C, accumulated in fp32."""
    shape = next((m for m in instruction.modifiers if m.startswith("m16n8k")), None)
    known = {"sync", "aligned", "row", "col", shape, "f32", "f16", "bf16", "tf32"}
    types = [m for m in instruction.modifiers if m in ("f32", "f16", "bf16", "tf32")]
    if shape is None or set(instruction.modifiers) - known or len(types) != 4:
        raise NotImplementedError(instruction.text)
    result, left, right, addend = types
    if left != right or result != addend or result not in ("f32", "f16"):
        raise NotImplementedError(f"mma types {types}")
    depth = int(shape.removeprefix("m16n8k"))
    packed = 1 if left == "tf32" else 2
    warps = _whole_warps(machine, mask)
    # The tensor cores ignore the 13 low bits of a tf32 operand.
    source = type_of("b32") if left == "tf32" else type_of(f"{left}x2")
    a, b = np.zeros((warps.size, 16, depth)), np.zeros((warps.size, depth, 8))
    for element in range(packed):
        column = packed * _PLACE + element
        for index, part in enumerate(_fragments(machine, instruction.operands[1], source, warps)):
            row, step = _GROUP + 8 * (index % 2), 4 * packed * (index // 2)
            a[:, row, column + step] = _operand(part[..., element], left)
        for index, part in enumerate(_fragments(machine, instruction.operands[2], source, warps)):
            b[:, column + 4 * packed * index, _GROUP] = _operand(part[..., element], left)
    out = type_of("f32") if result == "f32" else type_of("f16x2")
    d = a.astype(np.float32) @ b.astype(np.float32)
    for index, (register, part) in enumerate(
        zip(
            instruction.operands[0].items,  # type: ignore[union-attr]
            _fragments(machine, instruction.operands[3], out, warps),
            strict=True,
        )
    ):
        row = _GROUP + 8 * (index // 2 if result == "f32" else index)
        columns = [2 * _PLACE + (index % 2 if result == "f32" else e) for e in range(out.lanes)]
        total = np.stack([d[:, row, column] for column in columns], -1) + part
        value = np.zeros((machine.lanes // 32, 32, out.lanes), out.dtype)
        value[warps] = total
        value = value.reshape((machine.lanes, out.lanes) if out.lanes > 1 else machine.lanes)
        machine.write(register, value, out, mask)
    machine.simulation.mma_flops += 2 * 16 * 8 * depth * warps.size


def _operand(values: np.ndarray, type_: str) -> np.ndarray:
    if type_ != "tf32":
        return values
    return decode(values & np.uint32(0xFFFF_E000), type_of("f32"))


OPERATIONS: dict[str, Any] = {
    "ldmatrix": _matrix_move,
    "stmatrix": _matrix_move,
    "mma": _multiply,
}
