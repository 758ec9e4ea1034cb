"""Where a sampling run's time goes, against what the machine could do.

A run of a `Sampler` under torch.profiler, its time split by what it was spent on: matrix products,
attention, fastdit's own ops, conditioning, the update, other ops of PyTorch, and what is left of
the wall time, which is Python and the dispatcher (and waiting, where other processes run). On a GPU
times are the device's, and the rest is the time it waits for the host. The ceiling is the fastest
large matrix product of the same dtype in the same process.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from fastdit.sampler import Sampler

CATEGORIES = (
    "matrix products",
    "attention",
    "native forward",
    "fastdit's ops",
    "conditioning",
    "update",
    "other ops",
    "Python",
)
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "addmv", "linear", "matmul", "convolution"}
_UPDATES = {"diffusion_step", "randn", "normal_"}
_PEAK_SIZE, _PEAK_RUNS = 1024, 8


@dataclass(frozen=True)
class Profile:
    """One run, measured.

    Attributes:
        steps: evaluations of the model.
        wall: seconds of the run.
        seconds: by category.
        calls: ops, not counting those inside one of their category (on a GPU kernels).
        flops: of the run's forwards, two for a multiply-add.
        peak: flop a second of the fastest large matrix product.
    """

    steps: int
    wall: float
    seconds: dict[str, float]
    calls: dict[str, int]
    flops: float
    peak: float

    @property
    def achieved(self) -> float:
        """Flop a second of the whole run."""
        return self.flops / self.wall

    @property
    def launches(self) -> float:
        """Ops (on a GPU kernels) a step."""
        return sum(self.calls.values()) / self.steps


def category(name: str, ancestors: list[str]) -> str:
    """What an op of this name, called by these, is counted as."""
    if "conditioning" in (name, *ancestors):
        return "conditioning"
    space, _, op = name.rpartition("::")
    ours = space in ("fastdit", "fastdit_native")
    if op in _UPDATES:
        return "update"
    if op in _PRODUCTS or "gemm" in name.lower() or "convolution" in op:
        return "matrix products"
    if "attention" in op or "flash" in name or "fmha" in name:
        return "attention"
    if ours and "forward" in op:
        return "native forward"
    if ours:
        return "fastdit's ops"
    # A step's rows of the table of conditioning.
    return "conditioning" if op == "index_select" else "other ops"


def gemm_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Flop a second of the fastest of a few large matrix products."""
    a = torch.randn(_PEAK_SIZE, _PEAK_SIZE, device=device).to(dtype)
    out = torch.empty_like(a)
    best = float("inf")
    for _ in range(_PEAK_RUNS):
        _wait(device)
        start = time.perf_counter()
        torch.mm(a, a, out=out)
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * _PEAK_SIZE**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _ancestors(event: Any) -> list[str]:
    names = []
    while (event := event.cpu_parent) is not None:
        names.append(event.name)
    return names


def split(events: Any, on_gpu: bool) -> tuple[dict[str, float], dict[str, int]]:
    """The seconds and the calls of the profiler's events, by category."""
    seconds: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in events:
        is_kernel = event.device_type != torch.autograd.DeviceType.CPU
        if is_kernel != on_gpu:
            continue
        above = [] if is_kernel else _ancestors(event)
        kind = category(event.name, above)
        own = event.device_time_total if is_kernel else event.self_cpu_time_total
        seconds[kind] += own / 1e6
        # An op that calls another of its kind counts once: addmm in linear.
        calls[kind] += int(not above or category(above[0], above[1:]) != kind)
    return dict(seconds), dict(calls)


def profile(sampler: Sampler, classes: Any, trace: Path | None = None) -> Profile:
    """Run `sampler(classes)` once to warm up, and once under the profiler.

    Args:
        sampler: eager or with graphs.
        classes: as its call takes them.
        trace: where to write a Chrome trace (chrome://tracing, ui.perfetto.dev); None writes none.
    """
    parameter = next(sampler.model.parameters())
    device = parameter.device
    peak = gemm_peak(device, parameter.dtype)
    sampler(classes, seed=0)
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as prof:
        _wait(device)
        start = time.perf_counter()
        samples = sampler(classes, seed=0)
        _wait(device)
        wall = time.perf_counter() - start
    if trace is not None:
        trace.parent.mkdir(parents=True, exist_ok=True)
        prof.export_chrome_trace(str(trace))
    seconds, calls = split(prof.events(), device.type == "cuda")
    seconds["Python"] = max(0.0, wall - sum(seconds.values()))
    rows = len(samples) * sum(1 + guided for guided in sampler.plan.guided)
    flops = 2 * sampler.model.flops() * rows
    return Profile(len(sampler.plan), wall, seconds, calls, flops, peak)
