"""The digits model that ships with fastdit, and how good its digits are.

    python -m fastdit.digits                 # recognise 500 samples with guidance, 500 without
    fastdit train --data digits --out DIR    # train the same weights again

A support vector classifier that has only seen the real digits reads the samples. How often it
reads the class that was asked for says whether the model has learnt the classes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastdit.checkpoint_files import atomic_write
from fastdit.data import load_digits
from fastdit.sampling import sample


def weights_path() -> Path:
    """The shipped weights: depth 3, width 96, patch 2, EMA."""
    return Path(__file__).parent / "weights" / "digits.safetensors"


def load_digits_model(device: str = "cpu"):
    """The shipped model, ready to sample."""
    from fastdit.checkpoint import load_model

    return load_model(weights_path(), device=device)


class Reader:
    """A support vector classifier trained on four fifths of the real digits.

    `held_out` is the share of the other fifth that it reads right.
    """

    def __init__(self) -> None:
        from sklearn.model_selection import train_test_split
        from sklearn.svm import SVC

        data = load_digits()
        seen, unseen = train_test_split(
            np.arange(len(data)), test_size=0.2, random_state=0, stratify=data.labels
        )
        self.classifier = SVC(gamma=0.001)
        self.classifier.fit(self._features(data.images[seen]), data.labels[seen].numpy())
        self.held_out = self.accuracy(data.images[unseen], data.labels[unseen])

    @staticmethod
    def _features(images: Tensor) -> np.ndarray:
        """Sixteen greys, as in the data: what the model draws between them is rounded."""
        return ((images.flatten(1).float().cpu() + 1) * 8).round().clamp(0, 16).numpy()

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """The share of `(B, 1, 8, 8)` images in [-1, 1] read as their label."""
        read = self.classifier.predict(self._features(images))
        return float((read == labels.cpu().numpy()).mean())


def recognition(model, cfg_scale: float, count: int = 500, steps: int = 50, seed: int = 0) -> float:
    """The share of `count` samples, equally many of each class, that the reader recognises.

    DDIM with `steps` steps; guidance of the noise prediction only.
    """
    labels = torch.arange(10).repeat_interleave(count // 10)
    drawn = sample(
        model,
        labels,
        steps=steps,
        cfg_scale=cfg_scale,
        solver="ddim",
        seed=seed,
        guided_channels=1,
        clip_denoised=True,
    )
    return Reader().accuracy(drawn, labels)


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ckpt", default=str(weights_path()), help="default: the shipped weights")
    parser.add_argument("--count", type=int, default=500, help="samples (default 500)")
    parser.add_argument("--steps", type=int, default=50, help="DDIM steps (default 50)")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    args = parser.parse_args()
    from fastdit.checkpoint import load_model

    model = load_model(args.ckpt)
    options = {"count": args.count, "steps": args.steps, "seed": args.seed}
    figures = {f"guidance {scale:g}": recognition(model, scale, **options) for scale in (1.0, 2.0)}
    held_out = Reader().held_out
    text = json.dumps({"held_out": held_out, "recognised": figures, **options}, indent=1)
    print(text)
    if args.out is not None:
        atomic_write(args.out, lambda path: path.write_text(text + "\n"))


if __name__ == "__main__":
    main()
