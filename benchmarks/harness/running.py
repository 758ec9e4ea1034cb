"""The two other ways to run a benchmark file: under pytest-benchmark, and as a script.

pytest-benchmark times one function after another. Here the columns of a case take turns first, and
each column's test then hands its turns to pytest-benchmark through a timer of its own: tables,
JSON, `--benchmark-compare` and the rest show interleaved times, and everything else that is known
of a column is in `extra_info`.
"""

from __future__ import annotations

import argparse
import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rich.console import Console

from harness import facts, machine
from harness.measure import MEASURED, measure
from harness.problem import COPY, EAGER, FIELD, OURS, Case, chosen
from harness.results import in_units, ratio

Cases = Callable[[str], list[Case]]


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


class Replay:
    """A clock that moves by the next recorded turn whenever `play` is called."""

    def __init__(self) -> None:
        self.now, self.turns = 0.0, iter(())

    def __call__(self) -> float:
        return self.now

    def play(self) -> None:
        self.now += next(self.turns)


CLOCK = Replay()


@functools.cache
def ceilings(kind: str) -> dict[str, float]:
    return machine.ceilings(kind, ["fp32"] if kind == "cpu" else ["bf16"], patience=5)


_results: dict[int, Any] = {}


def result(case: Case) -> Any:
    """The case's result, measured once for all of its columns."""
    if id(case) not in _results:
        _results[id(case)] = measure(case, ceilings(case.device), facts.Meter(), patience=5)
    return _results[id(case)]


def tests(cases: Cases, *further: str) -> Callable[..., None]:
    """A test for each standard case and column of a file.

    A column that is absent, or a peer that is broken or failed, is skipped with the reason; if
    fastdit's is wrong, the tests of the case fail.
    """
    kind = device()
    columns = [*FIELD, *further, OURS, COPY]

    @pytest.mark.benchmark(timer=CLOCK)
    @pytest.mark.parametrize("column", columns)
    @pytest.mark.parametrize("case", chosen(cases(kind), "standard"), ids=lambda case: case.id)
    def test(benchmark, case, column):
        rows = result(case)["columns"]
        if column not in rows:
            pytest.skip("not a column of this case")
        row = dict(rows[column])
        if row["status"] != MEASURED:
            pytest.skip(f"{column}: {row['status']}: {row['reason']}")
        turns = row.pop("turns")
        benchmark.group = case.id
        benchmark.extra_info.update(row, column=column, machine=machine.describe(case.device))
        CLOCK.turns = iter(turns)
        benchmark.pedantic(CLOCK.play, rounds=len(turns), iterations=1)

    return test


def main(cases: Cases) -> None:
    """The command line of a benchmark file: its docstring's first line and its options."""
    caller = inspect.stack()[1].frame.f_globals["__doc__"]
    parser = argparse.ArgumentParser(description=caller.partition("\n")[0])
    add = parser.add_argument
    add("--threads", type=int, help="of the CPU (default: PyTorch's; 1 is timed in CPU time)")
    add("--rounds", type=int, default=31, help="turns of each column at most (default 31)")
    add("--subset", default="standard", help="quick, standard or full (default standard)")
    add("--only", default="", help="cases whose name holds this")
    add("--patience", type=float, default=20, help="seconds to wait for an idle machine")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    console = Console(width=max(110, Console().width))
    for case in chosen(cases(device()), options.subset):
        if options.only in case.id:
            print_result(measure(case, None, None, options.rounds, options.patience), console)


def print_result(found: dict[str, Any], console: Console) -> None:
    """One case, a line for each column."""
    waits = f" ({found['disturbed']} turns beside other processes)" * bool(found["disturbed"])
    console.print(f"[bold]{found['id']}[/bold]{waits}", highlight=False)
    for name, row in found["columns"].items():
        if row["status"] != MEASURED:
            console.print(f"  {name:22} {row['status']}: {row['reason']}", highlight=False)
            continue
        s = row["seconds"]
        spread = f"[{in_units(s['least'])} to {in_units(s['most'])}]".replace("[", r"\[")
        against = "" if name == EAGER else ratio(row)
        console.print(
            f"  {name:22} {in_units(s['median']):>9}  {spread:28} {against}", highlight=False
        )
