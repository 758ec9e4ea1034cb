"""Execute compiled PTX on numpy arrays, and count what the hardware would do.

`simulate` takes what Triton compiled, `run_ptx` any PTX module (nvcc's, say). Supported is the
SIMT instruction set with warp shuffles, asynchronous copies, ldmatrix and mma.sync; so, kernels
without `tl.dot` for every NVIDIA architecture and all kernels for sm_80, 86, 89 and, without tensor
descriptors, 120. Hopper's and Blackwell's own tensor-core instructions (wgmma, tcgen05), TMA,
clusters and calls are not. Anything unknown raises `NotImplementedError` with the instruction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fastdit.testing.simulator.counters import GlobalTraffic, SharedTraffic, Simulation
from fastdit.testing.simulator.machine import Machine, SimulationError
from fastdit.testing.simulator.memory import GlobalMemory, MemoryFault
from fastdit.testing.simulator.parser import Parameter, parse

__all__ = [
    "GlobalTraffic",
    "MemoryFault",
    "SharedTraffic",
    "Simulation",
    "SimulationError",
    "run_ptx",
    "simulate",
]

# Numpy's cost an instruction is a few µs and a few ns a lane: enough lanes to hide the former,
# few enough that the arrays stay in the cache.
_LANES = 16384


def simulate(compiled: Any, grid: Sequence[int], arguments: dict[str, Any]) -> Simulation:
    """Simulate one launch of a kernel that Triton compiled; `VirtualGPU(mode="simulate")` does.

    Args:
        compiled: what `kernel.warmup` or a launch under `VirtualGPU(mode="compile")` returned.
        grid: up to three sizes.
        arguments: the kernel's parameters by name; tensors on the CPU, changed in place.

    Raises:
        NotImplementedError: the PTX has an instruction that the simulator lacks.
        MemoryFault: an access out of bounds or not aligned.
        SimulationError: an instruction failed, such as a shuffle from an inactive lane.
    """
    if "ptx" not in compiled.asm:
        raise ValueError(f"compiled: got a kernel for {compiled.metadata.target.arch}, without PTX")
    values: list[Any] = []
    for name, type_ in compiled.src.signature.items():
        _flatten(arguments[name], type_, values)
    scratch = [0, 0]  # Triton's own two pointers, for global and profile scratch
    threads = compiled.metadata.num_warps * compiled.metadata.target.warp_size
    return run_ptx(
        compiled.asm["ptx"],
        grid,
        (threads, 1, 1),
        [*values, *scratch],
        shared_bytes=compiled.metadata.shared,
        kernel=compiled.metadata.name,
    )


def _flatten(value: Any, type_: Any, found: list[Any]) -> None:
    if isinstance(type_, tuple | list):
        for item, item_type in zip(value, type_, strict=True):
            _flatten(item, item_type, found)
    elif str(type_).startswith("tensordesc"):
        raise NotImplementedError("tensor descriptors in the simulator")
    elif type_ != "constexpr":
        found.append(
            getattr(value, "base", value) if not isinstance(value, torch.Tensor) else value
        )


def run_ptx(
    ptx: str,
    grid: Sequence[int],
    block: Sequence[int],
    arguments: Sequence[Any],
    *,
    shared_bytes: int = 0,
    kernel: str | None = None,
) -> Simulation:
    """Simulate one launch of a kernel of any PTX module.

    Args:
        ptx: the module's text.
        grid, block: up to three sizes each.
        arguments: one for each parameter: a CPU tensor for a pointer (changed in place), an int or
            float for a number, `bytes` for a struct; or for a struct that holds pointers a list of
            its members: tensors, None for null, and numpy scalars of the members' types.
        shared_bytes: dynamic shared memory of a block.
        kernel: the kernel's name or a part of it; None for the first.

    Raises:
        ValueError: the arguments do not fit the kernel's parameters.
        NotImplementedError, MemoryFault, SimulationError: as for `simulate`.
    """
    program = parse(ptx, kernel)
    sizes, threads = _three(grid), _three(block)
    if len(arguments) != len(program.parameters):
        raise ValueError(
            f"arguments: got {len(arguments)}, {program.name} has {len(program.parameters)} "
            "parameters"
        )
    members = [m for value in arguments for m in (value if isinstance(value, list) else [value])]
    tensors = [value for value in members if isinstance(value, torch.Tensor)]
    for tensor in tensors:
        if tensor.device.type != "cpu":
            raise ValueError(f"arguments: got a tensor on {tensor.device}, allowed is cpu")
    memory = GlobalMemory(tensors, program.constants)
    parameters = np.zeros(program.parameter_bytes, np.uint8)
    for value, place in zip(arguments, program.parameters.values(), strict=True):
        data = np.frombuffer(_packed(value, place, memory), np.uint8)
        parameters[place.offset : place.offset + place.size] = data
    count = sizes[0] * sizes[1] * sizes[2]
    simulation = Simulation(program.name, count, threads[0] * threads[1] * threads[2])
    places = np.stack([axis.ravel() for axis in np.indices(sizes[::-1])[::-1]], 1)
    batch = max(1, _LANES // max(simulation.threads_per_block, 32))
    for start in range(0, count, batch):
        Machine(
            program,
            places[start : start + batch],
            sizes,
            threads,
            parameters,
            memory,
            shared_bytes,
            simulation,
        ).run()
    memory.finish(simulation)
    memory.copy_back()
    return simulation


def _three(sizes: Sequence[int]) -> tuple[int, int, int]:
    x, y, z = (*map(int, sizes), 1, 1)[:3]
    return x, y, z


def _packed(value: Any, place: Parameter, memory: GlobalMemory) -> bytes:
    if isinstance(value, torch.Tensor):
        value = memory.address_of(value)
    if isinstance(value, list):
        value = _struct(value, memory)
    if isinstance(value, bytes) and len(value) == place.size:
        return value
    if isinstance(value, float) and place.type in ("f32", "f64"):
        return np.array(value, np.float32 if place.type == "f32" else np.float64).tobytes()
    if isinstance(value, int) and place.type not in ("f32", "f64"):
        return (value % 2 ** (8 * place.size)).to_bytes(place.size, "little")
    if isinstance(value, int):
        return _packed(float(value), place, memory)
    raise ValueError(f"arguments: got {value!r} for parameter {place.name} of type .{place.type}")


def _struct(members: list[Any], memory: GlobalMemory) -> bytes:
    """The members one after another as C lays them out: each aligned to its own size."""
    packed, widest = b"", 1
    for member in members:
        if isinstance(member, torch.Tensor):
            member = np.uint64(memory.address_of(member))
        number = np.uint64(0) if member is None else member
        packed += bytes(-len(packed) % number.nbytes) + number.tobytes()
        widest = max(widest, number.nbytes)
    return packed + bytes(-len(packed) % widest)
