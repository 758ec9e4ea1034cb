"""One HTML page of a run that stands alone: pictures inside, nothing fetched."""

from __future__ import annotations

import html
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastdit.checkpoint_files import atomic_write
from harness import modelled, plots
from harness.measure import MEASURED, Result
from harness.results import (
    best_of_ours,
    cell,
    columns_of,
    describe,
    in_units,
    measured,
    ratio,
    reasons,
    significant,
)

Run = dict[str, Any]
TITLES = {
    "op": "The ops",
    "block": "A block",
    "model": "A model's forward pass",
    "training": "A training step",
    "sampler": "A sampler's step",
    "sampling": "Sampling, end to end",
}
STYLE = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")


def tiles(run: Run) -> list[tuple[str, str]]:
    """The page's few large figures: median ratios to eager at each level."""
    found = []
    for level, title in TITLES.items():
        results = [r for r in run["results"] if r["level"] == level]
        rows = [measured(r, best_of_ours(r)) for r in results]
        ratios = [row["speedup"]["median"] for row in rows if row]
        if ratios:
            middle = significant(statistics.median(ratios))
            several = f", median of {len(ratios)} cases" * (len(ratios) > 1)
            found.append((f"{middle}×", f"{title.lower()}{several}"))
    return found


def table(results: list[Result]) -> str:
    """Time and ratio of every column; the spread and all else in a cell's title."""
    columns = columns_of(results)
    head = "".join(f"<th>{html.escape(c)}</th>" for c in ("case", *columns))
    lines = []
    for r in results:
        name = f"{r['name']}, {r['what']}<small>{html.escape(r['size'])}, {r['dtype']}</small>"
        cells = []
        for column in columns:
            row = r["columns"].get(column)
            text, hint = html.escape(cell(r, column)), ""
            time, _, factor = text.partition(", ")
            if row is not None and row["status"] == MEASURED:
                spread = (
                    f"{in_units(row['seconds']['least'])} to {in_units(row['seconds']['most'])}"
                )
                hint = html.escape("\n".join([spread, *facts(row)]), quote=True)
                text = f"{time}<small>{factor or 'eager'}</small>"
            elif row is not None:
                hint = html.escape(row["reason"], quote=True)
                text = f"<em>{text}</em>"
            kind = "ours" if column.startswith("fastdit") else ""
            cells.append(f'<td class="{kind}" title="{hint}">{text}</td>')
        lines.append(f"<tr><th>{name}</th>{''.join(cells)}</tr>")
    return f"<div class=wide><table><tr>{head}</tr>{''.join(lines)}</table></div>"


def facts(row: dict[str, Any]) -> list[str]:
    """What is known of a column, in words."""
    found = [ratio(row)]
    for key, label, scale in (
        ("bytes_per_second", "GB/s", 1e-9),
        ("flops_per_second", "GFLOP/s", 1e-9),
        ("images_per_second", "images/s", 1),
        ("share_of_copy", "% of a copy in DRAM", 100),
        ("share_of_gemm", "% of a matrix product's peak", 100),
        ("peak_bytes", "MB at its peak", 1e-6),
        ("saved_bytes", "MB kept for the backward", 1e-6),
        ("moved_bytes", "MB moved, counted", 1e-6),
        ("launches", "launches", 1),
        ("joules_per_image", "J an image", 1),
        ("error", "of the largest: error against eager", 1),
    ):
        if row.get(key) is not None:
            value = f"{row[key]:.1e}" if key == "error" else significant(scale * row[key])
            found.append(f"{value} {label}")
    return found


def figure(svg: str | None, caption: str) -> str:
    if svg is None:
        return ""
    return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"


def level_section(run: Run, level: str) -> Iterable[str]:
    results = [r for r in run["results"] if r["level"] == level]
    if not results:
        return
    yield f'<section id="{level}"><h2>{TITLES[level]}</h2>'
    yield figure(plots.speedups(results), "Speed over eager PyTorch; longer is faster.")
    if level == "op":
        yield figure(
            plots.bandwidths(run),
            "How near each op comes to moving its bytes at the speed of a copy.",
        )
    yield f"<details><summary>All figures</summary>{table(results)}</details></section>"


def machine_section(run: Run) -> str:
    machine = run["machine"] | {"ceilings": run["ceilings"], "energy": run["energy"]}
    text = html.escape(json.dumps(machine, indent=1, ensure_ascii=False))
    return (
        f"<section><h2>The machine</h2><p>{html.escape(describe(run['machine']))}. "
        f"{ceilings(run)}</p><details><summary>Everything</summary><pre>{text}</pre></details>"
        "</section>"
    )


def ceilings(run: Run) -> str:
    shown = []
    for name, rate in run["ceilings"].items():
        unit = (
            "GB/s copied, reads and writes"
            if name == "copy"
            else f"GFLOP/s in a {name[5:]} product"
        )
        shown.append(f"{significant(rate / 1e9)} {unit}")
    return "Measured ceilings: " + "; ".join(shown) + "."


