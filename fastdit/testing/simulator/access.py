"""Loads, stores, atomics and asynchronous copies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdit.testing.simulator.parser import Address, Immediate, Instruction, Operand, Vector
from fastdit.testing.simulator.values import UNSIGNED, Type, decode, encode, type_of

if TYPE_CHECKING:
    from fastdit.testing.simulator.machine import Machine

_SPACES = ("global", "shared", "local", "param", "const")
_VECTORS = {"v2": 2, "v4": 4, "v8": 8}
_HINTS = {
    *("weak", "volatile", "relaxed", "acquire", "release", "acq_rel", "nc", "cta", "gpu", "sys"),
    *("ca", "cg", "cs", "lu", "cv", "wb", "wt"),
}


def _space(instruction: Instruction) -> str:
    """The address space; generic addresses are global. Raises on unknown modifiers."""
    space = "global"
    for modifier in instruction.modifiers[:-1]:
        name, _, scope = modifier.partition("::")
        if name in _SPACES and scope in ("", "cta"):
            space = "global" if name == "const" else name
        elif modifier not in _HINTS and modifier not in _VECTORS and name not in ("L1", "L2"):
            raise NotImplementedError(f"modifier .{modifier}")
    return space


def _addresses(machine: Machine, operand: Operand) -> np.ndarray:
    """Byte addresses of every lane, as int64."""
    assert isinstance(operand, Address)
    if operand.base is None:
        return np.full(machine.lanes, operand.offset, np.int64)
    base = machine.spread(machine.read(operand.base, type_of("s64")))
    return base.astype(np.int64) + operand.offset


def _registers(operand: Operand) -> tuple[Operand, ...]:
    return operand.items if isinstance(operand, Vector) else (operand,)


def _load(machine: Machine, instruction: Instruction, mask: np.ndarray) -> None:
    space, type_ = _space(instruction), type_of(instruction.type)
    registers = _registers(instruction.operands[0])
    width = type_.width // 8 * len(registers)
    source = instruction.operands[1]
    if space == "param":
        data = np.zeros((machine.lanes, width), np.uint8)
        data[mask] = machine.parameter(_addresses(machine, source)[mask], width)
    else:
        data = np.zeros((machine.lanes, width), np.uint8)
        lanes = np.flatnonzero(mask)
        data[lanes] = machine.load(space, _addresses(machine, source)[lanes], lanes, width)
    element = Type("b", type_.width)
    words = np.ascontiguousarray(data).view(element.dtype)
    for index, register in enumerate(registers):
        value = words[:, index]
        if type_.kind == "s":  # a narrow signed load fills the whole register
            wide = type_of("s64")
            machine.write(register, decode(value, type_).astype(np.int64), wide, mask)
        else:
            machine.write(register, value, element, mask)


def _store(machine: Machine, instruction: Instruction, mask: np.ndarray) -> None:
    space, type_ = _space(instruction), Type("b", type_of(instruction.type).width)
    values = [machine.read(x, type_) for x in _registers(instruction.operands[1])]
    lanes = np.flatnonzero(mask)
    words = np.stack([machine.spread(value)[lanes] for value in values], -1)
    data = np.ascontiguousarray(words).view(np.uint8).reshape(lanes.size, -1)
    addresses = _addresses(machine, instruction.operands[0])[lanes]
    machine.store(space, addresses, lanes, data)


_UPDATE: dict[str, Callable[..., np.ndarray]] = {
    "add": lambda old, new: old + new,
    "min": np.fmin,
    "max": np.fmax,
    "and": lambda old, new: old & new,
    "or": lambda old, new: old | new,
    "xor": lambda old, new: old ^ new,
    "exch": lambda _old, new: new,
}


def _atomic(machine: Machine, instruction: Instruction, mask: np.ndarray) -> None:
    """`atom` and `red`: lane after lane, in the order of blocks and lanes."""
    modifiers = [m for m in instruction.modifiers[:-1] if m not in ("noftz", "sync")]
    (name,) = (m for m in modifiers if m in _UPDATE or m == "cas")
    trimmed = tuple(m for m in modifiers if m != name)
    space = _space(Instruction("atom", (*trimmed, "b32"), (), None, instruction.text))
    type_ = type_of(instruction.type)
    if type_.lanes != 1 or isinstance(instruction.operands[-1], Vector):
        raise NotImplementedError("packed atomics")
    result, (place, *inputs) = None, instruction.operands
    if instruction.name == "atom":
        result, (place, *inputs) = instruction.operands[0], instruction.operands[1:]
    lanes = np.flatnonzero(mask)
    addresses = _addresses(machine, place)
    values = [machine.spread(machine.read(x, type_)) for x in inputs]
    olds = np.zeros(machine.lanes, UNSIGNED[type_.bits])
    for lane in lanes:
        cell = machine.cell(space, int(addresses[lane]), int(lane), type_.bits // 8)
        raw = cell.view(UNSIGNED[type_.bits])
        olds[lane] = raw[0]
        old, first = decode(raw.copy(), type_), values[0][lane : lane + 1]
        if name == "cas":
            new = np.where(old == first, values[1][lane : lane + 1], old)
        else:
            new = _UPDATE[name](old, first)
        raw[:] = encode(new, type_)
    machine.simulation.atomics += lanes.size
    if result is not None:
        machine.write(result, olds, Type("b", type_.bits), mask)


@dataclass
class _Copy:
    """An asynchronous copy on its way: it lands when its lanes wait for its group."""

    lanes: np.ndarray
    group: np.ndarray
    addresses: np.ndarray
    data: np.ndarray


class AsyncCopies:
    """cp.async: global to shared memory, in groups of each lane, complete only when waited for.

    A kernel that reads a tile before it waits therefore reads what was there before.
    """

    def __init__(self, lanes: int) -> None:
        self.committed = np.zeros(lanes, np.int64)
        self.pending: list[_Copy] = []

    def issue(self, lanes: np.ndarray, addresses: np.ndarray, data: np.ndarray) -> None:
        self.pending.append(_Copy(lanes, self.committed[lanes], addresses, data))

    def commit(self, mask: np.ndarray) -> None:
        self.committed += mask

    def wait(self, machine: Machine, mask: np.ndarray, newest: int) -> None:
        """Complete all but the `newest` committed groups of the masked lanes."""
        remaining = []
        for copy in self.pending:
            done = mask[copy.lanes] & (copy.group < self.committed[copy.lanes] - newest)
            if done.any():
                machine.store("shared", copy.addresses[done], copy.lanes[done], copy.data[done])
            if not done.all():
                keep = ~done
                parts = (copy.lanes, copy.group, copy.addresses, copy.data)
                remaining.append(_Copy(*(part[keep] for part in parts)))
        self.pending = remaining


def _copy(machine: Machine, instruction: Instruction, mask: np.ndarray) -> None:
    kind = instruction.modifiers[:2]
    if kind == ("async", "commit_group"):
        machine.copies.commit(mask)
    elif kind == ("async", "wait_group"):
        (newest,) = instruction.operands
        assert isinstance(newest, Immediate)
        machine.copies.wait(machine, mask, newest.bits)
    elif kind == ("async", "wait_all"):
        machine.copies.commit(mask)
        machine.copies.wait(machine, mask, 0)
    elif kind in (("async", "cg"), ("async", "ca")) and "bulk" not in instruction.modifiers:
        _issue_copy(machine, instruction, mask)
    else:
        raise NotImplementedError(instruction.text)


def _issue_copy(machine: Machine, instruction: Instruction, mask: np.ndarray) -> None:
    destination, source, size, *rest = instruction.operands
    assert isinstance(size, Immediate)
    valid = np.full(machine.lanes, size.bits)
    if rest:
        valid = machine.spread(machine.read(rest[0], type_of("u32"))).astype(np.int64)
    if not np.isin(valid[mask], (0, size.bits)).all():
        raise NotImplementedError("cp.async of a part of its size")
    lanes = np.flatnonzero(mask)
    data = np.zeros((lanes.size, size.bits), np.uint8)  # lanes of size 0 are filled with zeros
    real = valid[lanes] > 0
    addresses = _addresses(machine, source)[lanes]
    if real.any():
        data[real] = machine.load("global", addresses[real], lanes[real], size.bits)
    machine.copies.issue(lanes, _addresses(machine, destination)[lanes], data)


OPERATIONS: dict[str, Any] = {
    "ld": _load,
    "st": _store,
    "atom": _atomic,
    "red": _atomic,
    "cp": _copy,
}
