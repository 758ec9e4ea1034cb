"""All the benchmarks, found and run: what `fastdit bench` calls.

A case whose build or measurement raises is recorded with its error and the run goes on; the run as
a whole has then failed.
"""

from __future__ import annotations

import datetime
import importlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from harness import facts, machine, modelled, results
from harness.measure import measure
from harness.problem import LEVELS, SUBSETS, Case, chosen

__all__ = ["LEVELS", "SUBSETS", "all_cases", "run", "select"]
FOLDER = Path(__file__).resolve().parents[1]


def all_cases(device: str) -> list[Case]:
    """Of every `bench_*.py`, by level."""
    modules = [importlib.import_module(p.stem) for p in sorted(FOLDER.glob("bench_*.py"))]
    found = [case for m in modules if hasattr(m, "cases") for case in m.cases(device)]
    return sorted(found, key=lambda case: LEVELS.index(case.level))


def select(
    device: str, subset: str, levels: Sequence[str] = (), only: Sequence[str] = ()
) -> list[Case]:
    """The cases of a subset, of these levels (all, if none), whose id holds one of `only`.

    Raises:
        ValueError: no case is left, or a level or subset is unknown.
    """
    for level in levels:
        if level not in LEVELS:
            raise ValueError(f"--level: got {level!r}, allowed are {', '.join(LEVELS)}")
    found = [
        case
        for case in chosen(all_cases(device), subset)
        if (not levels or case.level in levels) and (not only or any(o in case.id for o in only))
    ]
    if not found:
        raise ValueError("no case fits; `fastdit bench --list` shows them all")
    return found


def run(
    cases: Sequence[Case],
    device: str,
    *,
    rounds: int = 31,
    patience: float = 20.0,
    each: Callable[[Case], Any] = lambda case: None,
    done: Callable[[results.Run], Any] = lambda run: None,
    with_model: bool = True,
    deadline: float | None = None,
    further: dict[str, Any] | None = None,
) -> results.Run:
    """Measure the cases.

    Args:
        cases: in order.
        device: "cpu" or "cuda".
        rounds: turns of a column at most.
        patience: seconds that each case may wait for an idle machine.
        each: called before each case.
        done: called after each case with the run so far, to save it.
        with_model: add the modelled GPU table.
        further: what else the run records.
        deadline: seconds after which no further case is begun; those left are named.
    """
    begun = time.perf_counter()
    dtypes = list(dict.fromkeys(case.dtype for case in cases))
    ceilings = machine.ceilings(device, dtypes, patience)
    meter = facts.Meter()
    found: results.Run = {
        "kind": results.KIND,
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine.describe(device),
        "ceilings": ceilings,
        "energy": meter.reason or "NVML",
        "results": [],
        "failed": {},
        "left_out": [],
        "modelled": modelled.table() if with_model else [],
        "seconds": 0.0,
    } | (further or {})
    for case in cases:
        if deadline is not None and time.perf_counter() - begun > deadline:
            found["left_out"].append(case.id)
            continue
        each(case)
        try:
            found["results"].append(measure(case, ceilings, meter, rounds, patience))
        except Exception as error:
            found["failed"][case.id] = f"{type(error).__name__}: {error}"
        found["seconds"] = time.perf_counter() - begun
        done(found)
    return found
