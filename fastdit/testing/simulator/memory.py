"""The simulator's memories: global, shared and local, with bounds, alignment and traffic.

All blocks of a batch are simulated together, so that every access is one numpy operation on the
lanes of all their warps.
"""

from __future__ import annotations

import numpy as np
import torch

from fastdit.testing.simulator.counters import SECTOR, GlobalTraffic, SharedTraffic, Simulation

_BASE = 0x7F00_0000_0000  # where the arena of global memory starts in the address space
_GAP = 512  # bytes between two storages, which belong to neither


class MemoryFault(RuntimeError):
    """A compiled kernel accessed memory that is not there, or is not aligned."""


def distinct_in_warp(warps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct (warp, value) pairs, sorted."""
    order = np.lexsort((values, warps))
    warps, values = warps[order], values[order]
    first = np.ones(warps.size, bool)
    first[1:] = (warps[1:] != warps[:-1]) | (values[1:] != values[:-1])
    return warps[first], values[first]


class GlobalMemory:
    """The arguments' storages in one arena, at addresses aligned as the tensors' own are."""

    def __init__(self, tensors: list[torch.Tensor], constants: dict[str, bytes]) -> None:
        self._storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
        self._place: dict[int, int] = {}
        self.symbols: dict[str, int] = {}
        end = _GAP
        for address, storage in self._storages.items():
            self._place[address] = -(-end // 256) * 256 + address % 256
            end = self._place[address] + storage.nbytes() + _GAP
        for name, data in constants.items():
            self.symbols[name] = -(-end // 256) * 256
            end = self.symbols[name] + len(data) + _GAP
        self.bytes = np.zeros(end, np.uint8)
        self._valid = np.zeros(end, bool)
        for address, storage in self._storages.items():
            place = slice(self._place[address], self._place[address] + storage.nbytes())
            self.bytes[place] = _bytes(storage)
            self._valid[place] = True
        for name, data in constants.items():
            place = slice(self.symbols[name], self.symbols[name] + len(data))
            self.bytes[place] = np.frombuffer(data, np.uint8)
            self._valid[place] = True
            self.symbols[name] += _BASE
        sectors = end // SECTOR + 1
        self._loaded, self._stored = np.zeros(sectors, bool), np.zeros(sectors, bool)

    def address_of(self, tensor: torch.Tensor) -> int:
        """Where the tensor's first element is in the simulated address space."""
        storage = tensor.untyped_storage().data_ptr()
        return _BASE + self._place[storage] + tensor.data_ptr() - storage

    def copy_back(self) -> None:
        """Give the storages what was stored."""
        for address, storage in self._storages.items():
            place = self._place[address]
            _bytes(storage)[:] = self.bytes[place : place + storage.nbytes()]

    def index(self, addresses: np.ndarray, width: int, kind: str) -> np.ndarray:
        """Arena positions of checked addresses."""
        at = addresses.astype(np.int64) - _BASE
        inside = (at >= 0) & (at + width <= self.bytes.size)
        ends = np.where(inside, at, 0)
        inside &= self._valid[ends] & self._valid[ends + width - 1]
        if not inside.all():
            bad = int(addresses[~inside][0])
            raise MemoryFault(f"{kind} out of bounds: {np.sum(~inside)} lanes, first at {bad:#x}")
        if (at % width).any():
            raise MemoryFault(f"{kind} of {width} bytes is not aligned")
        return at

    def load(
        self, addresses: np.ndarray, warps: np.ndarray, width: int, traffic: GlobalTraffic
    ) -> np.ndarray:
        at = self.index(addresses, width, "load")
        self._loaded[at // SECTOR] = True
        _count_global(at, warps, width, traffic)
        return self.bytes[at[:, None] + np.arange(width)]

    def store(
        self,
        addresses: np.ndarray,
        warps: np.ndarray,
        values: np.ndarray,
        traffic: GlobalTraffic,
    ) -> None:
        width = values.shape[1]
        at = self.index(addresses, width, "store")
        self._stored[at // SECTOR] = True
        _count_global(at, warps, width, traffic)
        self.bytes[at[:, None] + np.arange(width)] = values

    def finish(self, simulation: Simulation) -> None:
        """Count the distinct sectors once all blocks have run."""
        simulation.loads.dram_bytes = SECTOR * int(self._loaded.sum())
        simulation.stores.dram_bytes = SECTOR * int(self._stored.sum())


def _bytes(storage: torch.UntypedStorage) -> np.ndarray:
    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy()


def _count_global(at: np.ndarray, warps: np.ndarray, width: int, traffic: GlobalTraffic) -> None:
    """`at` is aligned to `width` <= 32 bytes, so that a lane stays in one sector."""
    owners, starts = distinct_in_warp(warps, at)
    requests, lanes = np.unique(owners, return_counts=True)
    distinct = lanes * width
    sectors = distinct_in_warp(owners, starts // SECTOR)[0].size
    traffic.requests += requests.size
    traffic.sectors += sectors
    traffic.least_sectors += int((-(-distinct // SECTOR)).sum())
    traffic.bytes += int(distinct.sum())
    traffic.widths[8 * width] += requests.size


class SharedMemory:
    """One private copy for each block of the batch; starts as NaNs, since a GPU clears nothing."""

    def __init__(self, blocks: int, size: int, traffic: SharedTraffic) -> None:
        self.size = size
        self.bytes = np.full((blocks, size), 0xFF, np.uint8)
        self.traffic = traffic

    def check(self, addresses: np.ndarray, width: int, kind: str) -> None:
        if addresses.size and (addresses.min() < 0 or addresses.max() + width > self.size):
            raise MemoryFault(f"shared {kind} out of bounds: at {addresses.max()} of {self.size}")
        if (addresses % width).any():
            raise MemoryFault(f"shared {kind} of {width} bytes is not aligned")

    def count(self, addresses: np.ndarray, phases: np.ndarray, width: int) -> None:
        """Wavefronts of accesses that the hardware serves phase by phase."""
        words = (addresses[:, None] // 4 + np.arange(max(width // 4, 1))).ravel()
        phases = np.repeat(phases, max(width // 4, 1))
        phases, words = distinct_in_warp(phases, words)
        _, index = np.unique(phases, return_inverse=True)
        count = int(index.max(initial=-1)) + 1
        in_bank = np.bincount(index * 32 + words % 32, minlength=32 * count).reshape(count, 32)
        self.traffic.wavefronts += int(in_bank.max(1).sum())
        self.traffic.least_wavefronts += int((-(-in_bank.sum(1) // 32)).sum())

    def load(
        self, blocks: np.ndarray, addresses: np.ndarray, lanes: np.ndarray, width: int
    ) -> np.ndarray:
        self.check(addresses, width, "load")
        self._count_lanes(addresses, lanes, width)
        return self.bytes[blocks[:, None], addresses[:, None] + np.arange(width)]

    def store(
        self, blocks: np.ndarray, addresses: np.ndarray, lanes: np.ndarray, values: np.ndarray
    ) -> None:
        width = values.shape[1]
        self.check(addresses, width, "store")
        self._count_lanes(addresses, lanes, width)
        self.bytes[blocks[:, None], addresses[:, None] + np.arange(width)] = values

    def _count_lanes(self, addresses: np.ndarray, lanes: np.ndarray, width: int) -> None:
        self.traffic.requests += np.unique(lanes // 32).size
        self.count(addresses, lanes // (32 * 4 // max(width, 4)), width)
