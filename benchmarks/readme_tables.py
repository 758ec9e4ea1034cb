"""The tables of README.md and docs/, made from the results under benchmarks/results/.

    python benchmarks/readme_tables.py            # write them
    python benchmarks/readme_tables.py --check    # fail where a table is not what the results say
    python benchmarks/readme_tables.py --retake   # measure first: on an idle machine

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; what is typed there is replaced.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from harness import modelled, plots, results
from harness.problem import EAGER

from fastdit.checkpoint_files import atomic_write

ROOT = Path(__file__).resolve().parents[1]
FILES = ("README.md", "docs/benchmarks.md")
PICTURE = "docs/benchmarks.svg"
BENCH, DEMO, DIGITS = (results.RESULTS / f"{name}.json" for name in ("cpu", "demo", "digits"))
RETAKE = {
    BENCH: ["-m", "fastdit", "bench", "--device", "cpu", "--out", str(BENCH)],
    DEMO: ["-m", "fastdit", "demo", "--out", "docs/demo.png", "--json", str(DEMO)],
    DIGITS: ["-m", "fastdit.digits", "--out", str(DIGITS)],
}
MARK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.S)
HEADLINES = (  # level, a case's name, pass and size; and what to call it
    ("op", "adaln, forward: XL/2, B2, fp32", "`adaln`"),
    ("op", "gated_adaln, forward: XL/2, B2, fp32", "`gated_adaln`"),
    ("op", "gated_adaln, backward: XL/2, B2, fp32", "`gated_adaln`, its gradient"),
    ("op", "bias_gelu, forward: XL/2, B2, fp32", "`bias_gelu`"),
    ("op", "glu, forward: XL/2, B2, fp32", "`glu` (SwiGLU)"),
    ("op", "patch_embed, forward: XL/2, B2, fp32", "`patch_embed`"),
    ("sampler", "sampler step, ddpm, noise given: 1x4x32x32, fp32", "a DDPM step, one latent"),
    ("model", "model, forward: digits, 6x192, B2, fp32", "a DiT of 6 blocks, 16 tokens"),
    ("model", "model, forward: S/2, B2, fp32", "DiT-S/2, 2 samples"),
    ("model", "model, forward: B/2, B2, fp32", "DiT-B/2, 2 samples"),
    ("model", "model, forward: XL/2, B1, fp32", "DiT-XL/2, 1 sample"),
    ("training", "training step, both: digits, 6x192, B64, fp32", "a training step, 64 samples"),
    (
        "sampling",
        "sampling, ddim, 20 steps: digits, 100 images, fp32",
        "100 digits, 20 guided steps",
    ),
)
PEERS = ("torch.compile", "diffusers", "ONNX Runtime", "OpenVINO")


def figures() -> str:
    """What the README claims first: from the demo's and the digits' own JSON."""
    digits = json.loads(DIGITS.read_text())
    demo = json.loads(DEMO.read_text())
    guided, plain = (digits["recognised"][f"guidance {scale}"] for scale in (2, 1))
    ours, eager = demo["images_per_second"]["auto"], demo["images_per_second"]["reference"]
    rates = " beside ".join(
        f"{r['median']:.0f} ({r['least']:.0f} to {r['most']:.0f})" for r in (ours, eager)
    )
    rows = [
        ("what", "figure", "printed by"),
        ("---", "---", "---"),
        (
            f"samples a classifier of real digits reads as asked, of {digits['count']}",
            f"{guided:.0%} at guidance 2, {plain:.0%} unguided",
            "`python -m fastdit.digits`",
        ),
        (
            "that classifier on real digits it has not seen",
            f"{digits['held_out']:.1%}",
            "the same",
        ),
        (
            f"digits a second, {demo['steps']} guided steps on {demo['threads']} "
            f"{demo['device'].upper()} thread{'s' * (demo['threads'] > 1)}, with the compiled "
            "kernels beside eager PyTorch",
            f"{rates}, a median ratio of {demo['ratio']['median']:.2f}",
            "`fastdit demo`",
        ),
        (
            "deviation from the published code's recorded outputs",
            "at most 2e-5 relative",  # the tolerance of tests/test_model.py, not a measurement
            "`pytest`",
        ),
    ]
    return "".join(f"| {' | '.join(row).replace('%', ' %')} |\n" for row in rows).replace(
        "| --- | --- | --- |", "|---|---|---|"
    )


def headline_rows(run: results.Run) -> list[tuple[str, dict[str, Any]]]:
    """The chosen cases that the run holds, with their names for a reader."""
    found = {r["id"]: r for r in run["results"]}
    return [(label, found[key]) for _, key, label in HEADLINES if key in found]


def speed() -> str:
    """fastdit beside the best of its peers, in the chosen cases."""
    run = results.read(BENCH)
    lines = [
        "| float32, on a CPU | eager PyTorch | best peer | fastdit | speed over eager |",
        "|---|---|---|---|---|",
    ]
    for label, r in headline_rows(run):
        ours, eager = (results.measured(r, c) for c in (results.best_of_ours(r), EAGER))
        peers = {p: results.measured(r, p) for p in PEERS}
        times = {p: row["seconds"]["median"] for p, row in peers.items() if row}
        best = min(times, key=times.__getitem__, default=None)
        cells = [
            label,
            results.amount(r, eager),
            f"{results.amount(r, peers[best])}, {best}" if best else "–",
            results.amount(r, ours),
            results.ratio(ours),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"{results.describe(run['machine'])}. {footnote(run)}", ""])


def footnote(run: results.Run) -> str:
    text = "From `fastdit bench`. Medians of turns; "
    text += "in brackets the least and the most of the turns' ratios."
    disturbed = sum(r["disturbed"] for r in run["results"])
    return text + f" {disturbed} turns were taken beside other processes." * bool(disturbed)


def everything() -> str:
    """Every case of the committed run, and what was not compared."""
    return results.markdown(results.read(BENCH)) + "\n"


def gpus() -> str:
    """The modelled table of the committed run."""
    return modelled.markdown(results.read(BENCH)["modelled"]) + "\n"


TABLES: dict[str, Callable[[], str]] = {
    "figures": figures,
    "speed": speed,
    "everything": everything,
    "modelled": gpus,
}


def filled(text: str) -> str:
    """`text` with every marked table made again.

    Raises:
        ValueError: a marker names no table.
    """

    def table(found: re.Match[str]) -> str:
        if found[2] not in TABLES:
            raise ValueError(f"table: got {found[2]!r}, allowed are {', '.join(TABLES)}")
        return found[1] + TABLES[found[2]]() + found[3]

    return MARK.sub(table, text)


def stale() -> list[str]:
    """Files whose tables are not what the results say."""
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in FILES}
    return [name for name, text in texts.items() if filled(text) != text]


def write() -> None:
    for name in FILES:
        text = filled((ROOT / name).read_text(encoding="utf-8"))
        atomic_write(ROOT / name, lambda path, text=text: path.write_text(text, encoding="utf-8"))
    run = results.read(BENCH)
    picture = plots.speedups([r | {"label": label} for label, r in headline_rows(run)])
    if picture is not None:
        atomic_write(ROOT / PICTURE, lambda path: path.write_text(picture, encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if stale")
    parser.add_argument("--retake", action="store_true", help="measure everything again first")
    options = parser.parse_args()
    if options.retake:
        for command in RETAKE.values():
            print("python", *command, flush=True)
            subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    if options.check:
        raise SystemExit(f"stale: {', '.join(stale())}; run {__file__}" if stale() else 0)
    write()


if __name__ == "__main__":
    main()
