"""Prove a Triton kernel on a machine without a GPU.

    with fastdit.testing.VirtualGPU("sm_90") as gpu:
        y = my_launcher(torch.randn(8, 1152))        # an ordinary host function, CPU tensors
    gpu.launches[0].trace.loaded                     # bytes of each argument

- `VirtualGPU` lets `kernel[grid](...)` and `kernel.warmup(...)` run on CPU or meta tensors: it
  compiles for a real target, runs Triton's interpreter, or simulates the compiled PTX.
- `inspect` reads a compiled kernel's registers, spills, access widths, tensor-core instructions
  and occupancy.
- `trace` counts the bytes and flops of every launch and finds accesses out of bounds and races.
- `simulate` executes compiled PTX and counts warp instructions, sectors, bank conflicts and
  divergence.
- `count_traffic` counts the kernels that any PyTorch code launches and the bytes they move.
- `fake_cuda` has what that count needs on fake CUDA tensors: attention as a GPU runs it, the
  backward pass, and the launches of fastdit's own kernels.
- `roofline` turns such counts into a *modelled* time on a real GPU's data sheet.

None of these measures a time. Importing this module does not import Triton; using it does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdit.testing.counting import Cost, Traffic, count_traffic
    from fastdit.testing.gpus import GPU, GPUS, Occupancy, gpu_of, occupancy
    from fastdit.testing.modelling import ModelledTime, roofline
    from fastdit.testing.resources import Resources, inspect
    from fastdit.testing.simulator import (
        MemoryFault,
        Simulation,
        SimulationError,
        run_ptx,
        simulate,
    )
    from fastdit.testing.tracing import KernelFault, Trace
    from fastdit.testing.virtual import Launch, VirtualGPU, trace

_HOMES = {
    "counting": ("Cost", "Traffic", "count_traffic"),
    "gpus": ("GPU", "GPUS", "Occupancy", "gpu_of", "occupancy"),
    "modelling": ("ModelledTime", "roofline"),
    "resources": ("Resources", "inspect"),
    "simulator": ("MemoryFault", "Simulation", "SimulationError", "run_ptx", "simulate"),
    "tracing": ("KernelFault", "Trace"),
    "virtual": ("Launch", "VirtualGPU", "trace"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}
__all__ = [
    "GPU",
    "GPUS",
    "Cost",
    "KernelFault",
    "Launch",
    "MemoryFault",
    "ModelledTime",
    "Occupancy",
    "Resources",
    "Simulation",
    "SimulationError",
    "Trace",
    "Traffic",
    "VirtualGPU",
    "count_traffic",
    "gpu_of",
    "inspect",
    "occupancy",
    "roofline",
    "run_ptx",
    "simulate",
    "trace",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
