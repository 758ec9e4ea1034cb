"""The machine of a result: what it is, what it can do at most, and what is installed.

The ceilings are measured in the same run as the columns: a copy of more than any cache holds, and
a matrix product large enough to reach its peak, in each dtype that is asked for.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
from timing import interleaved

import fastdit
from harness.facts import Meter
from harness.problem import DTYPES

PACKAGES = (
    "torch",
    "triton",
    "diffusers",
    "onnxruntime",
    "openvino",
    "flash-attn",
    "xformers",
    "nvidia-ml-py",
)


def versions() -> dict[str, str | None]:
    """Of everything that a reader needs to repeat the run; None is not installed."""
    found: dict[str, str | None] = {
        "fastdit": fastdit.__version__,
        "python": platform.python_version(),
    }
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found | {"cuda": torch.version.cuda}


def commit() -> str | None:
    """The checkout's commit, with a plus where files differ from it; None outside git."""
    try:
        run = [
            subprocess.run(
                ["git", *what], capture_output=True, text=True, cwd=Path(__file__).parent
            )
            for what in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "-uno"])
        ]
    except FileNotFoundError:
        return None
    if run[0].returncode:
        return None
    return run[0].stdout.strip() + "+" * bool(run[1].stdout.strip())


def _processor() -> tuple[str, float | None]:
    """The processor's name and its clock now in MHz."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine(), None
    found = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    clock = found.get("cpu MHz")
    return found.get("model name", platform.machine()), float(clock) if clock else None


def describe(device: str) -> dict[str, Any]:
    """What the machine is, without names of its owner."""
    name, megahertz = _processor()
    found: dict[str, Any] = {
        "device": device,
        "cpu": name,
        "cpu_mhz": megahertz,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "versions": versions(),
        "commit": commit(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        found |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "gpu_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "clocks": Meter().clocks(),
        }
    return found


def ceilings(device: str, dtypes: list[str], patience: float) -> dict[str, float]:
    """Bytes per second of a copy, reads and writes counted, and flop per second of a product in
    each dtype: the best of the turns, since a ceiling is a ceiling."""
    size = 1 << (30 if device == "cuda" else 28)
    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    functions = {"copy": lambda: target.copy_(source)}
    work = {"copy": 2.0 * size}
    side = 8192 if device == "cuda" else 2048
    for dtype in dtypes:
        a, b = (torch.randn(side, side, device=device).to(DTYPES[dtype]) for _ in range(2))
        functions[f"gemm_{dtype}"] = lambda a=a, b=b: a @ b
        work[f"gemm_{dtype}"] = 2.0 * side**3
    taken = interleaved(functions, 9, device=device, budget=6.0, patience=patience)
    return {name: work[name] / min(times) for name, times in taken.seconds.items()}
