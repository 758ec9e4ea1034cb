"""The GPUs that kernels are compiled and modelled for: limits of one multiprocessor and peak rates.

Sources: NVIDIA's CUDA programming guide (compute capabilities) and data sheets of the A100 80 GB
SXM, RTX 3090, RTX 4090, H100 SXM, B200 and RTX 5090; AMD's MI300X and MI355X data sheets and CDNA 3
and 4 instruction set guides. Tensor-core rates are dense, 16-bit inputs, fp32 accumulation.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    """One GPU, in its data sheet's units. A warp is a wavefront on AMD."""

    name: str
    arch: str
    multiprocessors: int
    shared_kib: int
    shared_kib_of_block: int
    warps: int
    blocks: int
    terabytes_per_second: float
    fp32_tflops: float
    tensor16_tflops: float
    gigahertz: float
    warp_size: int

    @property
    def vendor(self) -> str:
        """`"cuda"` or `"hip"`, as Triton calls its back ends."""
        return "cuda" if self.arch.startswith("sm_") else "hip"

    @property
    def triton_arch(self) -> int | str:
        """The architecture as Triton's `GPUTarget` wants it: 90 or "gfx942"."""
        return int(self.arch[3:]) if self.vendor == "cuda" else self.arch


_ROWS = (
    ("A100", "sm_80", 108, 164, 163, 64, 32, 2.039, 19.5, 312.0, 1.41, 32),
    ("RTX 3090", "sm_86", 82, 100, 99, 48, 16, 0.936, 35.6, 71.0, 1.695, 32),
    ("RTX 4090", "sm_89", 128, 100, 99, 48, 24, 1.008, 82.6, 165.2, 2.52, 32),
    ("H100", "sm_90", 132, 228, 227, 64, 32, 3.35, 66.9, 989.0, 1.98, 32),
    ("B200", "sm_100", 148, 228, 227, 64, 32, 8.0, 74.4, 2250.0, 1.965, 32),
    ("RTX 5090", "sm_120", 170, 100, 99, 48, 24, 1.792, 104.8, 209.5, 2.407, 32),
    ("MI300X", "gfx942", 304, 64, 64, 32, 16, 5.3, 163.4, 1307.0, 2.1, 64),
    ("MI355X", "gfx950", 256, 160, 160, 32, 16, 8.0, 157.3, 2500.0, 2.4, 64),
)
_TABLE = tuple(GPU(*row) for row in _ROWS)
GPUS: dict[str, GPU] = {gpu.name: gpu for gpu in _TABLE}


def gpu_of(which: str | int) -> GPU:
    """The GPU of a name ("H100") or an architecture ("sm_90", 90, "gfx942").

    Raises:
        ValueError: none is known; the message lists those that are.
    """
    for gpu in _TABLE:
        if which in (gpu.name, gpu.arch, gpu.triton_arch):
            return gpu
    known = ", ".join(f"{gpu.arch} ({gpu.name})" for gpu in _TABLE)
    raise ValueError(f"arch: got {which!r}, allowed are {known}")


@dataclass(frozen=True)
class Occupancy:
    """Resident blocks of one multiprocessor, and the fraction of its warps that they fill."""

    blocks: int
    fraction: float
    limit: str


def occupancy(arch: str | int, registers: int, shared_bytes: int, num_warps: int) -> Occupancy:
    """The theoretical occupancy of a kernel, by the CUDA occupancy calculator's rules.

    Args:
        arch: as for `gpu_of`.
        registers: of one thread (vector registers on AMD).
        shared_bytes: of one block, static and dynamic.
        num_warps: of one block.
    """
    gpu = gpu_of(arch)
    if gpu.vendor == "cuda":
        # Registers are handed out to a warp in units of 256, to warps in fours; from sm_80 on
        # the driver keeps 1 KiB of shared memory of every block to itself.
        per_warp = -(-max(registers, 1) * 32 // 256) * 256
        warps_by_registers = 65536 // per_warp // 4 * 4
        reserved = 1024
    else:
        # 512 vector registers a lane on each of 4 SIMDs, handed out in eights, 8 waves at most.
        per_warp = -(-max(registers, 1) // 8) * 8
        warps_by_registers = 4 * min(8, 512 // per_warp)
        reserved = 0
    limits = {
        "warps": gpu.warps // num_warps,
        "blocks": gpu.blocks,
        "registers": warps_by_registers // num_warps,
    }
    if shared_bytes + reserved:
        allocated = -(-(shared_bytes + reserved) // 128) * 128
        limits["shared memory"] = 1024 * gpu.shared_kib // allocated
    limit = min(limits, key=lambda name: limits[name])
    blocks = limits[limit]
    return Occupancy(blocks, blocks * num_warps / gpu.warps, limit)
