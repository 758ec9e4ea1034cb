"""The ninja file, and running it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from .errors import BuildError, CompileError
from .info import LIBRARY, Info
from .sources import COMMON, HOST, compilations, source_hash, sources_folder
from .toolchain import Toolchain


def _shell(*words: str | Path) -> str:
    """Words of a command in a ninja file, quoted for the shell."""
    return shlex.join(map(str, words)).replace("$", "$$")


def _path(path: str | Path) -> str:
    """A target or an input in a ninja file."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _gencode(archs: tuple[str, ...]) -> list[str]:
    """nvcc's flags for the architectures: machine code for each, PTX where it is asked for."""
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def _rule(name: str, command: str, *, depfile: bool = True) -> list[str]:
    lines = [f"rule {name}", f"  command = {command}", "  description = $out"]
    return [*lines, "  depfile = $out.d", "  deps = gcc"] if depfile else lines


def ninja_file(tools: Toolchain, csrc: Path, jobs: int) -> str:
    """The build.ninja of all sources; it runs in the folder of its objects."""
    cuda = tools.nvcc is not None
    search = _shell(f"-I{csrc}", "-I.", "-isystem", tools.torch / "include")
    search += " -DFASTDIT_CUDA" if cuda else ""
    libraries = _shell(f"-L{tools.torch / 'lib'}", "-ltorch_cpu", "-lc10")
    whole = sys.platform == "linux"  # an undefined symbol fails the link here, not the loading
    cxx = _shell(*tools.cxx)
    end = f"{search} $flags -c $in -o $out"
    lines = _rule("cxx", f"{cxx} -MD -MF $out.d {_shell(*COMMON, *HOST)} {end}")
    link = f"{cxx} -shared {'-Wl,-zdefs ' if whole else ''}$in {libraries} -o $out"
    if cuda:
        compiler = [word for word in tools.cxx if not word.startswith("-")][-1]  # after ccache
        nvcc = _shell(tools.nvcc, "-ccbin", shutil.which(compiler) or compiler)
        host = _shell(f"-Xcompiler={','.join(HOST)}", "--expt-relaxed-constexpr")
        flags = f"-MD -MF $out.d {_shell(*COMMON)} {host}"
        device = f"{_shell(*_gencode(tools.archs))} --threads {jobs}"
        lines += _rule("nvcc", f"{nvcc} {flags} {device} {end}")
        lines += _rule("nvcc_host", f"{nvcc} {flags} {end}")
        link = f"{nvcc} -shared -cudart static {'-Xlinker -zdefs ' if whole else ''}"
        link += f"$in {libraries} -o $out"
    lines += _rule("link", link, depfile=False)
    units = compilations(csrc, cuda)
    for unit in units:
        lines.append(f"build {_path(unit.object)}: {unit.rule} {_path(unit.source)}")
        lines += [f"  flags = {unit.flags}"] if unit.flags else []
    lines.append(f"build {LIBRARY}: link {' '.join(_path(unit.object) for unit in units)}")
    return "\n".join([*lines, ""])


def default_jobs() -> int:
    """Compilers at once: MAX_JOBS, else one for each processor this process may use."""
    asked = os.environ.get("MAX_JOBS", "")
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def compile_library(
    tools: Toolchain,
    info: Info,
    objects: Path,
    output: Path,
    *,
    jobs: int | None = None,
    verbose: bool = False,
    progress: Callable[[str], None] = lambda line: None,
    inherited: tuple[int, ...] = (),
) -> float:
    """Compile csrc/ with its objects in `objects`, and put the library at `output` when whole.

    Args:
        tools, info: what to compile with, and the `describe(tools)` to write into the library.
        objects: kept between builds, only what changed is compiled.
        output: the library's path; it appears, or is replaced, in one step.
        jobs: compilers at once; None is `default_jobs()`.
        verbose: have ninja show every command.
        progress: takes each line that ninja prints.
        inherited: file descriptors that the compilers keep open.

    Returns:
        The seconds it took.

    Raises:
        CompileError: a compiler failed.
        BuildError: a file could not be written, or the sources changed meanwhile.
    """
    start = time.perf_counter()
    jobs = jobs or default_jobs()
    csrc = sources_folder()
    try:
        objects.mkdir(parents=True, exist_ok=True)
        define = f"#define FASTDIT_BUILD_INFO {json.dumps(info.json())}\n"
        _write_if_new(objects / "build_info.h", define)
        _write_if_new(objects / "build.ninja", ninja_file(tools, csrc, jobs))
        _ninja(tools, objects, jobs, verbose, progress, inherited)
        if source_hash(csrc) != info.source:
            raise BuildError(f"{csrc} changed while it was compiled; build again")
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = output.with_name(f"{output.name}.{os.getpid()}")
        try:
            shutil.copyfile(objects / LIBRARY, partial)
            with partial.open("rb+") as file:
                os.fsync(file.fileno())  # whole on the disk before it has its name
            os.replace(partial, output)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise BuildError(f"the library could not be written: {error}") from None
    return time.perf_counter() - start


def _ninja(
    tools: Toolchain,
    objects: Path,
    jobs: int,
    verbose: bool,
    progress: Callable[[str], None],
    inherited: tuple[int, ...],
) -> None:
    """Run ninja, line by line."""
    said = []
    with subprocess.Popen(
        [tools.ninja, "-C", str(objects), "-j", str(jobs), *(["-v"] if verbose else [])],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, "NINJA_STATUS": "[%f/%t] "},
        pass_fds=inherited,
    ) as process:
        for line in process.stdout or ():
            said.append(line)
            progress(line.rstrip("\n"))
    if process.returncode:
        raise CompileError("".join(said))


def _write_if_new(path: Path, text: str) -> None:
    """Write `text` unless the file holds it already: ninja goes by the time of change."""
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)
