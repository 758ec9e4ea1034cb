"""`fastdit profile`: where the time of a sampling run goes.

A model of the published sizes with random weights, or a checkpoint, sampled a few steps under
torch.profiler. Times are the profiler's, which itself slows small ops: read the shares, and time
runs with `fastdit bench`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from fastdit import backends
from fastdit.commands.sample import DTYPES, load
from fastdit.model import DiT, DiT_models
from fastdit.profiling import CATEGORIES, Profile, profile
from fastdit.sampler import DIFFUSION_SOLVERS, Sampler

SUMMARY = "tell where the time of a sampling run goes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add = parser.add_argument
    add("--model", choices=DiT_models, default="DiT-S/2", help="random weights; default DiT-S/2")
    add("--ckpt", help="a checkpoint instead; 'digits' is the shipped model")
    add("--batch-size", type=int, default=1, help="samples (default 1)")
    add("--steps", type=int, default=5, help="denoising steps (default 5)")
    add("--solver", choices=DIFFUSION_SOLVERS, default="ddpm", help="default ddpm")
    add("--cfg-scale", type=float, default=4.0, help="guidance, 1 is none (default 4)")
    add("--native", action=argparse.BooleanOptionalAction, help="default: where it can run")
    add("--quantize", help="see fastdit.NativeForward (default: none)")
    add("--graph", action=argparse.BooleanOptionalAction, help="default: on a GPU")
    add("--device", default=None, help="default: the accelerator, else the CPU")
    add("--dtype", choices=DTYPES, default="fp32", help="default fp32")
    add("--trace", type=Path, default=Path("fastdit-trace.json"), help="Chrome trace to write")


def model_of(args: argparse.Namespace) -> DiT:
    """The checkpoint's model, or one of the size with random weights."""
    if args.ckpt is not None:
        return load(args.ckpt, args.device, args.dtype)
    device = args.device or backends.devices()[-1]
    with torch.device(device):
        model = DiT_models[args.model]()
    return model.to(DTYPES[args.dtype]).eval()


def report(found: Profile) -> Table:
    """Milliseconds, share and ops a step."""
    table = Table(title="a step", title_justify="left")
    table.add_column("spent on")
    for column in ("ms", "share", "ops"):
        table.add_column(column, justify="right")
    for name in CATEGORIES:
        seconds, calls = found.seconds.get(name, 0.0), found.calls.get(name, 0)
        if seconds or calls:
            share = f"{100 * seconds / found.wall:.1f} %"
            milliseconds = f"{1e3 * seconds / found.steps:.3f}"
            table.add_row(name, milliseconds, share, f"{calls / found.steps:.1f}")
    whole = f"{1e3 * found.wall / found.steps:.3f}"
    table.add_row("all", whole, "100 %", f"{found.launches:.1f}")
    return table


def run(args: argparse.Namespace) -> None:
    """Profile, print the table, write the trace."""
    console = Console()
    model = model_of(args)
    sampler = Sampler(
        model,
        solver=args.solver,
        steps=args.steps,
        cfg_scale=args.cfg_scale,
        native=args.native,
        quantize=args.quantize,
        graph=args.graph,
    )
    classes = [i % model.num_classes for i in range(args.batch_size)]
    show(console, profile(sampler, classes, args.trace), args.trace)


def show(console: Console, found: Profile, trace: Path) -> None:
    """Print what was found."""
    console.print(report(found))
    console.print(
        f"{found.achieved / 1e9:.1f} GFLOP/s of {found.peak / 1e9:.1f} that the largest matrix "
        f"product reached here: {100 * found.achieved / found.peak:.0f} %"
    )
    console.print(f"wrote {trace}")
