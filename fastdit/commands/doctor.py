"""`fastdit doctor`: what this machine has, what is missing, and what would run where."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import shlex

import torch
from rich.console import Console
from rich.table import Table

from fastdit import __version__, backends, native

SUMMARY = "tell versions, devices, compilers, and what would run where"
PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "safetensors",
    "ninja",
    "diffusers",
    "matplotlib",
    "scikit-learn",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`doctor` takes none."""


def package_version(name: str) -> str:
    """The installed version of a distribution, or that it is not there."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def compiler_lines(status: native.Status) -> list[tuple[str, str]]:
    """The compilers that a build would use, or what is missing."""
    tools = status.tools
    if tools is None:
        return [("compilers", status.missing or "")]
    nvcc = f"{tools.nvcc}, {tools.nvcc_version}" if tools.nvcc else "not found"
    return [("c++", f"{shlex.join(tools.cxx)}, {tools.cxx_version}"), ("nvcc", nvcc)]


def library_lines(status: native.Status) -> list[tuple[str, str]]:
    """The compiled library: where, how it was built, what is in it; or what to do to have one."""
    lines = [("cache", str(status.cache))]
    lines += [("failed build", f"{log}; `fastdit build` tries again") for log in status.failed]
    if status.library is None:
        if status.missing:
            remedy = f"cannot be built: {status.missing}"
        elif native.build_mode() == "0":
            remedy = "FASTDIT_BUILD=0 forbids building it at first use; run `fastdit build`"
        elif status.failed:
            remedy = "compiling failed before; run `fastdit build`"
        else:
            remedy = "the first use of an op builds it, or `fastdit build` now"
        return [("library", f"not built; {remedy}"), *lines]
    path, info = status.library
    cuda = f"for {' '.join(info.archs)}, {info.nvcc}" if info.nvcc else "none"
    if not info.nvcc and status.tools and status.tools.nvcc:
        cuda += "; `fastdit build --cuda` adds them"
    for i in range(torch.cuda.device_count()):
        if info.nvcc and not info.runs_on(torch.cuda.get_device_capability(i)):
            cuda += f"; none for cuda:{i}, set TORCH_CUDA_ARCH_LIST and run `fastdit build`"
    size = f"{path.stat().st_size / 1e6:.1f} MB"
    return [
        ("library", f"{path}, {size}"),
        ("built with", f"{info.compiler}, torch {info.torch}, for torch {info.abi} and later"),
        ("cuda kernels", cuda),
        *lines,
    ]


def device_lines() -> list[tuple[str, str]]:
    """Each device and what it is."""
    lines = [
        ("cpu", f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    ]
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        lines.append((f"cuda:{i}", f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory >> 30} GiB"))
    return lines


def run(args: argparse.Namespace) -> None:
    """Print the report."""
    table = Table(title=f"fastdit {__version__}", title_justify="left", show_header=False)
    table.add_row("python", platform.python_version())
    for name in PACKAGES:
        table.add_row(name, package_version(name))
    native.register_all(may_build=False)
    status = native.status()
    for name, what in (*compiler_lines(status), *library_lines(status), *device_lines()):
        table.add_row(name, what)
    console = Console()
    console.print(table)
    choices = Table("op", "device", "runs", "why", title="What would run", title_justify="left")
    for choice in backends.explain():
        choices.add_row(choice.op, choice.device, choice.runs, choice.reason)
    console.print(choices)
