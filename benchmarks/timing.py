"""How the benchmarks compare: candidates take turns, ratios are medians of turns side by side.

Absolute times drift on a shared machine, ratios of neighbouring turns hardly do. With one thread a
turn is measured in the process's own CPU time, which other processes disturb little; with more, in
wall time, which means something only on an idle machine. Gradients are timed as a call of
`torch.autograd.grad` on a kept graph.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Function = Callable[[], object]
ROUNDS, TURN = 21, 0.01
TABLE: list[str] = []
"""The lines that `conftest.py` prints at the end."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one candidate, a turn each, and the first candidate's over them, turn by turn."""

    seconds: Sequence[float]
    ratios: Sequence[float]

    def __str__(self) -> str:
        low, mid, high = (
            1e6 * f(self.seconds) for f in (min, statistics.median, max)
        )  # microseconds
        ratio = statistics.median(self.ratios)
        return (
            f"{mid:9.1f} µs [{low:.1f}..{high:.1f}]  "
            f"{ratio:6.2f}x [{min(self.ratios):.2f}..{max(self.ratios):.2f}]"
        )


def clock() -> Callable[[], float]:
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def turn(function: Function, calls: int) -> float:
    """Seconds a call."""
    now = clock()
    start = now()
    for _ in range(calls):
        function()
    return (now() - start) / calls


def measure(candidates: dict[str, Function], rounds: int = ROUNDS) -> dict[str, Timing]:
    """Every candidate in turns of some `TURN` seconds; ratios are against the first."""
    calls = {}
    for name, function in candidates.items():
        turn(function, 2)
        calls[name] = max(1, int(TURN / max(turn(function, 3), 1e-7)))
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for index in range(rounds):
        for name in list(candidates)[:: 1 if index % 2 else -1]:
            seconds[name].append(turn(candidates[name], calls[name]))
    first = next(iter(seconds.values()))
    return {
        name: Timing(mine, [a / b for a, b in zip(first, mine, strict=True)])
        for name, mine in seconds.items()
    }


def compare(benchmark, title: str, candidates: dict[str, Function]) -> None:
    """Time the candidates in turns, put the figures into the table and pytest-benchmark's report.

    The candidate `fastdit` is also what pytest-benchmark times by itself; `copy` is a copy of as
    many bytes as the op must move, whose share of fastdit's time is told.
    """
    found = measure(candidates)
    TABLE.append(f"{title}, {torch.get_num_threads()} thread(s)")
    for name, timing in found.items():
        benchmark.extra_info[name] = str(timing)
        TABLE.append(f"  {name:16} {timing}")
    if "copy" in found:
        share = statistics.median(
            c / f for c, f in zip(found["copy"].seconds, found["fastdit"].seconds, strict=True)
        )
        benchmark.extra_info["bandwidth of a copy"] = f"{100 * share:.0f} %"
        TABLE.append(f"  {100 * share:.0f} % of the bandwidth of a copy")
    benchmark.pedantic(candidates["fastdit"], rounds=5, iterations=10, warmup_rounds=1)


def copy_of(*moved: Tensor) -> Function:
    """A copy that reads half of the bytes of these tensors and writes as many."""
    half = sum(t.numel() * t.element_size() for t in moved) // 2
    source, target = (torch.ones(half, dtype=torch.uint8) for _ in range(2))
    return lambda: target.copy_(source)


def forward(benchmark, compiled, title, ours, eager, args, moved, tolerance=1e-5) -> None:
    """Compare `ours(*args)` with `eager(*args)` and its compiled form, without gradients.

    `moved` are the tensors that the op has to read or write; the two must agree first.
    """
    with torch.no_grad():
        candidates: dict[str, Function] = {"eager": lambda: eager(*args)}
        for name, function in compiled(eager).items():
            candidates[name] = lambda f=function: f(*args)
        candidates |= {"fastdit": lambda: ours(*args), "copy": copy_of(*moved)}
        for name in candidates.keys() - {"eager", "copy"}:
            close(candidates[name](), candidates["eager"](), tolerance)
        compare(benchmark, title, candidates)


def backward(benchmark, title, ours, eager, args, moved, tolerance=1e-4) -> None:
    """Compare the gradients of all tensors among `args` that require one."""
    inputs = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    graphs = {"eager": eager(*args), "fastdit": ours(*args)}
    results = {name: [r] if isinstance(r, Tensor) else list(r) for name, r in graphs.items()}
    cotangents = [torch.randn_like(result) for result in results["eager"]]
    candidates: dict[str, Function] = {
        name: lambda r=result: torch.autograd.grad(r, inputs, cotangents, retain_graph=True)
        for name, result in results.items()
    }
    close(candidates["fastdit"](), candidates["eager"](), tolerance)
    compare(benchmark, f"{title}, backward", candidates | {"copy": copy_of(*moved)})


def close(got: object, want: object, tolerance: float) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
