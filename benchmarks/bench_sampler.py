"""Images a second of whole sampling runs: the published eager loop and `fastdit.Sampler`, in turns.

    python benchmarks/bench_sampler.py                      # the digits model, 20, 50, 250 steps
    python benchmarks/bench_sampler.py --model DiT-S/2 --batch 2 --rounds 3

Before it times, it checks: the two give the same samples from the same draws after 50 steps, and
two runs cut into different batches give the same images. A published loop computes the whole model
in every step, on eager ops; a run is DDIM with guidance. Medians of rounds that take turns.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor

import fastdit
from fastdit.digits import load_digits_model
from fastdit.model import DiT

SCALE = 2.0


def random_model(name: str) -> DiT:
    """A published size, none of whose weights is zero."""
    torch.manual_seed(0)
    model = fastdit.DiT_models[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.normal_(std=0.02)
    return model


def published(model: DiT, labels: Tensor, steps: int, clip: bool) -> Tensor:
    """The published sample.py, on eager ops."""
    y = torch.cat([labels, model.null_condition(len(labels))])
    channels = min(3, model.in_channels)

    def forward(x: Tensor, t: Tensor) -> Tensor:  # a function: nothing is computed ahead
        return model.forward_with_cfg(x, t, y, SCALE, channels)

    z = torch.randn(len(labels), model.in_channels, *model.input_size)
    z = torch.cat([z, z])
    diffusion = fastdit.create_diffusion(str(steps))
    with fastdit.backend("reference"):
        out = diffusion.ddim_sample_loop(forward, z.shape, z, clip_denoised=clip)
    return out[: len(labels)]


def sampler(model: DiT, steps: int, clip: bool, chunk: int | None = None) -> fastdit.Sampler:
    options = {"solver": "ddim", "cfg_scale": SCALE, "clip_denoised": clip, "chunk": chunk}
    return fastdit.Sampler(model, steps=steps, **options)


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


def check(model: DiT, labels: Tensor, clip: bool) -> None:
    """Print both deviations, relative to the largest value."""
    torch.manual_seed(1)
    want = published(model, labels, 50, clip)
    torch.manual_seed(1)
    got = sampler(model, 50, clip)(labels)
    print(f"after 50 steps, against the published loop: {relative(got, want):.1e}")
    whole = sampler(model, 50, clip)(labels, seed=1)
    parts = sampler(model, 50, clip, chunk=max(1, len(labels) // 3))(labels, seed=1)
    print(f"in other batches, same seeds: {relative(parts, whole):.1e}")


def rates(model: DiT, labels: Tensor, steps: int, rounds: int, clip: bool) -> None:
    """Print the images a second of both."""
    ours = sampler(model, steps, clip)
    runs = {
        "published": lambda: published(model, labels, steps, clip),
        "Sampler": lambda: ours(labels),
    }
    found: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn:
                found[name].append(len(labels) / (time.perf_counter() - start))
    ratios = [b / a for a, b in zip(*found.values(), strict=True)]
    medians = {name: statistics.median(values) for name, values in found.items()}
    print(
        f"{steps:4d} steps: published {medians['published']:.3g} images/s, Sampler "
        f"{medians['Sampler']:.3g}, ratio {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f})",
        flush=True,
    )


def main() -> None:
    """Check, then time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="digits", help="digits (default) or a published size")
    parser.add_argument("--batch", type=int, default=100, help="images at once (default 100)")
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 50, 250])
    parser.add_argument("--rounds", type=int, default=3, help="default 3")
    args = parser.parse_args()
    digits = args.model == "digits"
    model = load_digits_model() if digits else random_model(args.model)
    labels = torch.arange(args.batch) % model.num_classes
    print(f"{args.model}, {args.batch} images at once, {torch.get_num_threads()} threads")
    check(model, labels, digits)
    for steps in args.steps:
        rates(model, labels, steps, args.rounds, digits)


if __name__ == "__main__":
    main()
