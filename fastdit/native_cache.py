"""Where built libraries are kept, and the lock that lets one process build at a time.

    <cache>/build.lock
    <cache>/<version>-<hash of csrc/>-torch<ABI>-<platform>/libfastdit-<compilers, flags>.so
    <cache>/objects/...      of checkouts: the next build compiles what changed
    <cache>/partial-*/       a build in hand; what a killed one left goes with the next build

A library appears under its name in one step and whole. It is never looked for under another
version, other sources, an older torch ABI or another platform than its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from fastdit import _build
from fastdit._build import BuildError, Info

KEPT = 20
"""Generations kept in a cache: each change of csrc/ in a checkout makes a new one."""


def folders() -> list[Path]:
    """The cache, and the folder in its stead where it cannot be written.

    The first is FASTDIT_CACHE, else `fastdit` in XDG_CACHE_HOME or ~/.cache; the second is in the
    system's temporary folder.
    """
    found = []
    if chosen := os.environ.get("FASTDIT_CACHE"):
        found.append(Path(chosen).absolute())
    else:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        if os.path.isabs(home):  # a container's user may have no home
            found.append(Path(home) / "fastdit")
    if hasattr(os, "getuid"):
        with contextlib.suppress(FileNotFoundError):  # no temporary folder is writable
            found.append(Path(tempfile.gettempdir()) / f"fastdit-{os.getuid()}")
    return found


def _trusted(folder: Path) -> bool:
    """Whether a library in `folder` can only be ours: anyone may make folders in /tmp."""
    if folder.parent != Path(tempfile.gettempdir()):
        return True
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022


def writable() -> Path:
    """The first of `folders()` that can be written.

    Raises:
        BuildError: there is none; the message says why of each.
    """
    reasons = []
    for folder in folders():
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            reasons.append(f"{folder}: {error.strerror}")
            continue
        if _trusted(folder):
            return folder
        reasons.append(f"{folder}: it is not this user's alone")
    raise BuildError(f"no folder to build in; set FASTDIT_CACHE to one ({'; '.join(reasons)})")


def generation(info: Info | None = None) -> str:
    """The name of the folder of the libraries that fit these sources on this machine."""
    version = info.version if info else _build.package_version()
    source = info.source if info else _build.source_hash(_build.sources_folder())
    return f"{version}-{source}-torch{_build.TORCH_ABI}-{_build.machine()}"


def libraries() -> list[Path]:
    """The cached libraries that fit, the one built last first."""
    name = generation()
    found = []
    for cache in filter(_trusted, folders()):
        with contextlib.suppress(OSError):
            found += [(path.stat().st_mtime, path) for path in (cache / name).glob("*.so")]
    return [path for _, path in sorted(found, reverse=True)]


@contextlib.contextmanager
def lock(cache: Path, waiting: Callable[[], None]) -> Iterator[int]:
    """Hold the cache's lock; `waiting` is called once if another process holds it.

    Yields its file descriptor, for the compilers to inherit: the lock of a process that was killed
    is free as soon as the last compiler it started is gone too.

    Raises:
        BuildError: the file system has no locks.
    """
    import fcntl

    descriptor = os.open(cache / "build.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            why = f"{cache} cannot be locked ({error.strerror})"
            raise BuildError(f"{why}; set FASTDIT_CACHE to a local folder") from None
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def objects(cache: Path, info: Info) -> Iterator[Path]:
    """The folder to compile in, while holding the lock: kept for a checkout, else removed after."""
    for left in (*cache.glob("partial-*"), *cache.glob("*/*.so.*")):
        shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
    csrc = _build.sources_folder()
    if (csrc.parent / "pyproject.toml").is_file():
        same = repr((str(csrc), dataclasses.replace(info, version="", source="")))
        yield cache / "objects" / hashlib.sha256(same.encode()).hexdigest()[:12]
        _prune(cache / "objects")
        return
    with tempfile.TemporaryDirectory(prefix="partial-", dir=cache) as folder:
        yield Path(folder)


def prune(cache: Path) -> None:
    """Remove all but the `KEPT` newest generations; a library in use stays loaded."""
    _prune(cache, "*-torch*")


def _prune(folder: Path, pattern: str = "*") -> None:
    with contextlib.suppress(OSError):
        paths = sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in paths[KEPT:]:
            shutil.rmtree(path, ignore_errors=True)
