"""The two digits models that ship with fastdit, and how good their digits are.

    python -m fastdit.digits                     # recognise 500 samples with guidance, 500 without
    python -m fastdit.digits --objective flow    # the same of the flow model
    fastdit train --data digits --out DIR        # train the same weights again
    fastdit train --data digits --objective flow --out DIR

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
from fastdit.flow import Transport, load_transport
from fastdit.sampling import sample

WEIGHTS = {"diffusion": "digits.safetensors", "flow": "digits_flow.safetensors"}


def weights_path(objective: str = "diffusion") -> Path:
    """The shipped weights of the diffusion or the flow: depth 3, width 96, patch 2, EMA."""
    return Path(__file__).parent / "weights" / WEIGHTS[objective]


def load_digits_model(device: str = "cpu", objective: str = "diffusion"):
    """The shipped model, ready to sample. `fastdit.flow.load_transport(weights_path("flow"))` is
    what the flow model was trained with."""
    from fastdit.checkpoint import load_model

    return load_model(weights_path(objective), device=device)


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


def recognition(
    model,
    cfg_scale: float,
    count: int = 500,
    steps: int = 50,
    seed: int = 0,
    transport: Transport | None = None,
    solver: str | None = None,
) -> float:
    """The share of `count` samples, equally many of each class, that the reader recognises.

    `solver` with `steps` steps: DDIM, or with a flow's transport Heun. Guides the noise or the
    velocity only.
    """
    labels = torch.arange(10).repeat_interleave(count // 10)
    drawn = sample(
        model,
        labels,
        steps=steps,
        cfg_scale=cfg_scale,
        solver=solver or ("ddim" if transport is None else "heun"),
        seed=seed,
        guided_channels=1,
        clip_denoised=transport is None,
        transport=transport,
    )
    return Reader().accuracy(drawn, labels)


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--objective", choices=WEIGHTS, default="diffusion", help="shipped weights")
    parser.add_argument("--ckpt", help="other weights; a flow's file says that it is one")
    parser.add_argument("--count", type=int, default=500, help="samples (default 500)")
    parser.add_argument("--steps", type=int, default=50, help="solver steps (default 50)")
    parser.add_argument("--solver", help="default ddim, of a flow heun")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    args = parser.parse_args()
    from fastdit.checkpoint import load_model

    ckpt = args.ckpt or weights_path(args.objective)
    model, transport = load_model(ckpt), load_transport(ckpt)
    options = {"count": args.count, "steps": args.steps, "seed": args.seed, "solver": args.solver}
    given = options | {"transport": transport}
    figures = {f"guidance {scale:g}": recognition(model, scale, **given) for scale in (1.0, 2.0)}
    held_out = Reader().held_out
    text = json.dumps({"held_out": held_out, "recognised": figures, **options}, indent=1)
    print(text)
    if args.out is not None:
        atomic_write(args.out, lambda path: path.write_text(text + "\n"))


if __name__ == "__main__":
    main()
