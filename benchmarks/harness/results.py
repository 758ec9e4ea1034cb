"""Results: one JSON file a run, its tables, and the comparison of two.

    {"kind": "fastdit bench", "machine": {…}, "ceilings": {…}, "results": [one a case]}

A file is written whole or not at all.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from fastdit.checkpoint_files import atomic_write
from harness.measure import MEASURED, Result
from harness.problem import COPY, EAGER, OURS

RESULTS = Path(__file__).resolve().parents[1] / "results"
KIND = "fastdit bench"
Run = dict[str, Any]


def slug(machine: dict[str, Any]) -> str:
    """A file name's part for a machine: its GPU, or its processor, cores and threads."""
    name = machine.get("gpu") or f"{machine['cpu']} {machine['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def default_path(run: Run) -> Path:
    """Where a run goes if nothing else is asked for: a file for each machine."""
    return RESULTS / f"{slug(run['machine'])}.json"


def write(path: Path, run: Run) -> None:
    text = json.dumps(run, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    atomic_write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read(path: Path) -> Run:
    """A results file.

    Raises:
        ValueError: it is not one; FileNotFoundError: it is not there.
    """
    try:
        run = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not a results file: {error}") from None
    if not isinstance(run, dict) or run.get("kind") != KIND:
        raise ValueError(f"{path}: not a results file of `fastdit bench`")
    return run


def measured(result: Result, column: str) -> dict[str, Any] | None:
    """A column's row, if it was measured."""
    row = result["columns"].get(column)
    return row if row is not None and row["status"] == MEASURED else None


def best_of_ours(result: Result) -> str:
    """fastdit's column; of several, the fastest."""
    ours = [k for k in result["columns"] if k.startswith(OURS) and measured(result, k)]
    return min(ours, key=lambda k: result["columns"][k]["seconds"]["median"], default=OURS)


def in_units(seconds: float) -> str:
    """Three digits and a unit."""
    unit, scale = next(
        ((u, s) for u, s in (("s", 1), ("ms", 1e3)) if seconds * s >= 1), ("µs", 1e6)
    )
    return f"{significant(seconds * scale)} {unit}"


def significant(value: float, digits: int = 3) -> str:
    """A number with three significant digits and no exponent."""
    if value == 0:
        return "0"
    text = f"{float(f'{value:.{digits}g}'):.10f}".rstrip("0").rstrip(".")
    return text


def ratio(row: dict[str, Any]) -> str:
    r = row["speedup"]
    return f"{r['median']:.2f}× ({r['least']:.2f} to {r['most']:.2f})"


def columns_of(results: list[Result]) -> list[str]:
    """Every column that any result has, eager first, fastdit and the copy last."""
    names = dict.fromkeys(name for r in results for name in r["columns"])
    last = {COPY: 2}
    return sorted(names, key=lambda n: last.get(n, int(n.startswith(OURS))))


def amount(result: Result, row: dict[str, Any]) -> str:
    """A column's median: images per second of sampling, otherwise the time of a call."""
    if result["level"] == "sampling":
        return f"{significant(row['images_per_second'])} images/s"
    return in_units(row["seconds"]["median"])


def cell(result: Result, column: str) -> str:
    """A column's time and ratio, or why there is none; empty where the case has no such column."""
    row = result["columns"].get(column)
    if row is None:
        return ""
    if row["status"] != MEASURED:
        return row["status"]
    time = amount(result, row)
    return time if column == EAGER else f"{time}, {row['speedup']['median']:.2f}×"


def markdown(run: Run) -> str:
    """All results as tables, a table for each level, and what was absent or broken and why."""
    lines = [describe(run["machine"]), ""]
    for level in dict.fromkeys(r["level"] for r in run["results"]):
        results = [r for r in run["results"] if r["level"] == level]
        columns = columns_of(results)
        lines += [
            f"### {level}",
            "",
            "| " + " | ".join(["what", "pass", "size", *columns]) + " |",
            "|---" * (len(columns) + 3) + "|",
        ]
        for r in results:
            size = f"{r['size']}, {r['dtype']}"
            cells = [r["name"], r["what"], size, *(cell(r, c) for c in columns)]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    notes = reasons(run["results"])
    lines += [f"- {note}" for note in notes] + [""] * bool(notes)
    return "\n".join(lines)


def reasons(results: list[Result]) -> list[str]:
    """Each column that was not measured somewhere, with the reason and where."""
    where: dict[tuple[str, str, str], list[str]] = {}
    for r in results:
        for name, row in r["columns"].items():
            if row["status"] != MEASURED:
                where.setdefault((name, row["status"], row["reason"]), []).append(r["id"])
    return [
        f"{name} is {status}: {reason} ({ids[0]}{f' and {len(ids) - 1} more' * (len(ids) > 1)})"
        for (name, status, reason), ids in where.items()
    ]


def describe(machine: dict[str, Any]) -> str:
    """The machine in one sentence."""
    v = machine["versions"]
    device = machine.get("gpu") or f"{machine['cpu']}, {machine['instructions']}"
    count = f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}"
    threads = "" if "gpu" in machine else f"{count} on {machine['cores']} cores, "
    return f"{device}, {threads}torch {v['torch']}, fastdit {v['fastdit']} ({machine['commit']})"


def compare(before: Run, after: Run) -> str:
    """What fastdit's column gained or lost between two runs, as a Markdown table.

    Ratios against eager are compared, not times, so that two moods of a machine cancel. A change
    counts where the two ranges of the turns' ratios do not overlap.
    """
    lines = [
        f"before: {describe(before['machine'])}",
        f"after: {describe(after['machine'])}",
        "",
        "| case | before | after | change | |",
        "|---|---|---|---|---|",
    ]
    old = {r["id"]: r for r in before["results"]}
    new = {r["id"]: r for r in after["results"]}
    for key in old.keys() & new.keys():
        for column in old[key]["columns"]:
            a, b = measured(old[key], column), measured(new[key], column)
            if not column.startswith(OURS) or a is None or b is None:
                continue
            first, second = a["speedup"], b["speedup"]
            change = second["median"] / first["median"]
            apart = second["least"] > first["most"] or second["most"] < first["least"]
            verdict = ("faster" if change > 1 else "slower") if apart else "within the spread"
            name = key if column == OURS else f"{key}, {column}"
            lines.append(f"| {name} | {ratio(a)} | {ratio(b)} | {change:.2f}× | {verdict} |")
    lines[5:] = sorted(lines[5:])
    for which, missing in (("before", new.keys() - old.keys()), ("after", old.keys() - new.keys())):
        if missing:
            lines += ["", f"Not in {which}: {'; '.join(sorted(missing))}."]
    return "\n".join(lines)
