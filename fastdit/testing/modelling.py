"""A roofline: the time that counted work would take on a real GPU's data sheet.

    t = max(bytes / 0.92 bandwidth, flop / 0.8 peak, instructions / issue rate, launches · 1.5 µs)

0.92 is what good kernels reach of DRAM bandwidth and 0.8 of the tensor cores' dense peak; each of
a multiprocessor's four schedulers issues one warp instruction a clock at boost clock; 1.5 µs is
the least time of a kernel. These are assumptions, not measurements: every figure from here is
*modelled* and must be called so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastdit.testing.gpus import gpu_of

BANDWIDTH_REACHED = 0.92
TENSOR_PEAK_REACHED = 0.8
LEAST_SECONDS_OF_A_KERNEL = 1.5e-6


@dataclass(frozen=True)
class ModelledTime:
    """A modelled time and what bounds it; no GPU has measured it.

    Attributes:
        gpu: the GPU's name.
        modelled_seconds: the largest of `parts`.
        bound: which part that is: `"memory"`, `"tensor"`, `"fp32"`, `"issue"` or `"launch"`.
        parts: the modelled seconds of each, as if it were alone.
        waves: rounds in which the blocks fit on the GPU; None if not given.
        last_wave: how full the last round is, at most 1; None if not given.
    """

    gpu: str
    modelled_seconds: float
    bound: str
    parts: dict[str, float]
    waves: int | None = None
    last_wave: float | None = None

    def __str__(self) -> str:
        return f"modelled {self.modelled_seconds * 1e6:.2f} µs on {self.gpu} ({self.bound}-bound)"


def roofline(
    gpu: str | int,
    *,
    bytes: float,
    tensor_flops: float = 0,
    fp32_flops: float = 0,
    warp_instructions: float = 0,
    launches: int = 1,
    blocks: int | None = None,
    blocks_per_multiprocessor: int | None = None,
) -> ModelledTime:
    """The modelled time of some kernels.

    Args:
        gpu: `"A100"`, `"H100"`, `"B200"` or any that `gpu_of` knows.
        bytes: moved between DRAM and the chip.
        tensor_flops: flop on the tensor cores, 16-bit inputs.
        fp32_flops: flop on the other units.
        warp_instructions: issued, as `simulate` counts them.
        launches: kernels.
        blocks, blocks_per_multiprocessor: of one launch, for `waves` (see `Occupancy.blocks`).

    Raises:
        ValueError: the GPU is unknown, or a count is negative.
    """
    found = gpu_of(gpu)
    counts = {
        "bytes": bytes,
        "tensor_flops": tensor_flops,
        "fp32_flops": fp32_flops,
        "warp_instructions": warp_instructions,
        "launches": launches,
    }
    for name, value in counts.items():
        if value < 0:
            raise ValueError(f"{name}: got {value}, allowed are numbers from 0 on")
    issue_rate = found.multiprocessors * 4 * found.gigahertz * 1e9
    parts = {
        "memory": bytes / (BANDWIDTH_REACHED * found.terabytes_per_second * 1e12),
        "tensor": tensor_flops / (TENSOR_PEAK_REACHED * found.tensor16_tflops * 1e12),
        "fp32": fp32_flops / (found.fp32_tflops * 1e12),
        "issue": warp_instructions / issue_rate,
        "launch": launches * LEAST_SECONDS_OF_A_KERNEL,
    }
    bound = max(parts, key=lambda name: parts[name])
    waves = last = None
    if blocks and blocks_per_multiprocessor:
        rounds = blocks / (blocks_per_multiprocessor * found.multiprocessors)
        waves = math.ceil(rounds)
        last = rounds - (waves - 1)
    return ModelledTime(found.name, parts[bound], bound, parts, waves, last)
