"""What else is known of a column: its memory, what it keeps for the backward, launches, energy.

Each fact takes a run of its own, outside the timing.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from fastdit.testing import count_traffic

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler says when it starts and stops
Function = Callable[[], object]


def peak_bytes(function: Function, device: str) -> int | None:
    """The most that PyTorch's allocator held during a call over what it held before; None where
    PyTorch does not allocate, as in other runtimes."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        function()
    held = most = 0
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most or None


def saved_bytes(forward: Function, given: Sequence[torch.Tensor] = ()) -> int:
    """Bytes that a differentiated forward pass keeps for its backward; parameters and what is
    `given`, which are there anyway, are not counted."""
    kept: dict[int, int] = {}
    there = {tensor.untyped_storage().data_ptr() for tensor in given}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if not (tensor.is_leaf and tensor.requires_grad) and storage.data_ptr() not in there:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = forward()
    del result
    return sum(kept.values())


def counted(function: Function) -> dict[str, int]:
    """Kernels launched and bytes that they must move, an op of PyTorch or of fastdit being one."""
    with count_traffic() as traffic:
        function()
    return {"launches": traffic.total_launches, "moved_bytes": traffic.total_bytes}


def device_launches(function: Function) -> int:
    """Kernels that the GPU ran, as CUPTI saw them; those of a replayed graph are among them."""
    function()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        function()
        torch.cuda.synchronize()
    events = found.events()
    return sum(
        e.device_type == torch.autograd.DeviceType.CUDA and not e.name.startswith("Mem")
        for e in events
    )


def flops(function: Function) -> int:
    """Of matrix products and attention, counted."""
    with count_traffic() as traffic:
        function()
    return traffic.total_flops


class Meter:
    """NVML's energy counter of the current GPU; `reason` says why there is none."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._nvml: Any = None
        if not torch.cuda.is_available():
            self.reason = "no CUDA device"
            return
        try:
            self._nvml = importlib.import_module("pynvml")
            self._nvml.nvmlInit()
            uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
            uuid = uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
            self._handle = self._nvml.nvmlDeviceGetHandleByUUID(uuid)
            self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        except ImportError:
            self.reason = "nvidia-ml-py is not installed"
        except self._nvml.NVMLError as error:
            self.reason = f"NVML: {error}"

    def joules(self, function: Function, seconds: float = 1.0) -> float | None:
        """Joules of one call, over calls for at least `seconds`: the counter moves every 0.1 s."""
        if self.reason is not None:
            return None
        read = self._nvml.nvmlDeviceGetTotalEnergyConsumption
        torch.cuda.synchronize()
        before, begun, calls = read(self._handle), time.perf_counter(), 0
        while time.perf_counter() - begun < seconds:
            function()
            torch.cuda.synchronize()
            calls += 1
        return (read(self._handle) - before) / 1e3 / calls

    def clocks(self) -> dict[str, int | float]:
        """MHz of the multiprocessors and the memory now, and the power limit in watts."""
        if self.reason is not None:
            return {}
        nvml = self._nvml
        kinds = {"sm_mhz": nvml.NVML_CLOCK_SM, "memory_mhz": nvml.NVML_CLOCK_MEM}
        found = {k: nvml.nvmlDeviceGetClockInfo(self._handle, v) for k, v in kinds.items()}
        limit = nvml.nvmlDeviceGetEnforcedPowerLimit(self._handle)
        return found | {"power_limit_watts": limit / 1e3}
