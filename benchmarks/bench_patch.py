"""Other people's models, patched and not: python benchmarks/bench_patch.py [family ...]

For each family two or more blocks at a width near 1152 (Lumina2: 384), random weights:

- the report (`--reports`);
- kernels launched and bytes moved by one forward and by one training step, *modelled*: counted on
  meta tensors, one ATen op or one op of fastdit a kernel, each input read and each output written
  once, as on a GPU;
- the time of both on this CPU, one thread's process CPU time, original over patched, the median of
  interleaved rounds;
- the largest difference of any gradient of a training step, in units in the last place of that
  gradient's largest entry (or of a hundredth of the model's largest gradient).
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fastdit
from fastdit import backends
from fastdit.ops import _library
from fastdit.testing import count_traffic

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "patching"))
import compare
import families
import research

Call = Callable[[nn.Module], Any]

WIDE = {
    "DiT": {"num_attention_heads": 16, "attention_head_dim": 72, "sample_size": 32},
    "PixArt-alpha": {
        "num_attention_heads": 16, "attention_head_dim": 72, "sample_size": 32,
        "cross_attention_dim": 1152,
    },
    "PixArt-Sigma": {
        "num_attention_heads": 16, "attention_head_dim": 72, "sample_size": 32,
        "cross_attention_dim": 1152,
    },
    "Latte": {
        "num_attention_heads": 16, "attention_head_dim": 72, "sample_size": 16,
        "cross_attention_dim": 1152,
    },
    "SD3": {
        "num_attention_heads": 18, "attention_head_dim": 64, "sample_size": 32,
        "caption_projection_dim": 1152, "pos_embed_max_size": 32,
    },
    "SD3.5": {
        "num_attention_heads": 18, "attention_head_dim": 64, "sample_size": 32,
        "caption_projection_dim": 1152, "pos_embed_max_size": 32,
    },
    "Flux": {
        "num_attention_heads": 9, "attention_head_dim": 128, "axes_dims_rope": (16, 56, 56),
    },
    "HunyuanDiT": {
        "num_attention_heads": 16, "attention_head_dim": 88, "hidden_size": 1408,
        "sample_size": 32,
    },
    "Sana": {
        "num_attention_heads": 36, "attention_head_dim": 32, "num_cross_attention_heads": 9,
        "cross_attention_head_dim": 128, "cross_attention_dim": 1152, "sample_size": 16,
    },
    "CogVideoX": {"num_attention_heads": 18, "attention_head_dim": 64},
    "Wan": {"num_attention_heads": 9, "attention_head_dim": 128, "ffn_dim": 4608},
    "Wan 2.2": {"num_attention_heads": 9, "attention_head_dim": 128, "ffn_dim": 4608},
    "Lumina2": {
        "hidden_size": 384, "num_attention_heads": 4, "num_kv_heads": 2,
        "axes_dim_rope": (32, 32, 32), "multiple_of": 256,
    },
    "AuraFlow": {
        "num_attention_heads": 9, "attention_head_dim": 128, "caption_projection_dim": 1152,
        "sample_size": 32, "pos_embed_max_size": 256,
    },
}  # fmt: skip
"""What makes a tiny model of tests/patching/families.py wide."""
IMAGES = {
    "DiT": (2, 4, 32, 32), "PixArt-alpha": (2, 4, 32, 32), "PixArt-Sigma": (2, 4, 32, 32),
    "Latte": (2, 4, 2, 16, 16), "SD3": (2, 4, 32, 32), "SD3.5": (2, 4, 32, 32),
    "HunyuanDiT": (2, 4, 32, 32), "Sana": (2, 4, 16, 16), "CogVideoX": (2, 2, 4, 8, 8),
    "Wan": (2, 4, 2, 16, 16), "Wan 2.2": (2, 4, 2, 4, 4), "Lumina2": (2, 4, 16, 16),
    "AuraFlow": (2, 4, 32, 32),
}  # fmt: skip
REAL_VALUES = ("Lumina2",)
"""Families whose forward reads lengths from a mask: counted on the CPU."""


def _wide(name: str, device: str) -> tuple[nn.Module, Call]:
    """A family's model and a call of it, on a device."""
    import diffusers

    class_name, settings = families.FAMILIES[name]
    config, inputs = settings()
    if name in IMAGES:
        inputs["hidden_states"] = torch.randn(IMAGES[name])
    if name == "Flux":
        inputs["hidden_states"], inputs["img_ids"] = torch.randn(2, 256, 4), torch.rand(256, 3)
    if name == "HunyuanDiT":
        inputs["image_rotary_emb"] = [torch.ones(256, 88), torch.zeros(256, 88)]
    with torch.device(device):
        model = getattr(diffusers, class_name)(**{**config, **WIDE[name]})
    return model, lambda m: families._call(m, **_moved(inputs, device))


