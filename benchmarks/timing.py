"""How the benchmarks measure: candidates take turns, a figure is the median of its turns.

All candidates of a case take turns, so that a slow moment of the machine falls on each. With one
thread a turn is timed in the process's own CPU time, which other processes disturb little. With
more it is timed in wall time, which other processes ruin (a busy one slows OpenMP's barriers by a
factor of ten): it waits for an idle machine.
"""

from __future__ import annotations

import argparse
import os
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


def _others() -> float:
    """Seconds of processor time that everything but this process has used."""
    ticks = os.sysconf("SC_CLK_TCK")
    with open("/proc/stat") as file:
        user, nice, system, _idle, _wait, *interrupts = map(int, file.readline().split()[1:8])
    return (user + nice + system + sum(interrupts)) / ticks - time.process_time()


def _turn(function: Callable[[], object], count: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(count):
        function()
    return (clock() - start) / count


def _quiet_turn(function: Callable[[], object], count: int) -> float:
    """The first turn in wall time during which other processes used less than a tenth of a core."""
    for _ in range(300):
        wall, others = time.perf_counter(), _others()
        seconds = _turn(function, count, time.perf_counter)
        if _others() - others < 0.1 * (time.perf_counter() - wall) + 0.01:
            return seconds
        time.sleep(0.2)
    raise SystemExit("other processes never leave the machine alone; try --threads 1")


def timed(functions: Candidates, rounds: int) -> dict[str, list[float]]:
    """Seconds a call, a list for each function: one entry a turn."""
    alone = torch.get_num_threads() == 1
    length = 0.01 if alone else 0.1  # /proc/stat counts in hundredths of a second
    counts = {}
    for name, function in functions.items():
        function()
        counts[name] = max(3, int(length / _turn(function, 10, time.process_time)))
    found: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds):
        for name in list(functions)[:: 1 if turn % 2 else -1]:
            call, count = functions[name], counts[name]
            seconds = _turn(call, count, time.process_time) if alone else _quiet_turn(call, count)
            found[name].append(seconds)
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
