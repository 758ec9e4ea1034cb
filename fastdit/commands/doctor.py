"""`fastdit doctor`: what this machine has, what is missing, and what would run where."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import shutil
import subprocess

import torch
from rich.console import Console
from rich.table import Table

from fastdit import __version__, backends

SUMMARY = "tell versions, devices, compilers, and what would run where"
PACKAGES = ("torch", "triton", "numpy", "safetensors", "diffusers", "matplotlib", "scikit-learn")
COMPILERS = {"c++": ("c++", "g++", "clang++"), "nvcc": ("nvcc",), "ninja": ("ninja",)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`doctor` takes none."""


def package_version(name: str) -> str:
    """The installed version of a distribution, or that it is not there."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def compiler_version(names: tuple[str, ...]) -> str:
    """The last line of `--version` that names a version, of the first program found."""
    for name in names:
        if path := shutil.which(name):
            out = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
            lines = [line for line in out.stdout.splitlines() if any(c.isdigit() for c in line)]
            return next((line for line in lines if "release" in line), lines[0] if lines else path)
    return "not found"


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
    for name, programs in COMPILERS.items():
        table.add_row(name, compiler_version(programs))
    for name, what in device_lines():
        table.add_row(name, what)
    console = Console()
    console.print(table)
    choices = Table("op", "device", "runs", "why", title="What would run", title_justify="left")
    for choice in backends.explain():
        choices.add_row(choice.op, choice.device, choice.runs, choice.reason)
    console.print(choices)
