"""Compiling csrc/ for its tests: with a host compiler under sanitizers, or with nvcc.

ninja compiles, into a folder that the next run finds again: what has not changed since is there.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import shlex
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from fastdit import _build
from fastdit._build import BuildError, Toolchain, sources, toolchain

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
ISAS = sources.ISAS
SANITIZERS = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
# Without optimisation what is mostly compiled takes a fourth of the time.
QUICK = ("-O0", "-g1", "-Wno-psabi", "-Wno-stringop-overread")
_HOST = ("-std=c++20", "-Wall", "-Werror", "-Wno-unknown-pragmas")


@functools.cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="fastdit-csrc-")


@functools.cache
def folder() -> Path:
    """Where ninja's folders are; conftest.py has pytest's cache take its place."""
    return Path(_temporary().name)


@functools.cache
def tools() -> Toolchain:
    """The host compiler and ninja; without them the test is skipped."""
    try:
        return _build.find_toolchain(Path(torch.__file__).parent, cuda=False)
    except BuildError as error:
        pytest.skip(str(error))


def run(command: list[str]) -> str:
    """What a command prints, which must go well."""
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


def command(*words: str | Path) -> str:
    """A command of a ninja file."""
    return shlex.join(map(str, words)).replace("$", "$$")


def make(target: str, version: str, lines: list[str]) -> Path:
    """`target` of the ninja file of `lines`, whose compiler is of this `version`.

    Its folder is theirs alone, and one process at a time makes something there.
    """
    text = "\n".join([f"# {version}", *lines, ""])
    place = folder() / hashlib.sha256(text.encode()).hexdigest()[:16]
    place.mkdir(parents=True, exist_ok=True)
    with (place / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (place / "build.ninja").write_text(text)
        run([tools().ninja, "-C", str(place), target])
    return place / target


def rule(*compiler: str | Path) -> list[str]:
    """The rule `compile`: of one source, and again when a header that it includes has changed."""
    line = f"{command(*compiler)} $flags -MD -MF $out.d $in -o $out"
    return ["rule compile", f"  command = {line}", "  depfile = $out.d", "  deps = gcc"]


def host_compiler(*flags: str) -> list[str | Path]:
    """The command of the host compiler with the paths of csrc/ and of torch's headers."""
    includes = [f"-I{CSRC}", f"-I{HERE}", "-isystem", tools().torch / "include"]
    return [*tools().cxx, *_HOST, *flags, *includes]


@functools.cache
def compile_host(source: str, *flags: str) -> Path:
    """One of this folder's sources as a program."""
    build = f"build program: compile {HERE / source}"
    return make("program", tools().cxx_version, [*rule(*host_compiler(*flags)), build])


@functools.cache
def run_host(source: str, *flags: str) -> str:
    """Compile one of this folder's sources, run it, and return what it printed."""
    return run([str(compile_host(source, *flags))])


@functools.cache
def compile_cuda(source: str, arch: str, kind: str) -> Path:
    """One of this folder's sources as a `cubin` or as `ptx` for an architecture such as sm_80."""
    nvcc = toolchain.find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc")
    flags = ["-std=c++20", "-O3", "-Xptxas", "-warn-spills", "-Werror", "all-warnings"]
    compiler = [nvcc, f"--{kind}", f"-arch={arch}", *flags, f"-I{CSRC}"]
    build = f"build {kind}: compile {HERE / source}"
    return make(kind, toolchain.version_line(nvcc), [*rule(*compiler), build])