def modelled_section(run: Run) -> str:
    rows = run["modelled"]
    if not rows:
        return ""
    head = "".join(f"<th>{name}</th>" for name in ("op", *modelled.COLUMNS))
    lines = []
    for row in rows:
        cells = []
        for name in modelled.COLUMNS:
            counts, times = row["counts"][name], row["modelled_us"].get(name)
            if counts is None or times is None:
                cells.append("<td>–</td>")
                continue
            shown = " / ".join(f"{times[gpu]:.1f}" for gpu in modelled.MODELLED_GPUS)
            small = f"{counts['launches']} launched, {counts['bytes'] / 1e6:.1f} MB"
            kind = "ours" if name == "fastdit" else ""
            cells.append(f'<td class="{kind}">{shown}<small>{small}</small></td>')
        lines.append(f"<tr><th>{row['op']}</th>{''.join(cells)}</tr>")
    gpus = " / ".join(modelled.MODELLED_GPUS)
    return (
        "<section id=modelled><h2>GPUs, <mark>modelled</mark></h2><p>No GPU has measured what "
        "follows. Bytes and launches are counted, for torch.compile in the code that Inductor "
        "generates; a roofline of the data sheets makes them times. DiT-XL/2, 32 samples, "
        "bfloat16, forward.</p>"
        + figure(plots.modelled(rows), "Modelled, not measured: least time on an H100.")
        + f"<div class=wide><table><tr>{head}</tr>{''.join(lines)}</table></div>"
        f"<p class=note>Modelled µs on {gpus}.</p></section>"
    )


def proof_section(run: Run) -> str:
    """Measured beside modelled times of every kernel, and how the tests on the GPU ended."""
    proof = run.get("gpu_proof")
    if proof is None:
        return ""
    columns = ("op", "pass", "kernel", "modelled µs", "measured µs", "eager µs", "TB/s")
    lines = []
    for row in proof["rows"]:
        numbers = (
            row.get("modelled_us"),
            row.get("measured_us", {}).get("p50"),
            row.get("eager_us"),
            row.get("terabytes_per_second"),
        )
        words = (row["op"], row["pass"], row["kernel"] or f"eager: {row.get('why_not')}")
        shown = [*map(html.escape, words), *("–" if n is None else significant(n) for n in numbers)]
        lines.append("<tr>" + "".join(f"<td>{text}</td>" for text in shown) + "</tr>")
    tests = ", ".join(f"{n} {word}" for word, n in proof["tests"].items()) or "skipped"
    head = "".join(f"<th>{column}</th>" for column in columns)
    return (
        f"<section id=proof><h2>The proof on a {html.escape(proof['gpu'])}</h2>"
        f"<p>Tests on the GPU: {tests}. Modelled for a {proof['data_sheet']}.</p>"
        f"<div class=wide><table><tr>{head}</tr>{''.join(lines)}</table></div></section>"
    )


def page(run: Run) -> str:
    """The whole page."""
    large = "".join(f"<div><b>{v}</b><span>{html.escape(t)}</span></div>" for v, t in tiles(run))
    notes = reasons(run["results"]) + [f"{k} failed: {v}" for k, v in run["failed"].items()]
    if run["left_out"]:
        notes.append(f"left out for lack of time: {'; '.join(run['left_out'])}")
    disturbed = sum(r["disturbed"] for r in run["results"])
    if disturbed:
        turns = sum(
            len(row["turns"])
            for r in run["results"]
            for row in r["columns"].values()
            if row["status"] == MEASURED
        )
        notes.append(f"{disturbed} of {turns} turns were taken while other processes ran")
    items = "".join(f"<li>{html.escape(n)}</li>" for n in notes)
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        "<meta name=viewport content='width=device-width, initial-scale=1'>",
        f"<title>fastdit benchmarks</title><style>{STYLE}</style>",
        f"<header><h1>fastdit <span>against eager PyTorch and its peers</span></h1>"
        f"<p>{html.escape(describe(run['machine']))}, {run['time'][:10]}</p></header>",
        f"<div class=tiles>{large}</div>",
        "<p class=note>Columns of a case took turns on one machine; a figure is the median of its "
        "turns, a ratio the median of the turns' ratios. Each column's result was checked against "
        "eager's before it was timed.</p>",
        proof_section(run),
        *(part for level in TITLES for part in level_section(run, level)),
        "<section id=more><h2>Against the ceilings, over sizes, in memory</h2>",
        figure(plots.roofline(run), "Matrix products: hollow eager, filled fastdit."),
        figure(plots.scaling(run), "A forward pass as batch and tokens grow."),
        figure(plots.memory(run), "Memory of a forward and backward pass."),
        "</section>",
        modelled_section(run),
        f"<section><h2>Not compared</h2><ul>{items}</ul></section>" if items else "",
        machine_section(run),
    ]
    return "\n".join(parts) + "\n"


def write(path: Path, run: Run) -> None:
    text = page(run)
    atomic_write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
