"""The tables of docs/kernels_cpu.md: every CPU kernel, one thread and two, forward and backward.

    python benchmarks/cpu_tables.py              # print them; about a minute on an idle machine
    python benchmarks/cpu_tables.py --write      # and put them into the page
    python benchmarks/cpu_tables.py --only gelu  # the lines whose case holds this

One thread is timed in the process's CPU time, two in wall time, which other processes ruin: the
last line says how many turns of the two-thread columns ran beside some. A ratio is the median of
the turns' ratios; the share of a copy is the copy's time over the kernel's.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import re
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from harness.measure import MEASURED, measure
from harness.op_benchmark import TINY, XL
from harness.problem import COMPILE, COPY, EAGER, OURS, Case, Problem

from fastdit import ops
from fastdit.checkpoint_files import atomic_write

PAGE = Path(__file__).resolve().parents[1] / "docs" / "kernels_cpu.md"
MARK = re.compile(r"(<!-- table: speed -->\n).*?(<!-- end -->)", re.S)
OPS = ("adaln", "gated_adaln", "gated_residual", "bias_gelu", "glu", "patch_embed", "unpatchify")
SIZES = {XL.name: "B2 N256 D1152", TINY.name: "2×16×192", "1x4x32x32": "1×4×32×32"}
PASSES = ("forward", "backward")
SEEDED, RANDN = "fastdit, seed", "randn alone"
GIVEN = "fastdit, out="
RESULTS = {
    "adaln": lambda x, *_rest: torch.empty_like(x),
    "gated_residual": lambda x, *_rest: x,
    "gated_adaln": lambda x, *_rest: (x, torch.empty_like(x)),
    "bias_gelu": lambda x, *_rest: torch.empty_like(x),
    "glu": lambda x, *_rest: torch.empty_like(x[..., x.shape[-1] // 2 :]),
}
"""Where the ops write in the column `GIVEN`: the stream is replaced, as in inference."""


def cases() -> list[Case]:
    """Large ones first, float32."""
    found = [
        with_given(case, importlib.import_module(f"bench_{op}"))
        for op in OPS
        for case in importlib.import_module(f"bench_{op}").cases("cpu")
    ]
    steps = importlib.import_module("bench_diffusion_step").cases("cpu")
    found = [c for c in found if c.dtype == "fp32" and c.size in SIZES and c.what in PASSES]
    found.sort(key=lambda case: (case.size != XL.name, PASSES.index(case.what)))
    return found + [case for case in steps if case.size in SIZES]


def with_given(case: Case, benchmark: ModuleType) -> Case:
    """The case with a column for results written into given tensors, where the op does so."""
    sizes = {size.name: size for size in (XL, TINY)}
    if case.what != "forward" or case.name not in RESULTS or case.size not in sizes:
        return case

    def build() -> Problem:
        problem = case.build()
        args = benchmark.inputs(sizes[case.size], torch.float32, "cpu")
        out, op = RESULTS[case.name](*args), getattr(ops, case.name)
        problem.columns[GIVEN] = lambda: op(*args, out=out)
        problem.unchecked = (*problem.unchecked, GIVEN)
        return problem

    return dataclasses.replace(case, build=build)


def cell(rows: dict[str, Any], column: str) -> str:
    """Median µs and spread, and the speed over eager."""
    row = rows.get(column, {})
    if row.get("status") != MEASURED:
        return ""
    middle, least, most = (1e6 * row["seconds"][key] for key in ("median", "least", "most"))
    digits = 1 if middle < 100 else 0
    text = f"{middle:.{digits}f} [{least:.{digits}f}..{most:.{digits}f}]"
    return text if column in (EAGER, RANDN) else f"{text}, {row['speedup']['median']:.1f}x"


def share(rows: dict[str, Any]) -> str:
    """The copy's time, and what it is of the kernel's."""
    copy, ours = (rows[column]["seconds"]["median"] for column in (COPY, OURS))
    return f"{1e6 * copy:.1f}, {copy / ours:.0%}"


def lines(results: list[dict[str, Any]]) -> list[str]:
    """The tables, one for each size."""
    written = []
    for size, name in SIZES.items():
        chosen = [result for result in results if result["size"] == size]
        if not chosen:
            continue
        step = size not in (XL.name, TINY.name)
        columns = [EAGER, COMPILE, OURS] + ([SEEDED, RANDN] if step else [GIVEN])
        heads = [*columns, *([] if step else ["copy, share"])]
        written += [f"| {name} | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
        for result in chosen:
            what = result["what"] if step else f"{result['name']}, {result['what']}"
            cells = [cell(result["columns"], column) for column in columns]
            cells += [] if step else [share(result["columns"])]
            written.append(f"| {what} | {' | '.join(cells)} |")
        written.append("")
    return written


def table(threads: int, chosen: list[Case], patience: float) -> tuple[list[str], int]:
    """All cases with some threads, and the turns that others disturbed."""
    torch.set_num_threads(threads)
    results = [measure(case, rounds=21, patience=patience) for case in chosen]
    title = "One thread, CPU time" if threads == 1 else f"{threads} threads, wall time"
    return [f"**{title}**", "", *lines(results)], sum(result["disturbed"] for result in results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"put the tables into {PAGE.name}")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--patience", type=float, default=2, help="seconds a case waits for others")
    options = parser.parse_args()
    begun = time.perf_counter()
    chosen = [case for case in cases() if options.only in case.id]
    text, disturbed = [], 0
    for threads in (1, 2):
        found, others = table(threads, chosen, options.patience)
        text, disturbed = text + found, disturbed + others
    capability = torch.backends.cpu.get_cpu_capability()
    head = (
        f"torch {torch.__version__}, {capability}, float32, µs: median [min..max], speed over eager"
    )
    text = [f"{head}.", "", *text]
    print("\n".join(text))
    print(f"{disturbed} turns beside other processes; {time.perf_counter() - begun:.0f} s")
    if options.write:
        body = "\n".join(text)
        written = MARK.sub(lambda found: f"{found[1]}{body}{found[2]}", PAGE.read_text())
        atomic_write(PAGE, lambda partial: partial.write_text(written))


if __name__ == "__main__":
    main()
