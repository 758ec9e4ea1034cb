"""`fastdit demo`: the handwritten digits that ship with the package, sampled and timed.

Draws ten of each class with guidance, writes the labelled grid, and then times the sampler and the
same loop on the eager reference, in turns, so that both see the same machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fastdit import backends, images
from fastdit.checkpoint_files import atomic_write
from fastdit.commands.sample import load, transport_of
from fastdit.flow import sampling as flow_sampling
from fastdit.model import DiT
from fastdit.sampling import SOLVERS, sample

SUMMARY = "sample handwritten digits and time it"
CLASSES = [digit for digit in range(10) for _ in range(10)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add = parser.add_argument
    add("--out", type=Path, default=Path("fastdit-demo.png"), help="default fastdit-demo.png")
    add("--objective", choices=("diffusion", "flow"), default="diffusion", help="of the model")
    add("--steps", type=int, default=50, help="denoising steps (default 50)")
    add("--cfg-scale", type=float, default=2.0, help="guidance (default 2)")
    add(
        "--solver", choices=(*SOLVERS, *flow_sampling.SOLVERS), help="default ddim; of a flow euler"
    )
    add("--seed", type=int, default=0, help="default 0")
    add("--device", default=None, help="default: the accelerator, else the CPU")
    add("--rounds", type=int, default=3, help="timed rounds of each (default 3)")
    add("--json", type=Path, help="also write the timing there")


def _timed(model: DiT, backend: str, steps: int, options: dict) -> float:
    """Seconds of one sampling run."""
    with backends.backend(backend):
        start = time.perf_counter()
        sample(model, CLASSES, steps=steps, **options)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start


def throughput(model: DiT, steps: int, rounds: int, options: dict) -> dict[str, list[float]]:
    """Images per second of each backend, `rounds` times, in turns after one run to warm up."""
    rates: dict[str, list[float]] = {"auto": [], "reference": []}
    for turn in range(rounds + 1):
        for backend, values in rates.items():
            seconds = _timed(model, backend, steps, options)
            if turn:
                values.append(len(CLASSES) / seconds)
    return rates


def what_runs(device: str) -> str:
    """`auto`'s choice on `device`, in words."""
    native = [c.op for c in backends.explain() if c.device == device and c.runs != "reference"]
    return f"fastdit, native {', '.join(native)}" if native else "fastdit, eager reference ops"


def report(device: str, steps: int, rates: dict[str, list[float]]) -> Table:
    """The throughput table: medians, spreads, and the ratio of each round's pair."""
    title = f"100 digits, {steps} steps with guidance on {device}"
    table = Table("path", "images/s", "spread", "ratio", title=title, title_justify="left")
    ratios = [a / b for a, b in zip(rates["auto"], rates["reference"], strict=True)]
    for name, label in (("auto", what_runs(device)), ("reference", "eager PyTorch")):
        values = rates[name]
        spread = f"{min(values):.1f} to {max(values):.1f}"
        ratio = f"{statistics.median(ratios):.2f}" if name == "auto" else "1"
        table.add_row(label, f"{statistics.median(values):.1f}", spread, ratio)
    return table


def record(device: str, steps: int, rates: dict[str, list[float]]) -> dict[str, Any]:
    """The timing as plain data: images per second of each backend, and the ratio of the pairs."""
    ratios = [a / b for a, b in zip(rates["auto"], rates["reference"], strict=True)]

    def spread(values: list[float]) -> dict[str, float]:
        return {"median": statistics.median(values), "least": min(values), "most": max(values)}

    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "steps": steps,
        "images_per_second": {name: spread(values) for name, values in rates.items()},
        "ratio": spread(ratios),
    }


def run(args: argparse.Namespace) -> None:
    """Sample, write the picture, print what ran."""
    console = Console()
    ckpt = "digits" if args.objective == "diffusion" else "digits-flow"
    model, transport = load(ckpt, args.device, "fp32"), transport_of(ckpt, args.objective)
    device = next(model.parameters()).device.type
    solver = args.solver or ("ddim" if transport is None else "euler")
    options = {"cfg_scale": args.cfg_scale, "solver": solver, "seed": args.seed}
    options |= {"clip_denoised": transport is None, "transport": transport}
    pixels = images.to_uint8(sample(model, CLASSES, steps=args.steps, progress=True, **options))
    picture = images.grid(pixels, 10, scale=6, row_labels=[str(digit) for digit in range(10)])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    picture.save(args.out)
    console.print(f"wrote {args.out}")
    short = max(1, args.steps // 10)
    console.print(f"timing {args.rounds} rounds of {short} steps each ...")
    rates = throughput(model, short, args.rounds, options)
    console.print(report(device, short, rates))
    if args.json is not None:
        text = json.dumps(record(device, short, rates), indent=1) + "\n"
        atomic_write(args.json, lambda path: path.write_text(text))
