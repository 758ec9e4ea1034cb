"""The paper's four conditioning designs, trained side by side on the digits.

    python -m fastdit.gallery --minutes 2 --out docs

Each design has the same data in the same order, the same noise, timesteps and dropped labels, and
the same time: as many steps as minutes of CPU time hold, by the speed of its first ones. Other work
on the machine does not lengthen CPU time. The learning rate falls to 0 over the steps.

Writes `gallery.png`, a guided sample of each class from each design's average, and
`gallery_loss.png`, the running means of their losses; prints steps, parameters, and the share of
guided samples that the reader recognises (`fastdit.digits`).
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from fastdit import images
from fastdit.checkpoint_files import atomic_write
from fastdit.commands.train import DIGITS
from fastdit.digits import recognition
from fastdit.sampling import sample
from fastdit.trainer import TrainConfig, Trainer

DESIGNS = {
    "adaLN-Zero": "adaln_zero",
    "cross-attention": "cross_attention",
    "adaLN": "adaln",
    "in-context": "in_context",
}
WINDOW, SAMPLING_STEPS = 100, 50
SMALL = {"hidden_size": 64, "batch_size": 32, "lr": 2e-3, "ema": 0.99}
"""What a run of minutes changes of the digits' recipe."""


@dataclass(frozen=True)
class Entry:
    """A design's run: its name, the trainer at the end, and the CPU seconds that it took."""

    name: str
    trainer: Trainer
    seconds: float


def trainer_of(name: str, steps: int, seed: int = 0) -> Trainer:
    """A design's run of so many steps, its draws those of every other design's."""
    recipe = {**DIGITS, **SMALL, "steps": steps, "seed": seed}
    design = {"conditioning": DESIGNS[name]}
    trainer = Trainer(TrainConfig(data="digits", out="", design=design, **recipe))
    torch.manual_seed(seed)  # the designs' initialisations have drawn differently much
    return trainer


def steps_within(name: str, seconds: float) -> int:
    """How many steps CPU seconds hold, by the speed of a few; at least one."""
    trainer = trainer_of(name, 25)
    for _ in range(5):
        trainer.step()
    start = time.process_time()
    for _ in range(20):
        trainer.step()
    return max(1, round(20 * seconds / (time.process_time() - start)))


def train_design(name: str, seconds: float, steps: int | None) -> Entry:
    """Train for `steps`, or for as many as the CPU seconds hold."""
    trainer = trainer_of(name, steps_within(name, seconds) if steps is None else steps)
    start = time.process_time()
    while trainer.steps_done < trainer.config.steps:
        trainer.step()
    return Entry(name, trainer, time.process_time() - start)


def pictures(entries: list[Entry], columns: int = 10):
    """A row for each design: one guided sample of each class, from the same noise."""
    drawn = [
        sample(
            entry.trainer.average,
            list(range(columns)),
            steps=SAMPLING_STEPS,
            solver="ddim",
            cfg_scale=2.0,
            seed=3,
            clip_denoised=True,
        )
        for entry in entries
    ]
    return images.grid(
        images.to_uint8(torch.cat(drawn)),
        columns,
        scale=6,
        row_labels=[entry.name for entry in entries],
        column_labels=[str(label) for label in range(columns)],
    )


def running_mean(losses: list[float]) -> np.ndarray:
    """Of the last `WINDOW` losses, from the first step with as many."""
    window = min(WINDOW, len(losses))
    return np.convolve(losses, np.ones(window) / window, mode="valid")


def loss_figure(entries: list[Entry]):
    """The running means over the steps, as a matplotlib figure."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for entry in entries:
        mean = running_mean(entry.trainer.losses)
        steps = np.arange(len(mean)) + entry.trainer.steps_done - len(mean) + 1
        axes.plot(steps, mean, label=f"{entry.name}, {entry.trainer.steps_done} steps", lw=1.4)
    axes.set(xlabel="step", ylabel=f"loss, mean of {WINDOW} steps", yscale="log")
    axes.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%.2f"))
    axes.yaxis.set_minor_formatter(matplotlib.ticker.FormatStrFormatter("%.2f"))
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return figure


def table(entries: list[Entry], count: int) -> Table:
    """What the pictures do not say."""
    columns = ("design", "parameters", "steps", "CPU s", "last loss", "recognised")
    out = Table(*columns)
    for entry in entries:
        model = entry.trainer.average
        size = sum(p.numel() for p in model.parameters())
        loss = running_mean(entry.trainer.losses)[-1]
        share = recognition(model, cfg_scale=2.0, count=count, steps=SAMPLING_STEPS)
        numbers = (f"{size:,}", str(entry.trainer.steps_done), f"{entry.seconds:.0f}")
        out.add_row(entry.name, *numbers, f"{loss:.4f}", f"{share:.1%}")
    return out


def main(argv: list[str] | None = None) -> None:
    """Train the four, draw, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--minutes", type=float, default=2.0, help="of CPU, each (default 2)")
    parser.add_argument("--steps", type=int, help="as many for each, instead of minutes")
    parser.add_argument("--count", type=int, default=500, help="samples to recognise (default 500)")
    parser.add_argument("--out", type=Path, default=Path(), help="folder of the two pictures")
    args = parser.parse_args(argv)
    if not args.minutes > 0 or (args.steps is not None and args.steps < 1):
        parser.error("--minutes and --steps: allowed are numbers > 0")
    torch.set_num_threads(1)  # CPU time is then the time that a machine to itself would take
    entries = [train_design(name, 60 * args.minutes, args.steps) for name in DESIGNS]
    picture, figure = pictures(entries), loss_figure(entries)
    images.save(picture, args.out / "gallery.png")
    atomic_write(
        args.out / "gallery_loss.png", lambda path: figure.savefig(path, format="png", dpi=120)
    )
    Console().print(table(entries, args.count))


if __name__ == "__main__":
    main()
