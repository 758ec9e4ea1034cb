"""What one launch does to memory, byte by byte, as the interpreter sees it.

Every byte of the arguments' storages knows which argument it belongs to, which program stored it
last and which programs loaded it. So the counts are exact for strided views (the chunks of one
modulation tensor, say), an access beside a view is out of bounds even inside its storage, and two
programs that meet at one byte are found whatever the order in which they happened to run.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch

_MANY = -1  # programs are numbered from 1; 0 is none


class KernelFault(RuntimeError):
    """A kernel left its arguments' bounds or its result depends on the order of its programs."""


@dataclass(frozen=True)
class Fault:
    """Lanes of one load, store or atomic of one program that touch no argument's element."""

    kind: str
    program: tuple[int, int, int]
    lanes: int
    nearest: str
    offset: int

    def __str__(self) -> str:
        return (
            f"{self.kind} of {self.lanes} lanes in program {self.program}, the first "
            f"{self.offset} bytes from the start of {self.nearest!r}"
        )


@dataclass(frozen=True)
class Trace:
    """The traffic, work and faults of one launch. All counts are of bytes, or of flop.

    `loaded` and `stored` count every access; `unique_loaded` and `unique_stored` each byte once,
    which is what must cross the memory bus if the caches hold everything. An element that belongs
    to two arguments counts for the later one.

    Attributes:
        loaded, stored, atomics: argument name to bytes accessed.
        unique_loaded, unique_stored: argument name to distinct bytes accessed.
        flops: `"dot"`, `"elementwise"` (+, −, ·, / and 2 for a fused multiply-add), `"reduction"`,
            `"special"` (one for an exp, log, root or trigonometric function).
        out_of_bounds: accesses outside every argument; they were not carried out.
        races: argument name to bytes stored by two programs, or by two lanes of one store.
        hazards: argument name to bytes stored by one program and loaded by another.
    """

    loaded: dict[str, int]
    stored: dict[str, int]
    atomics: dict[str, int]
    unique_loaded: dict[str, int]
    unique_stored: dict[str, int]
    flops: dict[str, int]
    out_of_bounds: tuple[Fault, ...]
    races: dict[str, int]
    hazards: dict[str, int]

    @property
    def bytes(self) -> int:
        """Everything loaded, stored and updated atomically."""
        return sum(sum(c.values()) for c in (self.loaded, self.stored, self.atomics))

    @property
    def unique_bytes(self) -> int:
        """Each loaded byte once and each stored byte once: the launch's least DRAM traffic."""
        return sum(self.unique_loaded.values()) + sum(self.unique_stored.values())

    def faults(self) -> list[str]:
        """One sentence for each thing that is wrong; empty for a sound kernel."""
        return (
            [f"out of bounds: {fault}" for fault in self.out_of_bounds]
            + [f"{n} bytes of {name!r} are stored twice" for name, n in self.races.items()]
            + [
                f"{n} bytes of {name!r} are stored by one program and loaded by another"
                for name, n in self.hazards.items()
            ]
        )

    def check(self, kernel: str = "kernel") -> None:
        """Raise `KernelFault` where `faults()` finds any."""
        faults = self.faults()
        if faults:
            more = f"\n  and {len(faults) - 8} more" if len(faults) > 8 else ""
            raise KernelFault(f"{kernel}:\n  " + "\n  ".join(faults[:8]) + more)


@dataclass
class _Storage:
    """One storage's bytes: their argument (−1: none), last writer, readers and races."""

    base: int
    owner: np.ndarray
    writer: np.ndarray = field(init=False)
    reader: np.ndarray = field(init=False)
    raced: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.writer = np.zeros(self.owner.size, np.int32)
        self.reader = np.zeros(self.owner.size, np.int32)
        self.raced = np.zeros(self.owner.size, bool)

    def load(self, at: np.ndarray, program: int) -> None:
        before = self.reader[at]
        self.reader[at] = np.where((before == 0) | (before == program), program, _MANY)

    def store(self, at: np.ndarray, program: int) -> None:
        before = self.writer[at]
        self.raced[at[(before != 0) & (before != program)]] = True
        distinct, times = np.unique(at, return_counts=True)
        self.raced[distinct[times > 1]] = True
        self.writer[at] = program


