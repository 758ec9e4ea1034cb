"""Images a second of whole sampling runs: the published eager loop, the same call of fastdit's, and
`fastdit.Sampler`, in turns.

    python benchmarks/bench_sampler.py                # digits and DiT-S/2; 20, 50 and 250 steps
    python benchmarks/bench_sampler.py --model DiT-S/2 --batch 2 --whole 250

Before it times, it checks: they give the same samples from the same draws after 50 steps, and
two runs cut into different batches give the same images. A published loop computes the whole model
in every step, on eager ops; a run is DDIM with guidance. Medians of rounds that take turns. Of the
longest runs of large models (`--whole`) so many steps are timed, one of each loop in turns, and the
run's time is their sum's extension: all steps after the first do the same work.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

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


def published(
    model: DiT, labels: Tensor, steps: int, clip: bool, backend: str = "reference"
) -> Iterator[Tensor]:
    """What the published sample.py calls, the samples after each step: on eager ops with nothing
    computed ahead, or as fastdit runs it."""
    y = torch.cat([labels, model.null_condition(len(labels))])
    channels = min(3, model.in_channels)
    kwargs = {"y": y, "cfg_scale": SCALE, "guided_channels": channels}

    def forward(x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:  # nothing sees through a function
        return model.forward_with_cfg(x, t, **kwargs)

    z = torch.randn(len(labels), model.in_channels, *model.input_size)
    z = torch.cat([z, z])
    diffusion = fastdit.create_diffusion(str(steps))
    call = forward if backend == "reference" else model.forward_with_cfg
    loop = diffusion.ddim_sample_loop_progressive(
        call, z.shape, z, clip_denoised=clip, model_kwargs=kwargs
    )
    while True:
        with fastdit.backend(backend):
            out = next(loop, None)
        if out is None:
            return
        yield out["sample"][: len(labels)]


def sampler(model: DiT, steps: int, clip: bool, chunk: int | None = None) -> fastdit.Sampler:
    options = {"solver": "ddim", "cfg_scale": SCALE, "clip_denoised": clip, "chunk": chunk}
    return fastdit.Sampler(model, steps=steps, **options)


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


def last(states: Iterator[Tensor]) -> Tensor:
    *_, state = states
    return state


def check(model: DiT, labels: Tensor, clip: bool) -> None:
    """Print both deviations, relative to the largest value."""
    torch.manual_seed(1)
    want = last(published(model, labels, 50, clip))
    torch.manual_seed(1)
    loop = last(published(model, labels, 50, clip, "auto"))
    torch.manual_seed(1)
    got = sampler(model, 50, clip)(labels)
    errors = f"Sampler {relative(got, want):.1e}, fastdit's loop {relative(loop, want):.1e}"
    print(f"after 50 steps, against the published loop: {errors}")
    some = labels if len(labels) > 1 else torch.cat([labels, labels])
    whole = sampler(model, 50, clip)(some, seed=1)
    parts = sampler(model, 50, clip, chunk=max(1, len(some) // 3))(some, seed=1)
    print(f"in other batches, same seeds: {relative(parts, whole):.1e}")


def whole_runs(runs: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Seconds of a run of each, one after the other."""
    seconds = {}
    for name, run in runs.items():
        start = time.perf_counter()
        run()
        seconds[name] = time.perf_counter() - start
    return seconds


def some_steps(
    loops: dict[str, Callable[[], Iterator[Any]]], steps: int, timed: int
) -> dict[str, float]:
    """Seconds of a run of `steps`, from its first steps, one of each loop in turns: the first, in
    which conditioning is computed for all, and the others by their mean."""
    running = {name: loop() for name, loop in loops.items()}
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(timed):
        for name, loop in running.items():
            start = time.perf_counter()
            next(loop)
            seconds[name].append(time.perf_counter() - start)
    return {name: s[0] + (steps - 1) * statistics.mean(s[1:]) for name, s in seconds.items()}


def rates(model: DiT, labels: Tensor, steps: int, rounds: int, clip: bool, whole: int) -> None:
    """Print the images a second of all three, and how they were timed."""
    ours = sampler(model, steps, clip)
    found: dict[str, list[float]] = {"published": [], "fastdit's loop": [], "Sampler": []}
    for turn in range(rounds + 1):
        if steps <= whole:
            how = "whole runs"
            seconds = whole_runs(
                {
                    "published": lambda: last(published(model, labels, steps, clip)),
                    "fastdit's loop": lambda: last(published(model, labels, steps, clip, "auto")),
                    "Sampler": lambda: ours(labels),
                }
            )
        else:
            how = f"from {whole} steps each, in turns"
            loops = {
                "published": lambda: published(model, labels, steps, clip),
                "fastdit's loop": lambda: published(model, labels, steps, clip, "auto"),
                "Sampler": lambda: ours.iterate(labels),
            }
            seconds = some_steps(loops, steps, whole)
        for name, value in seconds.items():
            if turn:  # the first warms up
                found[name].append(len(labels) / value)
    base = found.pop("published")
    line = f"{steps:4d} steps: published {statistics.median(base):.3g} images/s"
    for name, values in found.items():
        ratios = [ours / eager for ours, eager in zip(values, base, strict=True)]
        line += f", {name} {statistics.median(values):.3g}, ratio {statistics.median(ratios):.2f} "
        line += f"({min(ratios):.2f} to {max(ratios):.2f})"
    print(f"{line}, {how}", flush=True)


def main() -> None:
    """Check, then time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    models = ["digits", "DiT-S/2"]
    parser.add_argument("--model", nargs="+", default=models, help="digits, or published sizes")
    parser.add_argument("--batch", type=int, help="images at once (default 100 digits, else 1)")
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 50, 250])
    parser.add_argument("--rounds", type=int, default=3, help="default 3, after one to warm up")
    parser.add_argument(
        "--whole",
        type=int,
        help="longest runs timed whole, of longer ones so many steps (default 250 digits, else 50)",
    )
    args = parser.parse_args()
    for name in args.model:
        digits = name == "digits"
        model = load_digits_model() if digits else random_model(name)
        batch, whole = args.batch or (100 if digits else 1), args.whole or (250 if digits else 50)
        labels = torch.arange(batch) % model.num_classes
        print(f"{name}, {batch} at once, {torch.get_num_threads()} threads")
        check(model, labels, digits)
        for steps in args.steps:
            rates(model, labels, steps, args.rounds, digits, max(2, whole))


if __name__ == "__main__":
    main()
