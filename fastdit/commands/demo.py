"""`fastdit demo`: the handwritten digits that ship with the package, sampled and timed.

Draws ten of each class with guidance, writes the labelled grid, and then times the sampler and the
published loop on eager PyTorch, in turns, so that both see the same machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fastdit import backends, images
from fastdit.checkpoint_files import atomic_write
from fastdit.commands.sample import load, transport_of
from fastdit.diffusion import create_diffusion
from fastdit.model import DiT
from fastdit.sampler import PRESETS, Sampler
from fastdit.sampling import SOLVERS, sample

SUMMARY = "sample handwritten digits and time it"
CLASSES = [digit for digit in range(10) for _ in range(10)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add = parser.add_argument
    add("--out", type=Path, default=Path("fastdit-demo.png"), help="default fastdit-demo.png")
    add("--objective", choices=("diffusion", "flow"), default="diffusion", help="of the model")
    add("--quality", choices=PRESETS, default="balanced", help="default balanced; not of a flow")
    add("--steps", type=int, help="denoising steps (default: the quality's; 50 of a flow)")
    add("--cfg-scale", type=float, default=2.0, help="guidance (default 2)")
    add("--solver", choices=SOLVERS, help="default: the quality's; of a flow euler")
    add("--seed", type=int, default=0, help="default 0")
    add("--device", default=None, help="default: the accelerator, else the CPU")
    add("--rounds", type=int, default=3, help="timed rounds of each (default 3)")
    add("--json", type=Path, help="also write the timing there")


def published_loop(model: DiT, steps: int, options: dict) -> Tensor:
    """What the published code does, on eager ops: all of the model in every step, and its loop."""
    labels = torch.tensor(CLASSES, device=model.pos_embed.device)
    y = torch.cat([labels, model.null_condition(len(labels))])
    diffusion = create_diffusion(f"{options['spacing'].replace('uniform', '')}{steps}")
    loop = {
        "ddpm": diffusion.p_sample_loop,
        "ddim": diffusion.ddim_sample_loop,
        "dpm++": diffusion.dpm_solver_sample_loop,
    }[options["solver"]]

    def forward(x: Tensor, t: Tensor) -> Tensor:  # a function: its conditioning is not hoisted
        return model.forward_with_cfg(x, t, y, options["cfg_scale"], model.in_channels)

    with backends.backend("reference"):
        z = torch.randn(len(labels), model.in_channels, *model.input_size, device=labels.device)
        return loop(forward, (2 * len(z), *z.shape[1:]), torch.cat([z, z]))[: len(z)]


def throughput(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Images per second of each run, `rounds` times, in turns after one run to warm up."""
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                rates[name].append(len(CLASSES) / (time.perf_counter() - start))
    return rates


def report(title: str, rates: dict[str, list[float]]) -> Table:
    """The throughput table: medians, spreads, and the ratio of each round's pair."""
    table = Table("path", "images/s", "spread", "ratio", title=title, title_justify="left")
    ours, eager = rates.values()
    ratios = [a / b for a, b in zip(ours, eager, strict=True)]
    for name, values in rates.items():
        spread = f"{min(values):.1f} to {max(values):.1f}"
        ratio = f"{statistics.median(ratios):.2f}" if values is ours else "1"
        table.add_row(name, f"{statistics.median(values):.1f}", spread, ratio)
    return table


def diffusion_demo(model: DiT, args: argparse.Namespace) -> tuple[Tensor, str, dict, int]:
    """The digits, how they were drawn, the runs to time and their steps.

    The timed runs are of the same solver with guidance in every step, 5 steps at most.
    """
    common = {"cfg_scale": args.cfg_scale, "clip_denoised": True}
    given = {"solver": args.solver, "steps": args.steps}
    sampler = Sampler(model, quality=args.quality, **given, **common)
    digits = sampler(CLASSES, seed=args.seed, progress=True)
    chosen = PRESETS[args.quality] | {k: v for k, v in given.items() if v is not None}
    options = {"solver": chosen["solver"], "spacing": chosen.get("spacing", "uniform"), **common}
    steps = min(5, chosen["steps"])
    timed = Sampler(model, steps=steps, **options)
    runs = {
        "fastdit.Sampler": lambda: timed(CLASSES),
        "published loop, eager PyTorch": lambda: published_loop(model, steps, options),
    }
    return digits, f"{chosen['solver']} {len(sampler.plan)} steps", runs, steps


def flow_demo(model: DiT, args: argparse.Namespace) -> tuple[Tensor, str, dict, int]:
    """The same of the model that was trained by flow matching."""
    solver, steps = args.solver or "euler", args.steps or 50
    options = {"cfg_scale": args.cfg_scale, "solver": solver, "seed": args.seed}
    options |= {"transport": transport_of("digits-flow", "flow")}
    digits = sample(model, CLASSES, steps=steps, progress=True, **options)
    short = max(1, steps // 10)

    def run(backend: str) -> None:
        with backends.backend(backend):
            sample(model, CLASSES, steps=short, **options)

    runs = {
        "fastdit": lambda: run("auto"),
        "the same on eager PyTorch": lambda: run("reference"),
    }
    return digits, f"{solver} {steps} steps", runs, short


def record(device: str, steps: int, rates: dict[str, list[float]]) -> dict[str, Any]:
    """The timing as plain data: images per second of both runs, and the ratio of the pairs."""
    ours, eager = rates.values()
    ratios = [a / b for a, b in zip(ours, eager, strict=True)]

    def spread(values: list[float]) -> dict[str, float]:
        return {"median": statistics.median(values), "least": min(values), "most": max(values)}

    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "steps": steps,
        "images_per_second": {"auto": spread(ours), "reference": spread(eager)},
        "ratio": spread(ratios),
    }


def run(args: argparse.Namespace) -> None:
    """Sample, write the picture, print what ran."""
    console = Console()
    flow = args.objective == "flow"
    model = load("digits-flow" if flow else "digits", args.device, "fp32")
    digits, how, runs, steps = (flow_demo if flow else diffusion_demo)(model, args)
    picture = images.grid(
        images.to_uint8(digits), 10, scale=6, row_labels=[str(digit) for digit in range(10)]
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    images.save(picture, args.out)
    console.print(f"wrote {args.out}: {how}")
    console.print(f"timing {args.rounds} rounds of {steps} steps each ...")
    device = next(model.parameters()).device.type
    rates = throughput(runs, args.rounds)
    console.print(report(f"100 digits, {steps} steps with guidance on {device}", rates))
    if args.json is not None:
        text = json.dumps(record(device, steps, rates), indent=1) + "\n"
        atomic_write(args.json, lambda path: path.write_text(text))
