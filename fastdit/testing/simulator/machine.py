"""The machine: registers, program counters and barriers of a batch of blocks, in lock step.

All threads at the least program counter go first, so that a warp whose lanes took different
branches comes together again as early as the code allows. One instruction is executed for all
blocks of the batch that stand at it; the counts are those of separate warps.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastdit.testing.simulator import access, arithmetic, bitwise, conversion, matrix, warp
from fastdit.testing.simulator.counters import Simulation
from fastdit.testing.simulator.memory import GlobalMemory, MemoryFault, SharedMemory
from fastdit.testing.simulator.parser import (
    Immediate,
    Instruction,
    Negated,
    Operand,
    Program,
    Register,
    Symbol,
)
from fastdit.testing.simulator.values import UNSIGNED, Type, decode, encode

OPERATIONS: dict[str, Any] = {
    **arithmetic.OPERATIONS,
    **bitwise.OPERATIONS,
    **conversion.OPERATIONS,
    **warp.OPERATIONS,
    **access.OPERATIONS,
    **matrix.OPERATIONS,
}


class SimulationError(RuntimeError):
    """An instruction went wrong; the message quotes it."""


class Machine:
    """Simulates some blocks of a launch.

    Args:
        program: the kernel.
        blocks: their places in the grid, (blocks, 3).
        grid, block: sizes along x, y and z.
        parameters: the parameter block.
        memory: global memory.
        shared_bytes: dynamic shared memory of a block.
        simulation: where to count.
    """

    def __init__(
        self,
        program: Program,
        blocks: np.ndarray,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        parameters: np.ndarray,
        memory: GlobalMemory,
        shared_bytes: int,
        simulation: Simulation,
    ) -> None:
        self.program, self.parameters, self.memory = program, parameters, memory
        self.simulation = simulation
        threads = block[0] * block[1] * block[2]
        padded = -(-threads // 32) * 32
        self.lanes = len(blocks) * padded
        self.block = np.repeat(np.arange(len(blocks)), padded)
        thread = np.tile(np.arange(padded), len(blocks))
        self.lane = thread % 32
        self.warp = np.arange(self.lanes) // 32
        self.carry = np.zeros(self.lanes, np.uint64)
        size = program.shared_bytes + shared_bytes
        self.shared = SharedMemory(len(blocks), size, simulation.shared)
        self.local = np.full((self.lanes, program.local_bytes), 0xFF, np.uint8)
        self.copies = access.AsyncCopies(self.lanes)
        self.registers = self._special_registers(thread, blocks[self.block], grid, block)
        self._groups: dict[int, np.ndarray] = {0: thread < threads}
        self._waiting: dict[int, np.ndarray] = {}
        self._counter = 0

    def _special_registers(
        self, thread: np.ndarray, place: np.ndarray, grid: Any, block: Any
    ) -> dict[str, np.ndarray]:
        along = {
            "x": thread % block[0],
            "y": thread // block[0] % block[1],
            "z": thread // (block[0] * block[1]),
        }
        special = {"%laneid": self.lane, "%warpid": thread // 32}
        for axis, name in enumerate("xyz"):
            special[f"%tid.{name}"] = along[name]
            special[f"%ctaid.{name}"] = place[:, axis]
            special[f"%ntid.{name}"] = np.array([block[axis]])
            special[f"%nctaid.{name}"] = np.array([grid[axis]])
        return {name: value.astype(np.uint32) for name, value in special.items()}

    # Operands

    def read(self, operand: Operand | None, type_: Type) -> np.ndarray:
        """An operand's numbers: one for each lane, or a single one for all of them."""
        if isinstance(operand, Register):
            if operand.name not in self.registers:
                if {operand.name, operand.name.rstrip("0123456789")}.isdisjoint(
                    self.program.registers
                ):
                    raise NotImplementedError(f"special register {operand.name}")
                # Never written: all ones, a NaN, so that a result that uses it shows it.
                poison = bool if type_.kind == "p" else UNSIGNED[type_.width]
                return decode(~np.zeros(1, poison), type_)
            return decode(self.registers[operand.name], type_)
        if isinstance(operand, Negated):
            return ~self.registers[operand.name]
        if isinstance(operand, Immediate):
            if type_.kind == "p":
                return np.array([bool(operand.bits)])
            bits = operand.bits % 2**type_.width
            return decode(np.array([bits], UNSIGNED[type_.width]), type_)
        if isinstance(operand, Symbol):
            return np.array([self._address_of(operand.name)]).astype(type_.dtype)
        raise NotImplementedError(f"operand {operand}")

    def _address_of(self, name: str) -> int:
        for table in (self.program.shared, self.program.local, self.memory.symbols):
            if name in table:
                return table[name]
        if name in self.program.parameters:
            return self.program.parameters[name].offset
        raise NotImplementedError(f"symbol {name}")

    def write(self, operand: Operand, values: np.ndarray, type_: Type, mask: np.ndarray) -> None:
        """Give the masked lanes of a register these numbers."""
        assert isinstance(operand, Register), operand
        if operand.name == "_":
            return
        bits = self.spread(encode(np.asarray(values), type_))
        if not mask.all():
            old = self.registers.get(operand.name)
            if old is None:
                old = ~np.zeros(1, bits.dtype)
            bits = np.where(mask, bits, old)
        self.registers[operand.name] = bits

    def spread(self, values: np.ndarray) -> np.ndarray:
        """One entry for each lane."""
        if values.shape[0] == self.lanes:
            return values
        return np.broadcast_to(values, (self.lanes, *values.shape[1:]))

    def parameter(self, places: np.ndarray, width: int) -> np.ndarray:
        """Bytes of the parameter block, one row for each of its `places`."""
        if places.min() < 0 or places.max() + width > self.parameters.size:
            raise MemoryFault(f"load of {width} bytes outside the kernel's parameters")
        return self.parameters[places[:, None] + np.arange(width)]

    def whole_warps(self, mask: np.ndarray) -> bool:
        """Whether each warp is active with all its lanes or with none."""
        active = mask.reshape(-1, 32)
        return bool((active.any(1) == active.all(1)).all())

    # Memory, for the lanes of the indices given

    def load(self, space: str, addresses: np.ndarray, lanes: np.ndarray, width: int) -> np.ndarray:
        if space == "shared":
            return self.shared.load(self.block[lanes], addresses, lanes, width)
        if space == "local":
            return self.local[lanes[:, None], self._local(addresses, width)]
        return self.memory.load(addresses, self.warp[lanes], width, self.simulation.loads)

    def store(self, space: str, addresses: np.ndarray, lanes: np.ndarray, data: np.ndarray) -> None:
        if space == "shared":
            self.shared.store(self.block[lanes], addresses, lanes, data)
        elif space == "local":
            self.local[lanes[:, None], self._local(addresses, data.shape[1])] = data
        else:
            self.memory.store(addresses, self.warp[lanes], data, self.simulation.stores)

    def _local(self, addresses: np.ndarray, width: int) -> np.ndarray:
        if (addresses < 0).any() or (addresses + width > self.local.shape[1]).any():
            raise MemoryFault("local access out of bounds")
        return addresses[:, None] + np.arange(width)

    def cell(self, space: str, address: int, lane: int, width: int) -> np.ndarray:
        """The bytes that one lane updates atomically."""
        if space == "shared":
            self.shared.check(np.array([address]), width, "atomic")
            return self.shared.bytes[self.block[lane], address : address + width]
        at = int(self.memory.index(np.array([address]), width, "atomic")[0])
        return self.memory.bytes[at : at + width]

    # Control

    def run(self) -> None:
        """Until every thread has returned."""
        end = len(self.program.instructions)
        with np.errstate(all="ignore"):
            while self._groups:
                self._counter = min(self._groups)
                mask = self._groups.pop(self._counter)
                if self._counter < end:
                    self._step(self.program.instructions[self._counter], mask)
                if not self._groups and self._waiting:
                    self._release()

    def _step(self, instruction: Instruction, mask: np.ndarray) -> None:
        warps = int(mask.reshape(-1, 32).any(1).sum())
        self.simulation.warp_instructions += warps
        self.simulation.opcodes[instruction.name] += warps
        self._next = mask
        active = mask
        if instruction.predicate is not None:
            active = mask & self.spread(self.read(instruction.predicate, Type("p", 1)))
        if active.any():
            self._execute(instruction, active)
        if self._next.any():
            self._join(self._counter + 1, self._next)

    def _execute(self, instruction: Instruction, mask: np.ndarray) -> None:
        operation = OPERATIONS.get(instruction.name)
        try:
            if operation is None:
                raise NotImplementedError(f"instruction {instruction.name}")
            operation(self, instruction, mask)
        except NotImplementedError as error:
            raise NotImplementedError(f"{instruction.text!r}: {error}") from error
        except MemoryFault as error:
            raise MemoryFault(f"{self.program.name}: {instruction.text!r}: {error}") from error
        except Exception as error:
            raise SimulationError(f"{instruction.text!r}: {error!r}") from error

    def _join(self, counter: int, mask: np.ndarray) -> None:
        there = self._groups.get(counter)
        self._groups[counter] = mask if there is None else there | mask

    def jump(self, counter: int, mask: np.ndarray) -> None:
        """The masked lanes of the current instruction go elsewhere."""
        stay = self._next & ~mask
        split = mask.reshape(-1, 32).any(1) & stay.reshape(-1, 32).any(1)
        self.simulation.divergent_branches += int(split.sum())
        self._join(counter, mask)
        self._next = stay

    def wait(self, mask: np.ndarray) -> None:
        """The masked lanes wait at a barrier for the rest of their block."""
        there = self._waiting.get(self._counter + 1)
        self._waiting[self._counter + 1] = mask if there is None else there | mask
        self._next = self._next & ~mask

    def _release(self) -> None:
        """No thread can run: every block's threads stand at a barrier or have returned."""
        barriers = np.zeros(self.block[-1] + 1, np.int64)
        for mask in self._waiting.values():
            barriers[np.unique(self.block[mask])] += 1
        if (barriers > 1).any():
            raise SimulationError(f"{self.program.name}: threads of one block at two barriers")
        self._groups, self._waiting = self._waiting, {}