class Recorder:
    """Collects a `Trace` while the interpreter runs; `program` is set before each program."""

    def __init__(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        tensors = list(tensors)
        self.names = [name for name, _ in tensors]
        self.tensors = [tensor for _, tensor in tensors]  # keeps the addresses alive
        self.storages = sorted(_storages(self.tensors), key=lambda storage: storage.base)
        self.bases = np.array([storage.base for storage in self.storages], np.int64)
        self.accessed: dict[str, collections.Counter[int]] = {
            kind: collections.Counter() for kind in ("load", "store", "atomic")
        }
        self.flops: collections.Counter[str] = collections.Counter()
        self.out_of_bounds: list[Fault] = []
        self.program = (0, 0, 0)
        self.grid = (1, 1, 1)

    def access(
        self, kind: str, pointers: np.ndarray, mask: np.ndarray | None, itemsize: int
    ) -> np.ndarray:
        """Record one access; returns the mask without the lanes that are out of bounds."""
        allowed = np.ones(pointers.shape, bool)
        if mask is not None:
            allowed &= np.broadcast_to(mask.astype(bool), pointers.shape)
        addresses = pointers[allowed].astype(np.int64).ravel()
        if addresses.size == 0:
            return allowed
        inside = np.zeros(addresses.size, bool)
        which = np.searchsorted(self.bases, addresses, "right") - 1
        for index in np.unique(which[which >= 0]):
            storage, lanes = self.storages[index], np.flatnonzero(which == index)
            start = addresses[lanes] - storage.base
            lanes, start = (v[start + itemsize <= storage.owner.size] for v in (lanes, start))
            owned = (storage.owner[start] >= 0) & (storage.owner[start + itemsize - 1] >= 0)
            lanes, start = lanes[owned], start[owned]
            inside[lanes] = True
            self._record(kind, storage, start, itemsize)
        if not inside.all():
            self._fault(kind, addresses[~inside])
            allowed[allowed] = inside
        return allowed

    def _record(self, kind: str, storage: _Storage, start: np.ndarray, itemsize: int) -> None:
        x, y, z = self.program
        program = 1 + x + self.grid[0] * (y + self.grid[1] * z)
        for owner, lanes in _counts(storage.owner[start]):
            self.accessed[kind][owner] += lanes * itemsize
        at = (start[:, None] + np.arange(itemsize)).ravel()
        if kind == "load":
            storage.load(at, program)
        elif kind == "store":
            storage.store(at, program)

    def _fault(self, kind: str, addresses: np.ndarray) -> None:
        starts = np.array([tensor.data_ptr() for tensor in self.tensors] or [0], np.int64)
        nearest = int(np.abs(starts - addresses[0]).argmin())
        name = self.names[nearest] if self.names else "no tensor"
        offset = int(addresses[0] - starts[nearest])
        self.out_of_bounds.append(Fault(kind, self.program, addresses.size, name, offset))

    def finish(self) -> Trace:
        """The trace of everything recorded so far."""

        def per_argument(select: str) -> dict[str, int]:
            total: collections.Counter[str] = collections.Counter()
            for storage in self.storages:
                marks = {
                    "loaded": storage.reader != 0,
                    "stored": storage.writer != 0,
                    "raced": storage.raced,
                    "hazard": (storage.writer != 0)
                    & (storage.reader != 0)
                    & (storage.reader != storage.writer),
                }[select]
                for owner, n in _counts(storage.owner[marks]):
                    total[self.names[owner]] += n
            return dict(total)

        named = {
            kind: {self.names[owner]: n for owner, n in counter.items()}
            for kind, counter in self.accessed.items()
        }
        return Trace(
            loaded=named["load"],
            stored=named["store"],
            atomics=named["atomic"],
            unique_loaded=per_argument("loaded"),
            unique_stored=per_argument("stored"),
            flops=dict(self.flops),
            out_of_bounds=tuple(self.out_of_bounds),
            races=per_argument("raced"),
            hazards=per_argument("hazard"),
        )


def _counts(owners: np.ndarray) -> list[tuple[int, int]]:
    values, times = np.unique(owners, return_counts=True)
    return [(int(value), int(n)) for value, n in zip(values, times, strict=True)]


def _storages(tensors: list[torch.Tensor]) -> list[_Storage]:
    by_address: dict[int, torch.Tensor] = {}
    for index, tensor in enumerate(tensors):
        storage = tensor.untyped_storage()
        owner = by_address.setdefault(
            storage.data_ptr(), torch.full((storage.nbytes(),), -1, dtype=torch.int16)
        )
        size = tensor.element_size()
        shape = (*tensor.shape, size)
        strides = (*(stride * size for stride in tensor.stride()), 1)
        owner.as_strided(shape, strides, tensor.storage_offset() * size).fill_(index)
    return [_Storage(base, owner.numpy()) for base, owner in by_address.items()]
