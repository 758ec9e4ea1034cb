"""How the benchmarks measure: candidates take turns, a figure is the median of its turns.

All candidates of a case take turns, so that a slow moment of the machine falls on each. With one
thread a turn is timed in the process's own CPU time, which other processes disturb little; with
more in wall time, which is worth something on an idle machine only.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

Candidates = dict[str, Callable[[], object]]


def options(description: str) -> argparse.Namespace:
    """The command line of a benchmark; sets the number of threads and says what is printed."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--compile", action="store_true", help="time torch.compile too")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    clock = "CPU time" if chosen.threads == 1 else "wall time"
    capability = torch.backends.cpu.get_cpu_capability()
    print(
        f"torch {torch.__version__}, {capability}, {chosen.threads} threads, µs of {clock}, "
        "median [min..max], speed over the first"
    )
    return chosen


def timed(candidates: Candidates, rounds: int) -> dict[str, list[float]]:
    """Seconds a call, a list for each candidate: one entry a turn of about 10 ms."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    found: dict[str, list[float]] = {name: [] for name in candidates}
    repeats = {}
    for name, function in candidates.items():
        function()
        start = clock()
        for _ in range(3):
            function()
        repeats[name] = max(1, int(0.03 / max(clock() - start, 1e-6)))
    for turn in range(rounds):
        for name in list(candidates)[:: 1 if turn % 2 else -1]:
            function, count = candidates[name], repeats[name]
            start = clock()
            for _ in range(count):
                function()
            found[name].append((clock() - start) / count)
    return found


def print_table(title: str, candidates: Candidates, rounds: int) -> None:
    """A line for each candidate; its ratio is the median of the turns' ratios to the first's."""
    print(f"\n{title}")
    found = timed(candidates, rounds)
    first = next(iter(found.values()))
    for name, times in found.items():
        ratio = statistics.median(a / b for a, b in zip(first, times, strict=True))
        middle, low, high = (1e6 * f(times) for f in (statistics.median, min, max))
        print(f"  {name:18} {middle:9.1f} [{low:.1f}..{high:.1f}]  {ratio:6.2f}x", flush=True)
