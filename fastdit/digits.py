"""The digits that ship with the package: their data, their weights, and the recognition check.

    python -m fastdit.digits

Scikit-learn's 1,797 handwritten digits are 8×8 with values 0 to 16 (Alpaydin & Kaynak 1998). The
check asks whether samples look like what they were asked to be: a support vector machine trained
on real digits names each sample, and the share that it names as asked is the recognition.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fastdit.checkpoint import load_model
from fastdit.model import DiT
from fastdit.sampling import SOLVERS, sample

if TYPE_CHECKING:
    from sklearn.svm import SVC

LEVELS = 16.0
"""The brightest pixel."""

TARGETS = {2.0: 0.98, 1.0: 0.90}
"""The least recognition that the shipped weights must reach, by guidance."""


def weights_path() -> Path:
    """The shipped weights: the EMA of `fastdit train --data digits`."""
    return Path(__file__).parent / "weights" / "digits.safetensors"


def _bundled() -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the digits come with scikit-learn: pip install 'fastdit[train]'"
        ) from error
    found = load_digits()
    return found.images.astype(np.float32), found.target.astype(np.int64)


def load() -> tuple[np.ndarray, np.ndarray]:
    """The real digits: float32 `(1797, 1, 8, 8)` in [−1, 1], and their labels, int64 `(1797,)`.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    images, labels = _bundled()
    return images[:, None] / (LEVELS / 2) - 1, labels


def recogniser() -> tuple[SVC, float]:
    """A support vector machine trained on four fifths of the real digits, and its accuracy on the
    rest, which it has not seen."""
    images, labels = _bundled()
    from sklearn.model_selection import train_test_split
    from sklearn.svm import SVC

    split = train_test_split(
        images.reshape(-1, 64), labels, test_size=0.2, random_state=0, stratify=labels
    )
    seen, unseen, seen_labels, unseen_labels = split
    machine = SVC(C=10, gamma=0.001).fit(seen, seen_labels)
    return machine, float(machine.score(unseen, unseen_labels))


def recognised(machine: SVC, samples: Tensor, labels: Sequence[int]) -> float:
    """The share of samples that the machine names as their label.

    Args:
        machine: of `recogniser`.
        samples: `(B, 1, 8, 8)`; values outside [−1, 1] are clamped.
        labels: B digits.
    """
    pixels = (samples.float().clamp(-1, 1) + 1) * (LEVELS / 2)
    named = machine.predict(pixels.reshape(len(pixels), -1).cpu().numpy())
    return float((named == np.asarray(labels)).mean())


def recognition(
    model: DiT,
    machine: SVC,
    *,
    cfg_scale: float,
    per_class: int = 50,
    steps: int = 50,
    solver: str = "ddim",
    seed: int = 0,
    progress: bool = False,
) -> float:
    """The recognition of `per_class` samples of each digit; the arguments are `fastdit.sample`'s.

    The model has one channel, and that is the one that is guided.
    """
    labels = [digit for digit in range(10) for _ in range(per_class)]
    samples = sample(
        model,
        labels,
        steps=steps,
        cfg_scale=cfg_scale,
        solver=solver,
        seed=seed,
        guided_channels=model.in_channels,
        clip_denoised=True,
        progress=progress,
    )
    return recognised(machine, samples, labels)


def main(argv: Sequence[str] | None = None) -> None:
    """Check the shipped weights, or others; the exit status is 1 if they miss a target."""
    parser = argparse.ArgumentParser(
        prog="python -m fastdit.digits", description="check that sampled digits are recognised"
    )
    add = parser.add_argument
    add("--ckpt", type=Path, default=weights_path(), help="default: the shipped weights")
    add("--per-class", type=int, default=50, help="samples of each digit (default 50)")
    add("--steps", type=int, default=50, help="denoising steps (default 50)")
    add("--solver", choices=SOLVERS, default="ddim", help="default ddim")
    add("--seed", type=int, default=0, help="default 0")
    add("--json", type=Path, help="write the figures to this file as well")
    args = parser.parse_args(argv)
    model = load_model(args.ckpt)
    machine, held_out = recogniser()
    options = {name: getattr(args, name) for name in ("per_class", "steps", "solver", "seed")}
    figures = {
        str(scale): recognition(model, machine, cfg_scale=scale, progress=True, **options)
        for scale in TARGETS
    }
    count = 10 * args.per_class
    print(f"the recogniser names {held_out:.1%} of unseen real digits")
    for scale, target in TARGETS.items():
        print(f"guidance {scale:g}: {figures[str(scale)]:.1%} of {count}, at least {target:.0%}")
    if args.json:
        result = {"samples": count, **options, "held_out": held_out, "recognised": figures}
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if any(figures[str(scale)] < target for scale, target in TARGETS.items()):
        raise SystemExit(1)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
