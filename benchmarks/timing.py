"""How the benchmarks measure: candidates take turns, a figure is the median of its turns.

All candidates of a case take turns, so that a slow moment of the machine falls on each, and a ratio
is the median of the turns' ratios.

On a CPU with one thread a turn is timed in the process's own CPU time, which other processes
disturb little. With more it is timed in wall time, which other processes ruin (a busy one slows
OpenMP's barriers by a factor of ten): a turn during which others ran is repeated until the machine
is idle or `patience` is spent, and is then counted as disturbed.

Before the first turn one large tensor is freed. After that glibc's allocator keeps what is freed,
as it does in any process that has run a model; until then it returns blocks of some MB to the
system by turns, and page faults make one function take one or three times as long, by chance.

On a GPU a turn is the median of many calls between CUDA events. They are enqueued behind a kernel
that waits, so that the device never idles for the host, and before each the L2 cache is filled with
something else. Where the host's time belongs to the figure, `wall` times synchronised batches.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

Candidates = dict[str, Callable[[], object]]
MOST_CALLS = 2000
"""In one turn: enough for any clock, few enough for a GPU's queue."""
SETTLE = 0.05
"""Seconds before a turn in wall time: ONNX Runtime's threads spin on after its turn, and made the
column behind it up to 1.6 times slower."""
LARGEST_KEPT = 31 << 20
"""Bytes: freed once, glibc keeps as large a block; from 32 MiB on it never does."""
BACKLOG_CYCLES = 2_000_000  # 1 ms at 2 GHz: the host enqueues some 100 launches meanwhile


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


@dataclass
class Patience:
    """Seconds that may yet be spent on waiting for an idle machine, and turns taken without one."""

    seconds: float
    disturbed: int = 0

    def quiet_turn(self, function: Callable[[], object], count: int) -> float:
        """A turn in wall time, the first during which others used less than a tenth of a core;
        without patience, the next."""
        if not sys.platform.startswith("linux"):
            return _turn(function, count, time.perf_counter)
        while True:
            time.sleep(SETTLE)
            wall, others = time.perf_counter(), _others()
            seconds = _turn(function, count, time.perf_counter)
            spent = time.perf_counter() - wall
            if _others() - others < 0.1 * spent + 0.01:
                return seconds
            if self.seconds <= 0:
                self.disturbed += 1
                return seconds
            time.sleep(0.2)
            self.seconds -= spent + 0.2


def _synchronised_turn(function: Callable[[], object], count: int) -> float:
    """Wall seconds of a batch of calls and of the work that they gave the GPU."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        function()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / count


def _device_turn(function: Callable[[], object], count: int, flush: torch.Tensor) -> float:
    """Median seconds of the GPU's own, each call behind a backlog and with a cold L2 cache."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    torch.cuda.synchronize()
    torch.cuda._sleep(BACKLOG_CYCLES)
    for start, end in events:
        flush.zero_()
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3


def flush_buffer() -> torch.Tensor:
    """Twice the L2 cache."""
    size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return torch.empty(2 * max(size, 1 << 24), dtype=torch.uint8, device="cuda")


@dataclass
class Timing:
    """Seconds a call, a list for each function with one entry a turn; turns during which other
    processes ran."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    disturbed: int = 0


def interleaved(
    functions: Candidates,
    rounds: int = 31,
    *,
    device: str = "cpu",
    wall: bool = False,
    budget: float | None = None,
    patience: float = 60.0,
) -> Timing:
    """Time functions in turns.

    Args:
        functions: of no arguments, by name.
        rounds: turns of each, at most.
        device: where they run, "cpu" or "cuda".
        wall: on a GPU, time the host too.
        budget: seconds for all of it; after three rounds no more are begun that would pass it.
        patience: seconds to wait for an idle machine in all, where that matters.
    """
    torch.empty(LARGEST_KEPT, dtype=torch.uint8)
    alone = device == "cpu" and torch.get_num_threads() == 1
    waiting = Patience(patience)
    turn: Callable[[Callable[[], object], int], float]
    if device == "cuda" and wall:
        turn = _synchronised_turn
    elif device == "cuda":
        flush = flush_buffer()
        turn = lambda f, count: _device_turn(f, count, flush)  # noqa: E731
    elif alone:
        turn = lambda f, count: _turn(f, count, time.process_time)  # noqa: E731
    else:
        turn = waiting.quiet_turn
    probe: Callable[[Callable[[], object], int], float] = (
        _synchronised_turn if device == "cuda" else lambda f, n: _turn(f, n, time.process_time)
    )
    length = 0.01 if alone else 0.1  # /proc/stat counts in hundredths of a second
    if budget is not None:
        length = min(length, budget / len(functions) / 12)
    begun = time.perf_counter()
    counts = {}
    for name, function in functions.items():
        function()
        once = probe(function, 1)
        once = probe(function, 10) if once < length / 10 else once
        counts[name] = min(MOST_CALLS, max(1, int(length / max(once, 1e-9))))
    found = Timing({name: [] for name in functions})
    for index in range(rounds):
        spent = time.perf_counter() - begun
        if budget is not None and index >= 3 and spent * (index + 1) / max(index, 1) > budget:
            break
        for name in list(functions)[:: 1 if index % 2 else -1]:
            found.seconds[name].append(turn(functions[name], counts[name]))
    found.disturbed = waiting.disturbed
    return found


def timed(functions: Candidates, rounds: int) -> dict[str, list[float]]:
    """Seconds a call on the CPU, a list for each function: one entry a turn."""
    found = interleaved(functions, rounds)
    if found.disturbed:
        print(f"  {found.disturbed} turns beside other processes; --threads 1 is disturbed less")
    return found.seconds


def ratios(first: list[float], times: list[float]) -> tuple[float, float, float]:
    """Speed over the first: median, least and largest of the turns' ratios."""
    found = [a / b for a, b in zip(first, times, strict=True)]
    return statistics.median(found), min(found), max(found)
