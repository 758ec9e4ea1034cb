"""The compiled library: found, built where there is none, loaded at the first use of an op.

A library that fits these sources is used: the one built last in the cache, else the one installed
with the package. Where there is none the first use builds it, once for all processes, and says so.
FASTDIT_BUILD=0 forbids that; FASTDIT_BUILD=1 makes a failure an error. Otherwise the ops run their
reference without a library, and one line says why. docs/building.md tells it to users.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from fastdit import _build, backends, native_cache, native_kernels
from fastdit._build import BuildError, CompileError, Info, Toolchain

PROGRESS_SECONDS = 10.0
"""Between two lines of progress where stderr is no terminal."""
_logger = logging.getLogger("fastdit")


class NativeError(ImportError):
    """The compiled library cannot be had; the message says why."""


class _State:
    loaded: tuple[Path, Info] | None = None
    error: NativeError | None = None
    registered = False


def build_mode() -> str:
    """FASTDIT_BUILD: `auto`, `0` (never build) or `1` (a failure is an error).

    Raises:
        ValueError: it is none of these.
    """
    mode = os.environ.get("FASTDIT_BUILD") or "auto"
    if mode not in ("auto", "0", "1"):
        raise ValueError(f"FASTDIT_BUILD: got {mode!r}, allowed are 'auto', '0', '1'")
    return mode


def candidates() -> list[tuple[Path, Info]]:
    """The libraries that fit these sources, the one to load first."""
    source = _build.source_hash(_build.sources_folder())
    found = []
    for path in [*native_cache.libraries(), Path(__file__).with_name(_build.LIBRARY)]:
        info = _build.read_info(path)
        if info is not None and (info.source, info.abi) == (source, _build.TORCH_ABI):
            found.append((path, info))
    return found


def build(
    cuda: bool | None = None, *, force: bool = False, jobs: int | None = None, verbose: bool = False
) -> tuple[Path, float | None]:
    """Build the library into the cache, with progress on stderr.

    Args:
        cuda: with CUDA kernels or without; None is with them if nvcc is found.
        force: compile everything even if the cache has this very library.
        jobs: compilers at once; None is MAX_JOBS, else one for each processor.
        verbose: show every command.

    Returns:
        The library's path and the seconds it took, None if it was there.

    Raises:
        CompileError: a compiler failed.
        BuildError: something is missing, or a file cannot be written.
    """
    return _build_in_cache(find_toolchain(cuda), force=force, jobs=jobs, verbose=verbose)


def find_toolchain(cuda: bool | None = None) -> Toolchain:
    """The compilers to build for this process's torch with; see `fastdit._build`."""
    return _build.find_toolchain(Path(torch.__file__).parent, cuda)


def _build_in_cache(
    tools: Toolchain,
    *,
    force: bool = False,
    retry: bool = True,
    unusable: frozenset[Path] = frozenset(),
    jobs: int | None = None,
    verbose: bool = False,
) -> tuple[Path, float | None]:
    """`retry` False does not repeat a build that failed before, in this process or another."""
    info = _build.describe(tools)
    cache = native_cache.writable()
    folder = cache / native_cache.generation(info)
    target, log = folder / f"libfastdit-{info.key}.so", folder / f"failed-{info.key}.log"
    wait = "another process is compiling the kernels; waiting for it ..."
    with native_cache.lock(cache, lambda: _say(wait)) as descriptor:
        if target.is_file() and not force and target not in unusable:
            return target, None
        if log.is_file() and not retry:
            raise _failed_before(log)
        _say(f"compiling the kernels with {tools}, once, into {folder} ...")
        with native_cache.objects(cache, info) as objects, _progress(verbose) as progress:
            if force:
                shutil.rmtree(objects, ignore_errors=True)
            options = {"jobs": jobs, "verbose": verbose, "inherited": (descriptor,)}
            try:
                seconds = _build.compile_library(
                    tools, info, objects, target, progress=progress, **options
                )
            except CompileError as error:
                if not error.passing:
                    _keep_log(log, error.output)
                raise
        log.unlink(missing_ok=True)
        native_cache.prune(cache)
    _say(f"compiled in {seconds:.1f} s")
    return target, seconds


def _failed_before(log: Path) -> CompileError:
    error = CompileError(log.read_text())
    error.args = (f"{error}, and it is not tried again (all it said: {log})",)
    return error


def _keep_log(log: Path, output: str) -> None:
    with contextlib.suppress(OSError):
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(output)
        _say(f"what the compiler said is in {log}")


