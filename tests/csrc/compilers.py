"""Compiling csrc/ for its tests: with a host compiler under sanitizers, or with nvcc."""

from __future__ import annotations

import functools
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from fastdit._build import BuildError, sources, toolchain

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
ISAS = sources.ISAS
SANITIZERS = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
_HOST = ("-std=c++20", "-Wall", "-Werror", "-Wno-unknown-pragmas")


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="fastdit-csrc-")


def _output(*parts: str) -> Path:
    return Path(_folder().name) / "-".join(parts).replace("/", "-")


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


@functools.cache
def compile_host(source: str, *flags: str) -> Path:
    """One of this folder's sources as a program."""
    try:
        compiler = toolchain.find_cxx()
    except BuildError as error:
        pytest.skip(str(error))
    torch_headers = Path(torch.__file__).parent / "include"
    program = _output(source, *flags, "run")
    includes = [f"-I{CSRC}", f"-I{HERE}", "-isystem", str(torch_headers)]
    _run([*compiler, *_HOST, *flags, *includes, str(HERE / source), "-o", str(program)])
    return program


@functools.cache
def run_host(source: str, *flags: str) -> str:
    """Compile one of this folder's sources, run it, and return what it printed."""
    return _run([str(compile_host(source, *flags))])


@functools.cache
def compile_cuda(source: str, arch: str, kind: str) -> Path:
    """One of this folder's sources as a `cubin` or as `ptx` for an architecture such as sm_80."""
    nvcc = toolchain.find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc")
    output = _output(source, arch, kind)
    flags = ["-std=c++20", "-O3", "-Xptxas", "-warn-spills", "-Werror", "all-warnings"]
    command = [nvcc, f"--{kind}", f"-arch={arch}", *flags, f"-I{CSRC}", str(HERE / source)]
    _run([*command, "-o", str(output)])
    return output
