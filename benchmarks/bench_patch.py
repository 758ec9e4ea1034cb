"""Other people's models, patched and not: python benchmarks/bench_patch.py [family ...]

For each family two or more blocks at a width near 1152 (Lumina2: 384), one sample of some 256
tokens, random weights in float32, level "fast":

- the report (`--reports`);
- kernels launched and bytes moved by one forward and by one training step, *modelled*: counted on
  fake CUDA tensors (on meta tensors where PyTorch is built without CUDA; they count the same), one
  ATen op a kernel that reads each input and writes each output once, attention as a GPU runs it,
  an op of fastdit as its Triton kernels;
- the speed of both on this CPU, one thread, over the original's: median and range of the ratios of
  interleaved turns, each taken while nothing else runs on the machine;
- the largest difference of any gradient of a training step, in units in the last place of that
  gradient's largest entry (or of a hundredth of the model's largest gradient).

`--write` puts the table into docs/patching.md.
"""

from __future__ import annotations

import argparse
import copy
import re
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import wide_families
from rich.console import Console
from timing import Patience
from torch import nn
from torch._subclasses import FakeTensorMode
from wide_families import Call, compare

import fastdit
from fastdit import backends
from fastdit.checkpoint_files import atomic_write
from fastdit.ops import _library
from fastdit.testing import count_traffic
from fastdit.testing.fake_cuda import CudaAttention, backward, kernel_costs

DOCS = Path(__file__).parents[1] / "docs" / "patching.md"
TABLE = re.compile(r"(<!-- table: patching -->\n).*?(<!-- end -->)", re.S)
COLUMNS = (
    "family", "sites", "forward: launches", "MB", "CPU", "training step: launches", "MB", "CPU",
    "gradients differ by, ulp",
)  # fmt: skip
Work = Callable[[nn.Module, Call], object]


def forward(model: nn.Module, call: Call) -> None:
    with torch.no_grad():
        call(model)


def loss(model: nn.Module, call: Call) -> torch.Tensor:
    return sum(t.float().square().mean() for t in compare.outputs(model, call))


def training_step(model: nn.Module, call: Call) -> None:
    model.zero_grad(set_to_none=True)
    loss(model, call).backward()


def fake_training_step(model: nn.Module, call: Call) -> None:
    backward(loss(model, call))


def fake_device() -> str:
    """Where kernels are counted; on meta tensors every op that has a kernel for CUDA is one."""
    if torch.backends.cuda.is_built():
        return "cuda"
    for name, definition in _library.DEFINITIONS.items():
        for kernel in backends.kernels_for(name, "cuda"):
            backends.register(
                backends.Kernel(name, "meta", kernel.name, definition.fake, kernel.unsupported)
            )
    return "meta"


def counted(model: nn.Module, call: Call, work: Work) -> tuple[int, float]:
    """Launches, and megabytes."""
    with (
        wide_families.known_lengths(),
        CudaAttention(),
        count_traffic(kernel_costs()) as traffic,
        fastdit.backend("native"),
    ):
        work(model, call)
    return traffic.total_launches, traffic.total_bytes / 1e6


def counts(name: str, device: str) -> list[list[tuple[int, float]]]:
    """Of a forward and of a training step: launches and megabytes before and after."""
    works = (forward, fake_training_step)
    with FakeTensorMode():
        model, call = wide_families.make(name, device)
        before = [counted(model, call, work) for work in works]
        fastdit.patch(model, "fast", verify=False)
        after = [counted(model, call, work) for work in works]
    return [list(pair) for pair in zip(before, after, strict=True)]


def speeds(
    models: tuple[nn.Module, nn.Module], call: Call, work: Work, rounds: int, patience: Patience
) -> list[float]:
    """Time of the original over that of the patched model, turn by turn; both have run before."""
    turns = [partial(work, model, call) for model in models]
    ratios = []
    for index in range(rounds):
        seconds = {
            place: patience.quiet_turn(turns[place], 1) for place in ((0, 1), (1, 0))[index % 2]
        }
        ratios.append(seconds[0] / seconds[1])
    return ratios


def spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"


def measure(
    name: str, device: str, rounds: int, patience: Patience
) -> tuple[list[str], fastdit.patching.Report]:
    """A row of the table, and the report."""
    modelled = counts(name, device)
    model, call = wide_families.make(name, "cpu")
    patched = copy.deepcopy(model)
    report = fastdit.patch(patched, "fast").report()
    _out, gradient = compare.worst(compare.run(patched, call), compare.run(model, call))
    forward(patched, call)  # packs weights
    row = [name, str(len(report.replaced))]
    works = (forward, training_step)
    for ((launches, moved), (fewer, less)), work in zip(modelled, works, strict=True):
        row += [f"{launches} → {fewer}", f"{moved:.0f} → {less:.0f}"]
        found = speeds((model, patched), call, work, rounds, patience)
        row.append(spread(found) if found else "")
    return [*row, f"{gradient:.0f}"], report


def markdown(rows: list[list[str]]) -> str:
    lines = [list(COLUMNS), ["---"] * len(COLUMNS), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write(table: str) -> None:
    text = TABLE.sub(lambda found: found[1] + table + found[2], DOCS.read_text(encoding="utf-8"))
    atomic_write(DOCS, lambda path: path.write_text(text, encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", nargs="*", help="; ".join(wide_families.NAMES))
    parser.add_argument("--rounds", type=int, default=3, help="turns of each; 0 measures no times")
    parser.add_argument(
        "--patience", type=float, default=60, help="seconds to wait for an idle machine, in all"
    )
    parser.add_argument("--reports", action="store_true", help="print every report too")
    parser.add_argument("--write", action="store_true", help="put the table into docs/patching.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device, patience, rows = fake_device(), Patience(options.patience), []
    print(f"torch {torch.__version__}; launches and MB are modelled, on fake {device} tensors")
    for name in options.family or wide_families.NAMES:
        row, report = measure(name, device, options.rounds, patience)
        rows.append(row)
        if options.reports:
            Console(width=150).print(report)
        print(" | ".join(row))
        sys.stdout.flush()
    if patience.disturbed:
        print(f"{patience.disturbed} turns were taken beside other processes")
    if options.write:
        write(markdown(rows))


if __name__ == "__main__":
    main()
