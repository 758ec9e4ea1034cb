"""What the row-wise kernels may take of a GPU, and the launches to hold against it.

`python tests/kernels/row_launches.py` prints every kernel at every width on every architecture,
and the table of instructions to paste below after a change that is meant.
"""

from __future__ import annotations

from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

from fastdit.kernels import adaln, gated_adaln, gated_residual, slot_sums
from fastdit.testing import VirtualGPU, inspect
from fastdit.testing.virtual import Launch

WIDTHS = (384, 768, 1024, 1152)  # DiT-S, B, L and XL
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
BATCH, TOKENS = 2, 9  # two slots of a sample, of five and four rows


@dataclass(frozen=True)
class Budget:
    """The most registers on NVIDIA's GPUs and the least occupancy, rows of 16-bit numbers first."""

    registers: tuple[int, int]
    occupancy: tuple[float, float]


BUDGETS = {
    "adaln": Budget((40, 40), (0.95, 0.75)),
    "gated_residual": Budget((40, 48), (0.75, 0.75)),
    "gated_adaln": Budget((40, 40), (0.95, 0.75)),
    "adaln_backward": Budget((80, 80), (0.37, 0.37)),
    "gated_residual_backward": Budget((64, 64), (0.50, 0.50)),
    "gated_adaln_backward": Budget((96, 80), (0.31, 0.37)),
}
AMD_OCCUPANCY = 0.37

# PTX warp instructions a row of 18 in bfloat16, of Triton 3.8.
INSTRUCTIONS = {
    ("sm_80", 384): {
        "adaln": 390.0,
        "adaln_backward": 286.9,
        "gated_residual": 180.0,
        "gated_residual_backward": 115.1,
        "gated_adaln": 540.0,
        "gated_adaln_backward": 564.7,
    },
    ("sm_80", 1152): {
        "adaln": 860.0,
        "adaln_backward": 986.2,
        "gated_residual": 436.0,
        "gated_residual_backward": 382.7,
        "gated_adaln": 1224.0,
        "gated_adaln_backward": 1352.9,
    },
    ("sm_90", 768): {
        "adaln": 496.0,
        "adaln_backward": 584.7,
        "gated_residual": 264.0,
        "gated_residual_backward": 221.6,
        "gated_adaln": 726.0,
        "gated_adaln_backward": 1145.3,
    },
    ("sm_90", 1152): {
        "adaln": 860.0,
        "adaln_backward": 986.2,
        "gated_residual": 436.0,
        "gated_residual_backward": 374.7,
        "gated_adaln": 1224.0,
        "gated_adaln_backward": 1352.9,
    },
}


def inputs(width: int, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
    """x, y and their gradients; modulation in chunks of one projection, as in a DiT block."""
    generator = torch.Generator().manual_seed(width)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    streams = {name: random(BATCH, TOKENS, width) for name in ("x", "y", "dh", "dout")}
    shift, scale, gate = random(BATCH, 6 * width).chunk(6, -1)[3:]
    return streams | {"shift": shift, "scale": scale, "gate": gate}


def launch_all(gpu: VirtualGPU, t: dict[str, Tensor]) -> tuple[dict[str, Launch], dict[str, tuple]]:
    """Every op forward and backward: the launch of its row-wise kernel, and what it returned."""
    x, y, shift, scale, gate = (t[name] for name in ("x", "y", "shift", "scale", "gate"))
    affine, options = (None, None), ("layer", True)
    launches, returned = {}, {}

    def record(name: str, result) -> tuple:
        launches[name] = next(one for one in gpu.launches if one.name != "finish_kernel")
        gpu.launches.clear()
        returned[name] = (result,) if isinstance(result, Tensor) else tuple(result)
        return returned[name]

    modulation = (shift, scale, *affine)
    _, mean, rstd = record("adaln", adaln.adaln(x, *modulation, 1e-6, *options))
    record(
        "adaln_backward",
        adaln.adaln_backward(t["dout"], x, mean, rstd, *modulation, *options),
    )
    record("gated_residual", gated_residual.gated_residual(x, y, gate))
    record(
        "gated_residual_backward",
        gated_residual.gated_residual_backward(t["dout"], y, gate),
    )
    h, _, mean, rstd = record(
        "gated_adaln", gated_adaln.gated_adaln(x, y, gate, *modulation, 1e-6, *options)
    )
    record(
        "gated_adaln_backward",
        gated_adaln.gated_adaln_backward(
            t["dh"], t["dout"], h, mean, rstd, y, gate, *modulation, *options
        ),
    )
    return launches, returned


def compiled(arch: str, width: int, dtype: torch.dtype) -> dict[str, Launch]:
    """Without the second pass of the backward, which is the same at every width."""
    second_pass = mock.patch.object(slot_sums, "finish", return_value=(None, None))
    with second_pass, VirtualGPU(arch, mode="compile") as gpu:
        return launch_all(gpu, inputs(width, dtype, "meta"))[0]


def simulated(arch: str, width: int, dtype: torch.dtype):
    with VirtualGPU(arch, mode="simulate") as gpu:
        tensors = inputs(width, dtype)
        return tensors, *launch_all(gpu, tensors)


def instructions(launch: Launch) -> float:
    """PTX warp instructions a row."""
    return round(launch.simulation.warp_instructions / (BATCH * TOKENS), 1)


if __name__ == "__main__":
    for arch in ARCHITECTURES:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for width in WIDTHS:
                for name, launch in compiled(arch, width, dtype).items():
                    found = inspect(launch)
                    print(
                        f"{arch:7s}{str(dtype)[6:]:9s}{width:5d} {name:24s}"
                        f"{found.registers:4d} registers{found.occupancy.fraction:6.2f} occupancy"
                        f"{found.spills:3d} spills{found.stack_bytes:4d} stack, 128-bit of others: "
                        f"{found.loads_wide}/{found.loads_narrow} loads "
                        f"{found.stores_wide}/{found.stores_narrow} stores",
                        flush=True,
                    )
    for arch, width in INSTRUCTIONS:
        launches = simulated(arch, width, torch.bfloat16)[1]
        print((arch, width), {k: instructions(v) for k, v in launches.items()}, flush=True)
