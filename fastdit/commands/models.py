"""`fastdit models`: parameters and multiply-adds of every size and design, beside the paper's.

Parameters are the trainable ones of a class-conditional model of 32x32 latents; the paper calls
multiply-adds "Gflops" (Peebles & Xie 2022, tables 1 and 4, and the appendix). Nothing is allocated.
"""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from rich.table import Table

from fastdit.designs import MODULATIONS, presets
from fastdit.model import DiT_models

SUMMARY = "tell parameters and Gflops of every model, beside the paper's"

PAPER_SIZES = {
    "S": (33, {8: 0.36, 4: 1.41, 2: 6.06}),
    "B": (130, {8: 1.42, 4: 5.56, 2: 23.01}),
    "L": (458, {8: 5.01, 4: 19.70, 2: 80.71}),
    "XL": (675, {8: 7.39, 4: 29.05, 2: 118.64}),
}
"""Millions of parameters, and Gflops by patch size."""

PAPER_DESIGNS = {
    "in_context": (449, 119.37),
    "cross_attention": (598, 137.62),
    "adaln": (600, 118.56),
    "adaln_zero": (675, 118.64),
}
"""Millions of parameters and Gflops of DiT-XL/2."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument(
        "--input-size", type=int, default=32, help="side of the latents (default 32)"
    )


def figures(name: str, **options) -> tuple[float, float]:
    """Millions of trainable parameters and Gflops of a model of `DiT_models`."""
    with torch.device("meta"):
        model = DiT_models[name](**options)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return count / 1e6, model.flops() / 1e9


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("model")
    for column in ("parameters, M", "paper", "Gflops", "paper"):
        table.add_column(column, justify="right")
    return table


def sizes_table(size: int) -> Table:
    """The twelve published models; the paper's Gflops are of 32x32 latents."""
    table = _table(f"Published models, {size}x{size} latents")
    for letter, (millions, gflops) in PAPER_SIZES.items():
        for patch, paper in gflops.items():
            name = f"DiT-{letter}/{patch}"
            found = figures(name, input_size=size)
            known = f"{paper:.2f}" if size == 32 else ""
            table.add_row(name, f"{found[0]:.1f}", str(millions), f"{found[1]:.2f}", known)
    return table


def designs_table(size: int) -> Table:
    """DiT-XL/2 in every form of conditioning and every preset."""
    table = _table(f"Designs of DiT-XL/2, {size}x{size} latents")
    rows = {name: {"conditioning": name} for name in reversed(MODULATIONS)}
    rows |= {f"preset {name}": options for name, options in presets.items() if options}
    for name, options in rows.items():
        found = figures("DiT-XL/2", input_size=size, **options)
        millions, paper = PAPER_DESIGNS.get(name, ("", None))
        known = f"{paper:.2f}" if paper and size == 32 else ""
        table.add_row(name, f"{found[0]:.1f}", str(millions), f"{found[1]:.2f}", known)
    return table


def run(args: argparse.Namespace) -> None:
    """Print both tables."""
    console = Console()
    console.print(sizes_table(args.input_size))
    console.print(designs_table(args.input_size))
