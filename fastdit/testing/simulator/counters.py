"""What a simulated launch did, in the units of NVIDIA's profiler."""

from __future__ import annotations

import collections
from dataclasses import dataclass, field

SECTOR = 32  # bytes: the unit in which the caches and DRAM move data


@dataclass
class GlobalTraffic:
    """Loads, or stores, of global memory.

    Attributes:
        requests: warp-wide instructions with an active lane.
        sectors: 32-byte sectors moved, counted for each request.
        least_sectors: the sectors that the distinct bytes of each request would fill.
        bytes: the distinct bytes of each request.
        dram_bytes: bytes of the distinct sectors of the whole launch.
        widths: bits accessed by one lane, to requests.
    """

    requests: int = 0
    sectors: int = 0
    least_sectors: int = 0
    bytes: int = 0
    dram_bytes: int = 0
    widths: collections.Counter[int] = field(default_factory=collections.Counter)

    @property
    def efficiency(self) -> float:
        """Coalescing: `least_sectors / sectors`, 1.0 where no sector is moved in vain."""
        return self.least_sectors / self.sectors if self.sectors else 1.0


@dataclass
class SharedTraffic:
    """Accesses of shared memory; each wavefront serves every bank once.

    A 64-bit access takes a warp in two halves and a 128-bit one in four quarters; so do the 8×8
    matrices of ldmatrix. `least_wavefronts` is what the distinct words would need without
    conflicts.
    """

    requests: int = 0
    wavefronts: int = 0
    least_wavefronts: int = 0

    @property
    def conflict_ratio(self) -> float:
        """`wavefronts / least_wavefronts`: 1.0 without bank conflicts."""
        return self.wavefronts / self.least_wavefronts if self.least_wavefronts else 1.0


@dataclass
class Simulation:
    """Counts of one simulated launch, for all its blocks.

    Warp instructions are PTX instructions, an approximation of the SASS that ptxas makes of them.

    Attributes:
        kernel: its name.
        blocks, threads_per_block: the launch's size.
        warp_instructions: instructions issued by warps, also where a predicate is off.
        opcodes: instruction name to warp instructions.
        divergent_branches: branches that split the active lanes of a warp.
        loads, stores: global memory (asynchronous copies are loads).
        shared: shared memory.
        atomics: lanes that updated memory atomically.
        mma_flops: flop of tensor-core instructions.
    """

    kernel: str
    blocks: int
    threads_per_block: int
    warp_instructions: int = 0
    opcodes: collections.Counter[str] = field(default_factory=collections.Counter)
    divergent_branches: int = 0
    loads: GlobalTraffic = field(default_factory=GlobalTraffic)
    stores: GlobalTraffic = field(default_factory=GlobalTraffic)
    shared: SharedTraffic = field(default_factory=SharedTraffic)
    atomics: int = 0
    mma_flops: int = 0

    @property
    def dram_bytes(self) -> int:
        """Distinct sectors loaded and stored, in bytes: the traffic with perfect caches."""
        return self.loads.dram_bytes + self.stores.dram_bytes
