"""The report's pictures, drawn from results alone.

A function returns SVG, or None where the results hold nothing for it to draw.
"""

from __future__ import annotations

from typing import Any

from harness.drawing import INK, colour, figure_of, plain_numbers
from harness.measure import Result
from harness.problem import COPY, EAGER, OURS
from harness.results import best_of_ours, columns_of, measured, significant

Run = dict[str, Any]
NOT_COMPARED = (EAGER, COPY, "randn alone")


def label_of(r: Result) -> str:
    """A case on an axis; a result that brings a `label` is called that."""
    return r.get("label", f"{r['name']}, {r['what']}\n{r['size']}").replace("`", "")


def speedups(results: list[Result]) -> str | None:
    """Bars of every measured column's speed over eager, with the range of its turns: right of the
    line is faster, left of it slower, and twice is as far as half."""
    shown = [r for r in results if measured(r, best_of_ours(r))]
    if not shown:
        return None
    columns = [c for c in columns_of(shown) if c not in NOT_COMPARED]
    bars = [
        (r, [(c, row["speedup"]) for c in columns if (row := measured(r, c)) is not None])
        for r in shown
    ]
    height = 0.24 * sum(len(several) for _, several in bars) + 0.16 * len(bars) + 0.9
    every = [s for _, several in bars for _, s in several]
    low = min(0.8, *(s["least"] for s in every))
    high = max(2.0, *(s["most"] for s in every))
    with figure_of(8.6, height) as (figure, axes, found):
        at, ticks = 0.0, []
        seen: dict[str, Any] = {}
        for r, several in bars:
            ticks.append((at + (len(several) - 1) / 2, label_of(r)))
            for column, s in several:
                middle = s["median"]
                bar = axes.barh(
                    at,
                    middle - 1,
                    0.86,
                    left=1,
                    color=colour(column, columns.index(column)),
                    xerr=[[middle - s["least"]], [s["most"] - middle]],
                    error_kw={"ecolor": "#00000055", "elinewidth": 1},
                )
                seen.setdefault(column, bar)
                axes.text(
                    1.03 * max(s["most"], 1.0),
                    at,
                    f"{significant(middle)}×",
                    va="center",
                    fontsize=8,
                    weight="bold" if column.startswith(OURS) else "normal",
                )
                at += 1
            at += 0.7
        axes.axvline(1, color=INK, linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_xlim(low / 1.05, high * 1.35)
        powers = [2.0**n for n in range(-4, 10) if low / 1.05 <= 2.0**n <= high * 1.35]
        axes.set_xticks(powers, [f"{significant(p)}×" for p in powers])
        axes.set_yticks([y for y, _ in ticks], [label for _, label in ticks], fontsize=8)
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(at - 0.2, -0.9)
        axes.grid(axis="x")
        axes.set_xlabel("speed over eager PyTorch; whiskers: least and most of the turns")
        figure.legend(
            [seen[c] for c in columns if c in seen],
            [c for c in columns if c in seen],
            loc="outside upper left",
            ncols=5,
            fontsize=8,
        )
    return found[0]


def bandwidths(run: Run) -> str | None:
    """Each op's least bytes over its time, beside the machine's copy and one of the same size."""
    points = [
        (r, measured(r, c), c)
        for r in run["results"]
        if r["level"] == "op" and r["bytes"]
        for c in (COPY, EAGER, best_of_ours(r))
    ]
    points = [p for p in points if p[1]]
    if not points or "copy" not in run["ceilings"]:
        return None
    names = list(dict.fromkeys(r["name"] for r, _, _ in points))
    passes = [w for w in ("forward", "backward") if any(r["what"] == w for r, _, _ in points)]
    with figure_of(8.6, 0.55 * len(names) + 1.3, columns=len(passes)) as (figure, both, found):
        copy = run["ceilings"]["copy"]
        for axes, what in zip(both if len(passes) > 1 else [both], passes, strict=True):
            for y, name in enumerate(names):
                for r, row, column in points:
                    if r["name"] != name or r["what"] != what:
                        continue
                    if column == COPY:
                        axes.plot(
                            row["bytes_per_second"] / 1e9, y, "|", color="#9aa7b5", ms=15, mew=1.6
                        )
                        continue
                    filled = column != EAGER
                    size = 22 + 14 * min(6, r["bytes"] / 1e6) ** 0.5
                    axes.scatter(
                        row["bytes_per_second"] / 1e9,
                        y + (0.16 if filled else -0.16),
                        s=size,
                        color=colour(column) if filled else "white",
                        edgecolors=colour(column),
                        linewidths=1.4,
                        zorder=3,
                    )
            axes.axvline(copy / 1e9, color=INK, linewidth=1)
            axes.text(copy / 1e9, -0.75, " copy in DRAM", fontsize=8, va="center")
            axes.set_xscale("log")
            axes.set_ylim(len(names) - 0.4, -1)
            axes.set_yticks(range(len(names)), names if what == passes[0] else [""] * len(names))
            axes.set_title(what, fontsize=10, loc="left")
            axes.grid(axis="x")
            axes.tick_params(axis="y", length=0)
        figure.supxlabel(
            "least bytes of the op over its time, GB/s. Filled: fastdit; hollow: eager; bar: a "
            "copy of as many bytes,\nwhich a cache may hold. Larger dots are larger tensors.",
            fontsize=9,
        )
    return found[0]


def roofline(run: Run) -> str | None:
    """Flop/s over flop per byte, under the copy's and the product's ceilings."""
    dtype = next((k for k in run["ceilings"] if k.startswith("gemm_")), None)
    shown = [
        r
        for r in run["results"]
        if r["flops"] and measured(r, EAGER) and measured(r, EAGER).get("moved_bytes")
    ]
    if not shown or dtype is None:
        return None
    peak, copy = run["ceilings"][dtype], run["ceilings"]["copy"]
    with figure_of(8.6, 4.2) as (_, axes, found):
        xs, ys = [], []
        for r in shown:
            for column in (EAGER, best_of_ours(r)):
                row = measured(r, column)
                if row is None or not row.get("moved_bytes"):
                    continue
                x, y = r["flops"] / row["moved_bytes"], row["flops_per_second"]
                xs.append(x)
                ys.append(y)
                axes.scatter(
                    x,
                    y / 1e9,
                    s=42,
                    zorder=3,
                    linewidths=1.4,
                    color=colour(column) if column != EAGER else "white",
                    edgecolors=colour(column),
                )
            if r["what"] == "backward":  # beside the forward's and both's, under their labels
                continue
            axes.annotate(
                f"{r['name']}, {r['what']}, {r['size']}" if r["level"] != "model" else r["size"],
                (x, y / 1e9),
                xytext=(6, -9 if r["what"] == "both" else 4),
                textcoords="offset points",
                fontsize=7,
            )
        left, right = min([*xs, peak / copy]) / 3, max([*xs, peak / copy]) * 6
        ridge = peak / copy
        axes.plot(
            [left, ridge, right], [left * copy / 1e9, peak / 1e9, peak / 1e9], color=INK, lw=1.2
        )
        axes.text(right, peak / 1e9, f"GEMM, {dtype[5:]}", ha="right", va="bottom", fontsize=8)
        axes.text(left, left * copy / 1e9, " copy in DRAM", va="top", fontsize=8)
        axes.set(
            xscale="log",
            yscale="log",
            xlim=(left, right),
            xlabel="flop per byte moved, counted",
            ylabel="GFLOP/s",
        )
        plain_numbers(axes.xaxis)
        plain_numbers(axes.yaxis)
        axes.grid()
    return found[0]


def scaling(run: Run) -> str | None:
    """Time over batch and over tokens of what was measured at several of them."""
    panels = []
    for axis, other in (("batch", "tokens"), ("tokens", "batch")):
        groups: dict[tuple[str, Any], list[Result]] = {}
        for r in run["results"]:
            if r[axis] and r[other] and r["what"] == "forward" and r["level"] in ("op", "model"):
                of_op = f"{r['name']}, width {r.get('width')}"
                kind = of_op if r["level"] == "op" else r["size"].rpartition(",")[0]
                fixed = f"{r[other]} tokens" if other == "tokens" else f"batch {r[other]}"
                groups.setdefault((f"{kind}, {fixed}", r["level"]), []).append(r)
        several = {
            key: sorted(rs, key=lambda r: r[axis])
            for key, rs in groups.items()
            if len({r[axis] for r in rs}) >= 3
        }
        if several:
            panels.append((axis, several))
    if not panels:
        return None
    with figure_of(8.6, 3.6, columns=len(panels)) as (_, axes, found):
        for ax, (axis, several) in zip(axes if len(panels) > 1 else [axes], panels, strict=True):
            for (label, _), rs in several.items():
                xs = [r[axis] for r in rs]
                for column, style in ((None, "o-"), (EAGER, "o--")):
                    rows = [measured(r, column or best_of_ours(r)) for r in rs]
                    ys = [1e3 * row["seconds"]["median"] for row in rows]
                    ax.plot(xs, ys, style, color=colour(column or "fastdit"), ms=4, lw=1.4)
                ax.annotate(
                    label,
                    (xs[-1], ys[-1]),
                    xytext=(0, 8),
                    textcoords="offset points",
                    fontsize=7,
                    ha="right",
                    va="bottom",
                )
            ax.margins(y=0.12)
            ax.set(xscale="log", yscale="log", xlabel=axis, ylabel="ms")
            ax.set_title(f"over {axis}: solid fastdit, dashed eager", fontsize=10, loc="left")
            ax.grid()
            ticks = sorted({r[axis] for rs in several.values() for r in rs})
            ax.set_xticks(ticks, [str(t) for t in ticks])
            ax.minorticks_off()
    return found[0]


def memory(run: Run) -> str | None:
    """Bytes kept for the backward pass and the peak of a call, fastdit's beside eager's."""
    keys = {"saved_bytes": "kept for the backward", "peak_bytes": "peak of a call, over before"}
    shown = [
        r
        for r in run["results"]
        if r["what"] == "both" and measured(r, EAGER) and measured(r, EAGER).get("saved_bytes")
    ]
    if not shown:
        return None
    with figure_of(8.6, 0.42 * len(shown) + 1.1, columns=2) as (_, both, found):
        for axes, (key, title) in zip(both, keys.items(), strict=True):
            for y, r in enumerate(shown):
                whole = measured(r, EAGER)[key]
                for shift, column in ((-0.19, EAGER), (0.19, best_of_ours(r))):
                    value = measured(r, column).get(key) if measured(r, column) else None
                    if value is None or not whole:
                        continue
                    share = min(value / whole, 1.2)  # a longer bar would leave the picture
                    axes.barh(y + shift, share, 0.36, color=colour(column))
                    axes.text(
                        share + 0.02,
                        y + shift,
                        f"{significant(value / 1e6)} MB",
                        va="center",
                        fontsize=7,
                    )
            labels = [f"{r['name']}, {r['size']}" for r in shown]
            axes.set_yticks(
                range(len(shown)), labels if key == "saved_bytes" else [""] * len(shown)
            )
            axes.tick_params(axis="both", length=0, labelsize=8)
            axes.set_xticks([0, 0.5, 1], ["0", "½", "eager"])
            axes.set_ylim(len(shown) - 0.4, -0.6)
            axes.set_xlim(0, 1.5)
            axes.set_title(title, fontsize=10, loc="left")
            axes.grid(axis="x")
    return found[0]


def modelled(rows: list[dict[str, Any]], gpu: str = "H100") -> str | None:
    """The modelled µs of each op's forward pass on one GPU."""
    if not rows:
        return None
    columns = ("eager", "torch.compile", "fastdit")
    with figure_of(8.6, 0.62 * len(rows) + 1.1) as (figure, axes, found):
        seen = {}
        most = max(t[gpu] for row in rows for t in row["modelled_us"].values())
        for y, row in enumerate(rows):
            for index, column in enumerate(columns):
                times = row["modelled_us"].get(column)
                if times is None:
                    continue
                at = y + 0.27 * (index - 1)
                seen[column] = axes.barh(
                    at,
                    times[gpu],
                    0.25,
                    color=colour(column),
                    hatch="////",
                    edgecolor="white",
                    linewidth=0,
                )
                launches = row["counts"][column]["launches"]
                text = f"{times[gpu]:.1f} µs, {launches} launch{'es' * (launches > 1)}"
                axes.text(times[gpu] + 0.01 * most, at, text, va="center", fontsize=7)
        axes.set_yticks(range(len(rows)), [row["op"] for row in rows])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(0, 1.25 * most)
        axes.grid(axis="x")
        axes.set_xlabel(f"modelled µs on an {gpu}: no GPU has measured them")
        figure.legend(seen.values(), seen.keys(), loc="outside upper left", ncols=3, fontsize=8)
    return found[0]
