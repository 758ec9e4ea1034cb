"""Sampling end to end, images per second: DDIM with guidance, from the same noise in every column.

    pytest benchmarks/bench_sampling.py --benchmark-only
    python benchmarks/bench_sampling.py [--threads 1] [--subset full] [--only digits]

Eager is the plain model in the published loop; torch.compile compiles that model. diffusers is its
DiT and its DDIMScheduler. Latents are not decoded: the decoder is nobody's here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from harness import models, peers
from harness.op_benchmark import in_order
from harness.problem import DTYPES, EAGER, OURS, Absent, Case, Column, Problem
from harness.running import main, tests
from plain_dit import PlainDiT
from published_steps import Published
from torch import Tensor

import fastdit
from fastdit.digits import load_digits_model

LOOP = "fastdit.sample"
TOLERANCE = {"fp32": 2e-3, "bf16": 3e-1, "fp16": 1e-1}  # after all the steps of a guided run
SIZES = {  # model, images, steps, guidance, subset
    "cpu": [
        ("digits", 100, 20, 2.0, "quick"),
        ("digits", 1, 20, 2.0, "standard"),
        ("S/2", 1, 10, 4.0, "full"),
    ],
    "cuda": [("digits", 100, 20, 2.0, "standard"), ("XL/2", 8, 50, 4.0, "standard")],
}
COMPILED = {"cpu": ("digits",), "cuda": ("digits", "XL/2")}


def problem(name: str, images: int, steps: int, scale: float, dtype: str, device: str) -> Problem:
    if name == "digits":
        model = load_digits_model(device)
    else:
        model = models.random_dit(name, DTYPES[dtype], device)
    plain = PlainDiT(model)
    channels = min(3, model.in_channels)
    diffusion = fastdit.create_diffusion(f"ddim{steps}")
    published = Published(diffusion)
    labels = torch.arange(images, device=device) % model.num_classes
    both = torch.cat([labels, torch.full_like(labels, model.num_classes)])
    parameter = next(model.parameters())
    shape = (images, model.in_channels, *model.input_size)
    start = torch.randn(shape, device=device).to(parameter.dtype)

    def guided(network) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, t: network.forward_with_cfg(x, t, both, scale, channels)

    def eager(network) -> Column:
        def run() -> Tensor:
            z = torch.cat([start, start])
            return published.ddim_loop(guided(network), z)[:images]

        return run

    def loop() -> Tensor:
        z = torch.cat([start, start])
        options = {"y": both, "cfg_scale": scale, "guided_channels": channels}
        out = diffusion.ddim_sample_loop(
            model.forward_with_cfg, z.shape, z, clip_denoised=False, model_kwargs=options
        )
        return out[:images]

    sampler = fastdit.Sampler(model, solver="ddim", diffusion=diffusion, cfg_scale=scale)
    columns: dict[str, Column] = {EAGER: eager(plain)}
    if name in COMPILED[device]:
        fast = PlainDiT(model)
        fast.forward = torch.compile(fast.forward, dynamic=False)
        columns["torch.compile"] = eager(fast)
    columns["diffusers"] = with_diffusers(model, start, both, steps, scale, channels)
    columns[LOOP] = loop
    columns[OURS] = lambda: sampler(labels, noise=start)
    calm = torch.no_grad()
    columns = {k: v if isinstance(v, Absent) else calm(v) for k, v in columns.items()}
    return Problem(in_order(columns), TOLERANCE[dtype], images=images, wall=True)


def with_diffusers(model, start, both, steps: int, scale: float, channels: int) -> Column:
    theirs = peers.diffusers_dit(model)
    if isinstance(theirs, Absent):
        return theirs
    import diffusers

    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(steps, device=start.device)

    def run() -> Tensor:
        x = start
        for t in scheduler.timesteps:
            output = theirs(
                torch.cat([x, x]),
                timestep=t.expand(len(both)),
                class_labels=both,
                return_dict=False,
            )[0]
            epsilon, _variance = output.split(model.in_channels, 1)
            conditional, unconditional = epsilon.chunk(2)
            guided = unconditional + scale * (conditional - unconditional)
            epsilon = torch.cat([guided[:, :channels], conditional[:, channels:]], 1)
            x = scheduler.step(epsilon, t, x, return_dict=False)[0]
        return x

    return run


def cases(device: str) -> list[Case]:
    return [
        Case(
            "sampling",
            "sampling",
            f"{name}, {images} images",
            f"ddim, {steps} steps",
            partial(problem, name, images, steps, scale, dtype, device),
            seconds=10,
            dtype=dtype,
            device=device,
            subset=subset,
            batch=images,
        )
        for name, images, steps, scale, subset in SIZES[device]
        for dtype in ("fp32" if device == "cpu" or name == "digits" else "bf16",)
    ]


test_sampling = tests(cases, LOOP)

if __name__ == "__main__":
    main(cases)
