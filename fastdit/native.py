"""The compiled library: found, built where there is none, loaded at the first use of an op.

A library that fits these sources is used: the one built last in the cache, else the one installed
with the package. Where there is none the first use builds it, once for all processes, under a
lock, with a message; `FASTDIT_BUILD=0` forbids that, `FASTDIT_BUILD=1` makes a failure an error.
Without a library the ops run their reference and one line says why. docs/building.md has it all.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import logging
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from fastdit import _build, backends, native_kernels
from fastdit._build import BuildError, Info

KEPT_GENERATIONS = 20
_logger = logging.getLogger("fastdit")


class NativeError(RuntimeError):
    """The compiled library cannot be had; the message says why, and what to do."""


class _State:
    loaded: tuple[Path, Info] | None = None
    error: NativeError | None = None
    registered = False


def build_mode() -> str:
    """FASTDIT_BUILD: `auto`, `0` (never build) or `1` (a failure is an error)."""
    mode = os.environ.get("FASTDIT_BUILD", "") or "auto"
    if mode not in ("auto", "0", "1"):
        raise ValueError(f"FASTDIT_BUILD: got {mode!r}, allowed are 'auto', '0', '1'")
    return mode


def cache_folders() -> list[Path]:
    """Where built libraries are kept, then where they are if that cannot be written."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    chosen = Path(os.environ.get("FASTDIT_CACHE") or Path(home) / "fastdit")
    return [chosen.absolute(), Path(tempfile.gettempdir()) / f"fastdit-{os.getuid()}"]


def generation() -> str:
    """The folder in the cache of the libraries that fit these sources on this machine."""
    source = _build.source_hash(_build.sources_folder())
    abi = f"torch{_build.TORCH_ABI}"
    return "-".join([_build.package_version(), source, abi, _build.machine()])


def _private(folder: Path) -> bool:
    """Nobody else can have put a library here: a folder of ours, not open to others' writing."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    ours = found.st_uid in (os.getuid(), 0)
    return stat.S_ISDIR(found.st_mode) and ours and not found.st_mode & 0o022


def candidates() -> list[Path]:
    """The libraries that fit these sources, the one to use first."""
    named = generation()
    cached = [
        path
        for cache in cache_folders()
        if _private(cache.resolve())
        for path in cache.glob(f"{named}/*.so")
    ]
    cached.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    return [path for path in [*cached, Path(__file__).parent / _build.LIBRARY] if _fits(path)]


def _fits(path: Path) -> bool:
    info = _build.read_info(path) if path.is_file() else None
    source = _build.source_hash(_build.sources_folder())
    return info is not None and (info.source, info.abi) == (source, _build.TORCH_ABI)


def _writable_cache() -> Path:
    reasons = []
    for folder in cache_folders():
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            reasons.append(f"{folder}: {error.strerror}")
            continue
        if _private(folder.resolve()):
            return folder
        reasons.append(f"{folder}: others may write to it")
    raise BuildError(f"no folder to build in ({'; '.join(reasons)}); set FASTDIT_CACHE to one")


@contextlib.contextmanager
def _lock(cache: Path) -> Iterator[None]:
    """One build at a time in a cache. The system frees the lock of a process that dies."""
    import filelock

    lock = filelock.FileLock(cache / "build.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        _say("another process is compiling; waiting for it ...")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _say(text: str) -> None:
    print(f"fastdit: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _objects(cache: Path, info: Info) -> Iterator[Path]:
    """Where to compile: kept for a checkout, whose next build then compiles what changed."""
    for left in cache.glob("partial-*"):  # by builds that were killed: the lock is ours
        shutil.rmtree(left, ignore_errors=True)
    csrc = _build.sources_folder()
    if (csrc.parent / "pyproject.toml").is_file():
        tools = (str(csrc), info.compiler, info.flags, info.nvcc, info.archs)
        yield cache / "objects" / hashlib.sha256(repr(tools).encode()).hexdigest()[:12]
        return
    with tempfile.TemporaryDirectory(prefix="partial-", dir=cache) as folder:
        yield Path(folder)


def build(
    cuda: bool | None = None, *, force: bool = False, jobs: int | None = None, verbose: bool = False
) -> tuple[Path, float | None]:
    """Build the library into the cache.

    Args:
        cuda: with CUDA kernels or without; None is with them if nvcc is found.
        force: build even if the cache has this very library.
        jobs: compilers at once; None is MAX_JOBS, else one for each processor.
        verbose: show every command.

    Returns:
        The library's path and the seconds it took, None if it was there.

    Raises:
        BuildError: something is missing, or a compiler failed.
    """
    tools = _build.find_toolchain(Path(torch.__file__).parent, cuda)
    info = _build.describe(tools)
    cache = _writable_cache()
    target = cache / generation() / f"libfastdit-{info.key}.so"
    with _lock(cache), _objects(cache, info) as objects:
        if target.is_file() and not force:
            return target, None
        if force:
            shutil.rmtree(objects, ignore_errors=True)
        what = tools.cxx + (f" and {tools.nvcc} for {' '.join(tools.archs)}" if tools.nvcc else "")
        _say(f"compiling with {what} ...")
        try:
            seconds = _build.compile_library(
                tools, objects, target, jobs=jobs, verbose=verbose, progress=_say
            )
        except OSError as error:
            raise BuildError(f"could not write the library: {error}") from None
    _say(f"compiled in {seconds:.1f} s: {target}")
    return target, seconds


def load() -> None:
    """Load the library, once; build it if there is none and FASTDIT_BUILD does not forbid it.

    Raises:
        NativeError: it cannot be had. The first reason is kept: no second try in this process.
    """
    if _State.error is not None:
        raise _State.error
    if _State.loaded is None:
        try:
            _State.loaded = _load_first()
        except (BuildError, OSError) as error:
            _State.error = NativeError(str(error))
            raise _State.error from None


def _load_first() -> tuple[Path, Info]:
    for path in candidates():
        torch.ops.load_library(str(path))
        return path, _build.read_info(path)
    if build_mode() == "0":
        raise BuildError("the compiled library is not there, and FASTDIT_BUILD=0 forbids a build")
    path, _ = build(cuda=None if torch.version.cuda else False)
    torch.ops.load_library(str(path))
    return path, _build.read_info(path)


def register_all() -> None:
    """Register the library's kernels; called by `fastdit.backends` at the first call on a device.

    Raises:
        NativeError: FASTDIT_BUILD=1 and the library cannot be had.
    """
    if _State.registered:
        return
    _State.registered = True
    try:
        load()
    except NativeError as error:
        if build_mode() == "1":
            raise
        _logger.warning(
            "fastdit: no compiled kernels, the reference runs instead: %s. "
            "`fastdit build` compiles them, `fastdit doctor` tells more.",
            str(error).splitlines()[0],
        )
        return
    for name in native_kernels.MODULES:
        for kernel in importlib.import_module(f"fastdit.native_kernels.{name}").KERNELS:
            backends.register(kernel)
