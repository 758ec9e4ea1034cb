"""Opt-in autotuning: time a launcher's candidates once on this GPU, remember the fastest on disk.

Every launcher has a small table of heuristics, and that is what runs by default. With
`FASTDIT_AUTOTUNE=1`, or after `enable()`, the first call of each shape class times the candidates
of the launcher's table on the device and keeps the fastest for (op, shape class and dtype, device,
Triton version), in a JSON file under the user's cache directory that later processes read.

A launcher opts in with one line:

    tile = tuning.choose("bias_gelu", key, FORWARD[size], CANDIDATES[size], run)

where `run(tile)` launches with that tile. Gradients that sum over tokens are deterministic for a
given tile; another tile may change their last bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton

from fastdit.checkpoint_files import atomic_write

Config = TypeVar("Config")
"""A frozen dataclass of numbers: a row of a launcher's table."""

_lock = threading.RLock()
_state: dict[str, Any] = {"enabled": os.environ.get("FASTDIT_AUTOTUNE") == "1"}
_chosen: dict[tuple[str, ...], dict[str, Any]] = {}
_read: set[Path] = set()


def enable() -> None:
    """Time candidates from now on, in this process.

    Raises:
        RuntimeError: there is no GPU to time on.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("autotune: there is no GPU to time on; the tables of heuristics stand")
    _state["enabled"] = True


def disable() -> None:
    """Use the tables of heuristics from now on, also where a choice is stored."""
    _state["enabled"] = False


def enabled() -> bool:
    """Whether candidates are timed and stored choices used."""
    return bool(_state["enabled"])


def cache_directory() -> Path:
    """`$XDG_CACHE_HOME/fastdit`, by default `~/.cache/fastdit`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastdit"


def shape_class(size: int) -> int:
    """The next power of two: sizes of one class share a choice."""
    return triton.next_power_of_2(size)


def choose(
    op: str,
    key: Sequence[Any],
    default: Config,
    candidates: Sequence[Config],
    run: Callable[[Config], Any],
) -> Config:
    """The configuration for a launch: `default`, or the fastest known with autotuning on.

    Args:
        op: the launcher's name.
        key: what the choice depends on: shape classes, dtypes, options.
        default: the row of the table of heuristics.
        candidates: the rows to time, `default` among them or not.
        run: launches with one row. It is called many times, and must be able to be.

    Without a GPU, and while a CUDA graph is captured, nothing is timed. A candidate that fails,
    for want of shared memory say, is passed over.
    """
    if not _state["enabled"]:
        return default
    if not torch.cuda.is_available():
        _warn("there is no GPU to time on; the tables of heuristics stand")
        return default
    rows = [default, *(row for row in candidates if row != default)]
    by_fields = {json.dumps(dataclasses.asdict(row), sort_keys=True): row for row in rows}
    device = torch.cuda.get_device_name()
    path = cache_directory() / f"autotune-{_slug(device)}-triton-{triton.__version__}.json"
    place = (str(path), op, json.dumps([str(part) for part in key]))
    with _lock:
        if path not in _read:
            _read.add(path)
            _remember(path, _load(path))
        stored = by_fields.get(json.dumps(_chosen.get(place, {}).get("config"), sort_keys=True))
        if stored is not None or torch.cuda.is_current_stream_capturing():
            return default if stored is None else stored
        times = {row: _time(run, row) for row in rows}
        best = min(rows, key=times.__getitem__)
        if times[best] == float("inf"):
            return default  # let its own error be raised
        _chosen[place] = {"config": dataclasses.asdict(best), "microseconds": times[best]}
        _store(path)
        return best


def _time(run: Callable[[Config], Any], row: Config) -> float:
    """Median µs of a launch; infinite if it cannot run."""
    try:
        return benchmark(lambda: run(row))
    except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError):
        return float("inf")


def benchmark(function: Callable[[], Any]) -> float:
    """Median µs on the device: CUDA events, the L2 cache flushed before each run."""
    from triton.testing import do_bench

    return 1e3 * do_bench(function, return_mode="median")


def _slug(name: str) -> str:
    return re.sub(r"\W+", "-", name.lower()).strip("-")


def _warn(message: str) -> None:
    """Once for each message, as Python's default filter shows it."""
    warnings.warn(f"autotune: {message}", RuntimeWarning, stacklevel=3)


def _load(path: Path) -> dict[str, dict[str, Any]]:
    """The stored choices of all ops; none if the file is not there or not whole."""
    try:
        found = json.loads(path.read_text())
        return {op: {key: dict(row) for key, row in rows.items()} for op, rows in found.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        _warn(f"cannot read {path} ({error}); its choices are timed again")
        return {}


def _remember(path: Path, found: dict[str, dict[str, Any]]) -> None:
    for op, rows in found.items():
        for key, row in rows.items():
            _chosen.setdefault((str(path), op, key), row)


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Inside, no other process writes `path`."""
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _store(path: Path) -> None:
    """Add this process's choices to the file: whole or not at all, and nobody else's lost."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _exclusive(path):
            found = _load(path)
            for (where, op, key), row in _chosen.items():
                if where == str(path):
                    found.setdefault(op, {})[key] = row
            text = json.dumps(found, indent=1, sort_keys=True)
            atomic_write(path, lambda temporary: temporary.write_text(text))
    except OSError as error:
        _warn(f"cannot write {path} ({error}); the choices last as long as this process")
