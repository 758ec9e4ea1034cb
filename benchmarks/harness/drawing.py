"""How the report's pictures look, and their way from matplotlib into a page as SVG."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from typing import Any

from harness.problem import COPY, EAGER, OURS

INK, FAINT, ACCENT = "#1c2733", "#c9d2dc", "#0b7a75"
COLOURS = {
    OURS: ACCENT,
    EAGER: "#8795a5",
    "torch.compile": "#e08e45",
    "compile, max-autotune": "#b5651d",
    "ONNX Runtime": "#6a8caf",
    "OpenVINO": "#9673a6",
    "diffusers": "#c8a415",
    "fastdit, NativeForward": "#064e4b",
    "fastdit.sample": "#7fc4bf",
    COPY: FAINT,
}
OTHER = ("#a05195", "#d45087", "#665191", "#2f4b7c")
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fastdit",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.axisbelow": True,
    "grid.color": "#e8edf2",
    "legend.frameon": False,
}


@contextlib.contextmanager
def figure_of(
    width: float, height: float, columns: int = 1
) -> Iterator[tuple[Any, Any, list[str]]]:
    """A figure, its axes, and a list in which its SVG is left."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found: list[str] = []
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, columns, figsize=(width, height), layout="constrained")
        try:
            yield figure, axes, found
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
            found.append(re.sub(r"^.*?<svg", "<svg", buffer.getvalue(), flags=re.S))
        finally:
            plt.close(figure)


def plain_numbers(axis: Any) -> None:
    """Labels 30, 40, 60 on a logarithmic axis, not powers of ten."""
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter("")


def colour(column: str, index: int = 0) -> str:
    return COLOURS.get(column, ACCENT if column.startswith(OURS) else OTHER[index % len(OTHER)])