def _moved(inputs: dict[str, Any], device: str) -> dict[str, Any]:
    return torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to(device), inputs)


def _research(name: str, device: str) -> tuple[nn.Module, Call]:
    with torch.device(device):
        make = research.FAMILIES[name]
        model = make(input_size=32, hidden_size=1152, num_heads=16, num_classes=10)
    args = [t.to(device) for t in research.inputs(model)]
    return model, lambda m: m(*args)


def make(name: str, device: str) -> tuple[nn.Module, Call]:
    """A family by its name here: diffusers' have "diffusers" in front."""
    if name.startswith("diffusers "):
        model, call = _wide(name.removeprefix("diffusers "), device)
        equalise(model)
    else:
        model, call = _research(name, device)
    return (model if device == "meta" else compare.randomise(model)).eval(), call


def equalise(model: nn.Module) -> None:
    """DiT's embedders as every converted checkpoint has them: equal in all blocks."""
    blocks = getattr(model, "transformer_blocks", [])
    if blocks and getattr(getattr(blocks[0], "norm1", None), "emb", None) is not None:
        for block in blocks[1:]:
            block.norm1.emb.load_state_dict(blocks[0].norm1.emb.state_dict(), assign=False)


def count_on_meta() -> None:
    """Let every op be one kernel on meta tensors, as it is on a GPU."""
    for op in backends.OPS:
        for name in (op, f"{op}_backward"):
            fake = _library.DEFINITIONS[name].fake
            backends.register(backends.Kernel(name, "meta", "counted", fake))


def forward(model: nn.Module, call: Call) -> None:
    with torch.no_grad():
        call(model)


def training_step(model: nn.Module, call: Call) -> None:
    model.zero_grad(set_to_none=True)
    sum(t.float().square().mean() for t in compare.outputs(model, call)).backward()


def counted(model: nn.Module, call: Call, work: Callable[..., None]) -> tuple[int, float]:
    """Launches, and megabytes."""
    with count_traffic() as traffic:
        work(model, call)
    return traffic.total_launches, traffic.total_bytes / 1e6


def ratio(model: nn.Module, call: Call, work: Callable[..., None], rounds: int) -> float:
    """CPU time of the original over that of the patched model."""
    patched = copy.deepcopy(model)
    fastdit.patch(patched, "fast")
    for m in (model, patched):
        work(m, call)
    ratios = []
    for _ in range(rounds):
        times = []
        for m in (model, patched):
            start = time.process_time()
            work(m, call)
            times.append(time.process_time() - start)
        ratios.append(times[0] / times[1])
    return statistics.median(ratios)


def measure(name: str, rounds: int) -> tuple[list[str], fastdit.patching.Report]:
    """A row of the table, and the report."""
    count_device = "cpu" if name.removeprefix("diffusers ") in REAL_VALUES else "meta"
    model, call = make(name, count_device)
    counts = [counted(model, call, work) for work in (forward, training_step)]
    handle = fastdit.patch(model, "fast", verify=count_device == "cpu")
    with backends.backend("native" if count_device == "cpu" else "auto"):
        fused = [counted(model, call, work) for work in (forward, training_step)]
    model, call = make(name, "cpu")
    report = fastdit.patch(copy.deepcopy(model), "fast").report()
    theirs = compare.run(model, call)
    with fastdit.patched(model, "fast"):
        _out, gradient = compare.worst(compare.run(model, call), theirs)
    works = (forward, training_step) if rounds else ()
    times = [f"{ratio(model, call, work, rounds):.2f}" for work in works] or ["", ""]
    row = [name, str(len(handle.report().replaced))]
    for (launches, moved), (fewer, less) in zip(counts, fused, strict=True):
        row += [f"{launches} → {fewer}", f"{moved:.0f} → {less:.0f}"]
    return [*row, *times, f"{gradient:.0f}"], report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [*research.FAMILIES, *(f"diffusers {name}" for name in families.FAMILIES)]
    parser.add_argument("family", nargs="*", help="; ".join(names))
    parser.add_argument("--rounds", type=int, default=5, help="0 measures no times")
    parser.add_argument("--reports", action="store_true", help="print every report too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    count_on_meta()
    console = Console(width=150)
    table = Table(title="Patched at level 'fast'; float32, batch 2", title_justify="left")
    columns = ("family", "sites", "forward: launches", "MB", "training step: launches", "MB")
    for column in (*columns, "forward CPU", "step CPU", "gradients, ulp"):
        table.add_column(column, justify="left" if column == "family" else "right")
    for name in options.family or names:
        row, report = measure(name, options.rounds)
        table.add_row(*row)
        console.print(report if options.reports else " | ".join(row))
        sys.stdout.flush()
    console.print(table)
    print("launches and MB are modelled; CPU columns: time of the original over the patched one's")


if __name__ == "__main__":
    main()