def _say(text: str) -> None:
    print(f"fastdit: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _progress(verbose: bool):
    """What shows ninja's lines: one that is overwritten, or in a log one now and then."""
    terminal = sys.stderr.isatty()
    due = time.monotonic() + PROGRESS_SECONDS

    def show(line: str) -> None:
        nonlocal due
        if verbose:
            _say(line)
        elif line.startswith("[") and terminal:
            print(f"\r\033[Kfastdit: {line}", end="", file=sys.stderr, flush=True)
        elif line.startswith("[") and time.monotonic() >= due:
            due = time.monotonic() + PROGRESS_SECONDS
            _say(line)

    try:
        yield show
    finally:
        if terminal and not verbose:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def _build_at_first_use(mode: str, unusable: frozenset[Path]) -> Path:
    """Build for this torch; where the CUDA compiler fails, without CUDA kernels, and say so."""
    tools = find_toolchain(None if torch.version.cuda else False)
    try:
        return _build_in_cache(tools, retry=mode == "1", unusable=unusable)[0]
    except CompileError as error:
        if mode == "1" or tools.nvcc is None or not error.of_cuda:
            raise
        _say(f"{error}; going on without the CUDA kernels")
        return _build_in_cache(tools.without_cuda(), retry=False, unusable=unusable)[0]


def load(*, may_build: bool = True) -> tuple[Path, Info]:
    """Load the library, once, and tell which; build it if there is none and that is allowed.

    Raises:
        NativeError: it cannot be had. There is no second try in the same process.
    """
    if _State.loaded is None and _State.error is None:
        mode = build_mode()
        try:
            _State.loaded = _load(mode, may_build)
        except BuildError as error:
            said = getattr(error, "output", "") if mode == "1" else ""
            _State.error = NativeError(f"{error}\n{said}".strip())
        except KeyboardInterrupt:
            _State.error = NativeError("compiling was interrupted")
            raise
    if _State.loaded is None:
        raise _State.error or NativeError("it is not loaded")
    return _State.loaded


def _already_loaded() -> str | None:
    """What the library in this process says, where fastdit was imported a second time."""
    try:
        return torch.ops.fastdit_native.build_info()
    except AttributeError:
        return None


def _load(mode: str, may_build: bool) -> tuple[Path, Info]:
    unusable = {}
    if present := _already_loaded():  # two in one process would both define the same ops
        for path, info in candidates():
            if info.json() == present:
                return path, info
        raise BuildError("a library of other sources is loaded in this process; start it again")
    for path, info in candidates():
        try:
            torch.ops.load_library(str(path))
            return path, info
        except OSError as error:
            unusable[path] = f"{path} does not load ({error})"
    if mode == "0" or not may_build:
        why = "FASTDIT_BUILD=0 forbids building it" if mode == "0" else "the first use builds it"
        raise BuildError("; ".join(unusable.values()) or f"it is not built, and {why}")
    path = _build_at_first_use(mode, frozenset(unusable))
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise BuildError(f"{path} does not load ({error})") from None
    info = _build.read_info(path)
    if info is None:
        raise BuildError(f"{path} does not say how it was built")
    return path, info


def register_all(*, may_build: bool = True) -> None:
    """Register the library's kernels; called by `fastdit.backends` at the first call on a device.

    Args:
        may_build: False leaves a library that is not built yet unbuilt, in silence.

    Raises:
        NativeError: FASTDIT_BUILD=1 and the library cannot be had.
        ValueError: FASTDIT_BUILD has a value that it cannot have.
    """
    if _State.registered:
        return
    try:
        load(may_build=may_build)
    except NativeError as error:
        why = str(error).partition("\n")[0]
        if build_mode() == "1":
            raise
        backends.note_missing("the compiled library is missing, see `fastdit doctor`")
        if may_build:
            _logger.warning(
                "fastdit: no compiled library, so ops run their reference: %s. "
                "`fastdit doctor` tells what is missing, `fastdit build` builds it.",
                why,
            )
    else:
        for name in native_kernels.MODULES:
            for kernel in importlib.import_module(f"fastdit.native_kernels.{name}").KERNELS:
                backends.register(kernel)
    _State.registered = True


@dataclass(frozen=True)
class Status:
    """What `fastdit doctor` tells: a library or None, and what there is to build one with."""

    library: tuple[Path, Info] | None
    cache: Path | None
    failed: list[Path]
    tools: Toolchain | None
    missing: str | None


def status() -> Status:
    """Whether there is a library, and what is missing to build one. Nothing is built or loaded."""
    tools = cache = missing = None
    try:
        cache = native_cache.writable()
        tools = find_toolchain()
    except BuildError as error:
        missing = str(error)
    failed = list((cache / native_cache.generation()).glob("failed-*.log")) if cache else []
    library = _State.loaded or next(iter(candidates()), None)
    return Status(library, cache, failed, tools, missing)
