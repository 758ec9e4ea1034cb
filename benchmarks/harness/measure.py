"""From a case to a result: check, take turns, add the facts.

A column whose result differs from eager's by more than the case allows is *broken*: named, with its
error, and not timed, whoever wrote it. (torch.compile 2.10 to 2.13 was silently wrong on chained
modulated normalisations of 16,384 tokens and more.) A peer that raises has *failed*. fastdit itself
raising, or being wrong, is an error of the run.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from timing import interleaved, ratios
from torch import Tensor

from harness import facts
from harness.problem import COMPILE, COPY, EAGER, OURS, Absent, Case, Problem, tensors

MEASURED, ABSENT, BROKEN, FAILED = "measured", "absent", "broken", "failed"
Row = dict[str, Any]
Result = dict[str, Any]


class WrongResult(ValueError):
    """fastdit's own column differs from eager PyTorch."""


def error(got: list[Tensor], want: list[Tensor]) -> float:
    """Largest difference over the largest value of the tensor that it is in; NaN counts as inf."""
    if [t.shape for t in got] != [t.shape for t in want]:
        return math.inf
    worst = 0.0
    for ours, exact in zip(got, want, strict=True):
        if exact.numel() == 0:
            continue
        exact = exact.double()
        difference = (ours.to(exact.device).double() - exact).abs().max()
        relative = float(difference / exact.abs().max().clamp(min=1e-30))
        worst = max(worst, relative if math.isfinite(relative) else math.inf)
    return worst


def checked(problem: Problem) -> dict[str, Row]:
    """The status of every column, and its error against the first, which is eager's.

    Raises:
        WrongResult: fastdit's column differs.
    """
    rows: dict[str, Row] = {}
    want: list[Tensor] = []
    for name, column in problem.columns.items():
        if isinstance(column, Absent):
            rows[name] = {"status": ABSENT, "reason": column.reason}
            continue
        ours = name == EAGER or name.startswith(OURS)
        try:
            got = [t.detach().clone() for t in tensors(column())]
        except Exception as raised:
            if ours:
                raise
            first = (str(raised).strip() or "no message").splitlines()[0]
            rows[name] = {"status": FAILED, "reason": f"{type(raised).__name__}: {first}"[:200]}
            continue
        rows[name] = {"status": MEASURED}
        if name == EAGER:
            want = got
        elif name not in problem.unchecked:
            allowed = problem.tolerances.get(name, problem.tolerance)
            found = error(got, want)
            rows[name]["error"] = found if math.isfinite(found) else None
            if not found <= allowed:
                said = f"differs from eager by {found:.1e} of its largest, allowed is {allowed:.0e}"
                if not math.isfinite(found):
                    said = "differs from eager in shape or in number, or is not finite"
                if ours:
                    raise WrongResult(f"{name}: {said}")
                rows[name] |= {"status": BROKEN, "reason": said}
    return rows


def summary(times: list[float]) -> dict[str, float]:
    return {"median": statistics.median(times), "least": min(times), "most": max(times)}


def _facts(case: Case, name: str, function: Callable[[], object], problem: Problem) -> Row:
    """Memory, launches and kept bytes, for the columns of which they can be known."""
    found: Row = {}
    if name in (COPY, "ONNX Runtime", "OpenVINO"):
        return found
    found["peak_bytes"] = facts.peak_bytes(function, case.device)
    if case.device == "cuda":
        found["launches"] = facts.device_launches(function)
    elif COMPILE not in name:
        found |= facts.counted(function)
    if name in problem.differentiate:
        found["saved_bytes"] = facts.saved_bytes(problem.differentiate[name], problem.given)
    return found


def _rates(problem: Problem, dtype: str, seconds: float, ceilings: dict[str, float]) -> Row:
    """Bandwidth and flop rate, also as shares of the machine's, and images per second."""
    found: Row = {}
    if problem.bytes:
        found["bytes_per_second"] = problem.bytes / seconds
        if "copy" in ceilings:
            found["share_of_copy"] = problem.bytes / seconds / ceilings["copy"]
    if problem.flops:
        found["flops_per_second"] = problem.flops / seconds
        if f"gemm_{dtype}" in ceilings:
            found["share_of_gemm"] = problem.flops / seconds / ceilings[f"gemm_{dtype}"]
    if problem.images:
        found["images_per_second"] = problem.images / seconds
    return found


def measure(
    case: Case,
    ceilings: dict[str, float] | None = None,
    meter: facts.Meter | None = None,
    rounds: int = 31,
    patience: float = 20.0,
) -> Result:
    """One case's result.

    Args:
        case: what to measure.
        ceilings: of `machine.ceilings`, for the shares of them.
        meter: for joules per image on GPUs.
        rounds: turns of each column at most; the case's seconds bound them too.
        patience: seconds to wait for an idle machine.

    Raises:
        WrongResult: fastdit's column is wrong.
    """
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # each case is compiled for itself
    torch.manual_seed(0)
    problem = case.build()
    rows = checked(problem)
    timed = {k: f for k, f in problem.present().items() if rows[k]["status"] == MEASURED}
    taken = interleaved(
        timed,
        rounds,
        device=case.device,
        wall=problem.wall,
        budget=case.seconds,
        patience=patience,
    )
    for name, function in timed.items():
        times, row = taken.seconds[name], rows[name]
        middle, low, high = ratios(taken.seconds[EAGER], times)
        row["seconds"] = summary(times)
        row["turns"] = times
        row["speedup"] = {"median": middle, "least": low, "most": high}
        row |= _rates(problem, case.dtype, row["seconds"]["median"], ceilings or {})
        row |= _facts(case, name, function, problem)
        if meter is not None and problem.images and case.device == "cuda":
            joules = meter.joules(function)
            row["joules_per_image"] = None if joules is None else joules / problem.images
    described = ("level", "name", "size", "what", "dtype", "device", "tokens", "batch", "width")
    return {key: getattr(case, key) for key in described} | {
        "id": case.id,
        "bytes": problem.bytes,
        "flops": problem.flops,
        "images": problem.images,
        "disturbed": taken.disturbed,
        "columns": rows,
    }
