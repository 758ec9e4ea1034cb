"""How good samples are against how many evaluations of the model they cost, on the digits model.

    python benchmarks/quality.py --measure      # two minutes a seed on two idle cores
    python benchmarks/quality.py                # print the committed table

For each setting 1000 digits, equally many of each class: the share that a classifier of real digits
reads as asked (`fastdit.digits.Reader`), and the Frechet distance between the samples' pixels and
the real digits', two Gaussians over 64 pixels in the data's own 0 to 16:

    d = |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2·(Σ₁Σ₂)^½)

Lower is nearer; two halves of the real data are 18 apart. Evaluations are rows of the model per
image: a guided step costs two, an unguided one one. The table is `benchmarks/results/quality.json`
and in docs/sampling.md; the presets of `fastdit.sampler.presets` are chosen from it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from fastdit import Sampler
from fastdit.checkpoint_files import atomic_write
from fastdit.data import load_digits
from fastdit.digits import Reader, load_digits_model

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "quality.json"
DOCS = HERE.parent / "docs" / "sampling.md"
MARKS = ("<!-- quality table -->", "<!-- end of the quality table -->")
SCALE = 1.5
COUNT = 1000
OPTIONS = ("solver", "steps", "spacing", "guidance_interval")


def settings() -> list[dict]:
    """The options of `Sampler` that are compared."""
    found: list[dict] = [{"solver": "ddim", "steps": steps} for steps in (10, 20, 25, 50)]
    for spacing in ("uniform", "logsnr", "karras"):
        for steps in (6, 8, 10, 20):
            found.append({"solver": "dpm++", "steps": steps, "spacing": spacing})
    for interval in ((0, 600), (100, 700), (0, 400)):
        for steps in (10, 20):
            setting = {"solver": "dpm++", "steps": steps, "spacing": "karras"}
            found.append({**setting, "guidance_interval": list(interval)})
    found += [{"solver": "ddpm", "steps": steps} for steps in (50, 250)]
    return found


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Between Gaussians fitted to the rows of `a` and `b`. tr (Σ₁Σ₂)^½ is the sum of the roots of
    the product's eigenvalues, which are real and not negative but for rounding."""
    difference = a.mean(0) - b.mean(0)
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    roots = np.sqrt(np.linalg.eigvals(first @ second).real.clip(0))
    return float(difference @ difference + np.trace(first) + np.trace(second) - 2 * roots.sum())


def pixels(images: torch.Tensor) -> np.ndarray:
    """`(B, 1, 8, 8)` in [-1, 1] as rows of 64 numbers from 0 to 16."""
    return ((images.flatten(1).double() + 1) * 8).clamp(0, 16).numpy()


def evaluations(sampler: Sampler) -> int:
    """Rows of the model that an image costs."""
    return sum(1 + guided for guided in sampler.plan.guided)


def options(row: dict) -> dict:
    """Of a row, what `Sampler` was given."""
    return {name: value for name, value in row.items() if name in OPTIONS}


def measure(seeds: int) -> dict:
    """Every setting that the results do not have yet, with each seed; they are written each time,
    so that a run that was cut off goes on where it was."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": []}
    model, reader, data = load_digits_model(), Reader(), load_digits()
    real = pixels(data.images)
    order = np.random.default_rng(0).permutation(len(real))
    halves = frechet(real[order[::2]], real[order[1::2]])
    results |= {"cfg_scale": SCALE, "samples": COUNT, "frechet_of_real_halves": round(halves, 2)}
    labels = torch.arange(10).repeat_interleave(COUNT // 10)
    for setting in settings():
        if setting in map(options, results["rows"]):
            continue
        sampler = Sampler(model, cfg_scale=SCALE, clip_denoised=True, chunk=100, **setting)
        row = {**setting, "evaluations": evaluations(sampler), "recognised": [], "frechet": []}
        for seed in range(seeds):
            images = sampler(labels, seed=seed * COUNT)
            row["recognised"].append(round(reader.accuracy(images, labels), 4))
            row["frechet"].append(round(frechet(pixels(images), real), 1))
        results["rows"].append(row)
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(results, indent=1) + "\n"
        atomic_write(RESULTS, lambda path, text=text: path.write_text(text))
        print(json.dumps(row), flush=True)
    return results


def named(row: dict) -> str:
    """A setting in words."""
    name = {"ddpm": "DDPM", "ddim": "DDIM", "dpm++": "DPM-Solver++(2M)"}[row["solver"]]
    spacing = row.get("spacing", "uniform")
    where = "" if spacing == "uniform" else f", {spacing}"
    interval = row.get("guidance_interval")
    guided = f", guided in t ∈ [{interval[0]}, {interval[1]}]" if interval else ""
    return f"{name} {row['steps']}{where}{guided}"


def table(results: dict) -> str:
    """The results in Markdown, the dearest first."""
    lines = [
        "| sampler | evaluations an image | recognised | Frechet distance |",
        "|---|---|---|---|",
    ]
    for row in sorted(results["rows"], key=lambda row: -row["evaluations"]):
        recognised = f"{100 * np.mean(row['recognised']):.1f} %"
        spread = f"{np.mean(row['frechet']):.1f} ({min(row['frechet'])} to {max(row['frechet'])})"
        chosen = f": `{name}`" if (name := preset(row)) else ""
        lines.append(f"| {named(row)}{chosen} | {row['evaluations']} | {recognised} | {spread} |")
    return "\n".join(lines)


def preset(row: dict) -> str | None:
    """The name of the preset that takes the row's options, if there is one."""
    from fastdit.sampler.presets import PRESETS

    wanted = {name: value for name, value in options(row).items() if value != "uniform"}
    if "guidance_interval" in wanted:
        wanted["guidance_interval"] = tuple(wanted["guidance_interval"])
    return next((name for name, given in PRESETS.items() if given == wanted), None)


def documented(text: str, results: dict) -> str:
    """`text` with the table between its marks replaced."""
    before, rest = text.split(MARKS[0])
    _old, after = rest.split(MARKS[1])
    return f"{before}{MARKS[0]}\n\n{table(results)}\n\n{MARKS[1]}{after}"


def main() -> None:
    """Measure and write, or print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", action="store_true", help="measure, write results and docs")
    parser.add_argument("--seeds", type=int, default=2, help="default 2")
    args = parser.parse_args()
    results = measure(args.seeds) if args.measure else json.loads(RESULTS.read_text())
    if args.measure:
        page = documented(DOCS.read_text(), results)
        atomic_write(DOCS, lambda path: path.write_text(page))
    print(table(results))


if __name__ == "__main__":
    main()
