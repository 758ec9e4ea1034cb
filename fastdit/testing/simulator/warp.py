"""Instructions on which the lanes of a warp, or the warps of a block, meet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fastdit.testing.simulator.arithmetic import allow
from fastdit.testing.simulator.parser import Immediate, Instruction, Pair, Symbol
from fastdit.testing.simulator.values import type_of

if TYPE_CHECKING:
    from fastdit.testing.simulator.machine import Machine


def _branch(machine: Machine, instruction: Instruction, mask: np.ndarray) -> None:
    if set(instruction.modifiers) - {"uni"}:
        raise NotImplementedError(instruction.text)
    (target,) = instruction.operands
    assert isinstance(target, Symbol)
    machine.jump(machine.program.labels[target.name], mask)


def _return(machine: Machine, _instruction: Instruction, mask: np.ndarray) -> None:
    machine.jump(len(machine.program.instructions), mask)


def _barrier(machine: Machine, instruction: Instruction, mask: np.ndarray) -> None:
    if "warp" in instruction.modifiers:
        return  # the lanes of a warp run in lock step here
    if set(instruction.modifiers) - {"sync", "aligned", "cta"}:
        raise NotImplementedError(instruction.text)
    if instruction.operands != (Immediate(0),):
        raise NotImplementedError("named or partial barriers")
    machine.wait(mask)


def _shuffle(machine: Machine, instruction: Instruction, mask: np.ndarray) -> None:
    """`shfl.sync`: the PTX ISA's segment arithmetic; an inactive source lane is an error."""
    mode = next(m for m in instruction.modifiers if m in ("bfly", "idx", "up", "down"))
    b32, u32 = type_of("b32"), type_of("u32")
    value = machine.spread(machine.read(instruction.operands[1], b32))
    by = machine.read(instruction.operands[2], u32).astype(np.int64) & 31
    clamp = machine.read(instruction.operands[3], u32).astype(np.int64)
    lane = machine.lane
    segment = (clamp >> 8) & 31
    least, most = lane & segment, (lane & segment) | (clamp & 31 & ~segment)
    source, valid = {
        "up": lambda: (lane - by, lane - by >= most),
        "down": lambda: (lane + by, lane + by <= most),
        "bfly": lambda: (lane ^ by, lane ^ by <= most),
        "idx": lambda: (least | (by & ~segment), (least | (by & ~segment)) <= most),
    }[mode]()
    origin = np.arange(machine.lanes) - lane + np.where(valid, source, lane)
    if not mask[origin[mask]].all():
        raise RuntimeError("shfl.sync reads an inactive lane")
    destination = instruction.operands[0]
    if isinstance(destination, Pair):
        machine.write(destination.second, valid, type_of("pred"), mask)
        destination = destination.first
    machine.write(destination, value[origin], b32, mask)


def _vote(machine: Machine, instruction: Instruction, mask: np.ndarray) -> None:
    found = allow(instruction, "sync", "all", "any", "ballot")
    chosen = machine.spread(machine.read(instruction.operands[1], type_of("pred")))
    by_warp, active = (x.reshape(-1, 32) for x in (chosen & mask, mask))
    if "ballot" in found:
        bits = (by_warp.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(1)
        machine.write(
            instruction.operands[0], np.repeat(bits.astype(np.uint32), 32), type_of("b32"), mask
        )
        return
    result = by_warp.any(1) if "any" in found else (by_warp | ~active).all(1)
    machine.write(instruction.operands[0], np.repeat(result, 32), type_of("pred"), mask)


_REDUCE: dict[str, np.ufunc] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


def _reduce(machine: Machine, instruction: Instruction, mask: np.ndarray) -> None:
    """`redux.sync`: one integer for the whole warp; every lane takes part."""
    found = allow(instruction, "sync", *_REDUCE)
    type_ = type_of(instruction.type)
    value = machine.spread(machine.read(instruction.operands[1], type_)).reshape(-1, 32)
    if type_.is_float or not machine.whole_warps(mask):
        raise NotImplementedError("redux of floating point or of a part of a warp")
    (operation,) = (_REDUCE[name] for name in found & set(_REDUCE))
    result = operation.reduce(value, axis=1, dtype=value.dtype)
    machine.write(instruction.operands[0], np.repeat(result, 32), type_, mask)


def _nothing(_machine: Machine, _instruction: Instruction, _mask: np.ndarray) -> None:
    """Memory fences and cache policies: every access here is complete when it is issued."""


OPERATIONS: dict[str, Any] = {
    "bra": _branch,
    "ret": _return,
    "exit": _return,
    "bar": _barrier,
    "barrier": _barrier,
    "shfl": _shuffle,
    "vote": _vote,
    "redux": _reduce,
    "membar": _nothing,
    "fence": _nothing,
    "createpolicy": _nothing,
    "prefetch": _nothing,
}
