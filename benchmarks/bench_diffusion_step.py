"""One step of a sampler: the published arithmetic in eager PyTorch against diffusion_step.

    pytest benchmarks/bench_diffusion_step.py --benchmark-only
    python benchmarks/bench_diffusion_step.py [--threads 1] [--subset full] [--only ddim]

"ddpm, noise given" and "ddim" are the same numbers in every column. Under "ddpm" each column draws
its own noise, so only their cost is compared; torch's generator alone is the floor of whoever draws
from it.
"""

from __future__ import annotations

from functools import partial

import torch
from harness import peers
from harness.op_benchmark import copy
from harness.problem import COPY, EAGER, OURS, Case, Column, Problem, absent
from harness.running import main, tests
from published_steps import Published

import fastdit
from fastdit.diffusion import tables
from fastdit.ops import diffusion_step

SHAPES = {
    "1x4x32x32": "quick",
    "8x4x32x32": "standard",
    "64x4x32x32": "standard",
    "1x3x256x256": "standard",
}
SOLVERS = ("ddpm, noise given", "ddpm", "ddim")
STEP = 500
SEEDED, ROWS, RANDN = "fastdit, seed", "fastdit, seed, token rows", "randn alone"


def problem(shape: str, solver: str, device: str) -> Problem:
    size = tuple(map(int, shape.split("x")))
    batch, channels, height, width = size
    diffusion = fastdit.create_diffusion("")
    published = Published(diffusion)
    if solver == "ddim":
        table = tables.ddim(diffusion, diffusion.model_mean_type, 0.0)
    else:
        table = tables.ddpm(diffusion, diffusion.model_mean_type, diffusion.model_var_type)
    table = torch.as_tensor(table, dtype=torch.float32, device=device)
    x, noise = (torch.randn(size, device=device) for _ in range(2))
    output = torch.randn(batch, 2 * channels, height, width, device=device)
    t = torch.full((batch,), STEP, device=device)
    options = {"learned_range": True} | ({} if solver == "ddim" else {"clip": 1.0})
    passes = {"ddpm, noise given": 5, "ddpm": 4, "ddim": 3}[solver]  # x, eps, v, noise, x'
    columns: dict[str, Column]
    unchecked: tuple[str, ...] = (COPY, RANDN)
    if solver == "ddim":
        columns = {
            EAGER: lambda: published.ddim(x, output, t),
            "diffusers": schedulers_step(solver, x, output),
            OURS: lambda: diffusion_step(x, output, table, t, **options)[0],
        }
    elif solver == "ddpm":
        unchecked = (COPY, RANDN, "diffusers", OURS, SEEDED, ROWS)
        seed = torch.tensor(1, device=device)
        rows = torch.randn(batch, height * width // 4, 8 * channels, device=device)
        columns = {
            EAGER: lambda: published.ddpm(x, output, t, None),
            "diffusers": schedulers_step(solver, x, output),
            OURS: lambda: diffusion_step(x, output, table, t, noise=torch.randn_like(x), **options)[
                0
            ],
            SEEDED: lambda: diffusion_step(x, output, table, t, seed=seed, **options)[0],
            ROWS: lambda: diffusion_step(x, rows, table, t, seed=seed, patch=(2, 2), **options)[0],
            RANDN: lambda: torch.randn_like(x),
        }
    else:
        columns = {EAGER: lambda: published.ddpm(x, output, t, noise)}
        if shape == "1x4x32x32" or device == "cuda":
            columns |= peers.compile_columns(published.ddpm, x, output, t, noise, device=device)
        columns[OURS] = lambda: diffusion_step(x, output, table, t, noise=noise, **options)[0]
    moved = passes * x.numel() * x.element_size()
    columns[COPY] = copy(moved, device)
    return Problem(columns, 1e-4, bytes=moved, unchecked=unchecked)


def schedulers_step(solver: str, x, output) -> Column:
    """diffusers' scheduler, set up for the same step."""
    if missing := absent("diffusers"):
        return missing
    import diffusers

    if solver == "ddim":
        scheduler = diffusers.DDIMScheduler(clip_sample=False)
        output = output[:, : x.shape[1]]  # it takes no variance
    else:
        scheduler = diffusers.DDPMScheduler(variance_type="learned_range")
    scheduler.set_timesteps(1000)
    return lambda: scheduler.step(output, STEP, x, return_dict=False)[0]


def cases(device: str) -> list[Case]:
    return [
        Case(
            "sampler",
            "sampler step",
            shape,
            solver,
            partial(problem, shape, solver, device),
            seconds=1.0,
            device=device,
            subset=subset if solver != "ddpm" else "standard",
            batch=int(shape.partition("x")[0]),
        )
        for solver in SOLVERS
        for shape, subset in SHAPES.items()
    ]


test_diffusion_step = tests(cases, SEEDED, ROWS, RANDN)

if __name__ == "__main__":
    main(cases)
