"""A diffusion's solvers as plans of the sampling engine; their rows are `fastdit.diffusion`'s."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from fastdit.diffusion import GaussianDiffusion, tables
from fastdit.ops._checks import fail
from fastdit.plan import Plan

DIFFUSION_SOLVERS = ("ddpm", "ddim", "dpm++")


def diffusion_plan(
    diffusion: GaussianDiffusion, solver: str, eta: float = 0.0, order: int = 2
) -> Plan:
    """Every step of a (respaced) diffusion from the last timestep to the first.

    Args:
        diffusion: the schedule, and what the model predicts.
        solver: `"ddpm"`, `"ddim"` or `"dpm++"`.
        eta: DDIM's noise.
        order: of DPM-Solver++, 1 or 2.

    Raises:
        ValueError: an unknown solver, or an option it does not have.
    """
    if solver not in DIFFUSION_SOLVERS:
        fail("solver", repr(solver), ", ".join(map(repr, DIFFUSION_SOLVERS)))
    if eta and solver != "ddim":
        fail("eta", repr(eta), f"0 with solver={solver!r}")
    if order not in (1, 2) or isinstance(order, bool):
        fail("order", repr(order), "1 or 2")
    if order != 2 and solver != "dpm++":
        fail("order", repr(order), f"2 with solver={solver!r}, which has none")
    kinds = {
        "ddpm": (tables.ddpm, diffusion.model_var_type),
        "ddim": (tables.ddim, float(eta)),
        "dpm++": (tables.dpm_solver, order),
    }
    make: Callable[..., np.ndarray]
    make, option = kinds[solver]
    times = diffusion.timestep_map[::-1]
    return Plan(
        times=torch.tensor(times, dtype=torch.int64),
        table=torch.from_numpy(make(diffusion, diffusion.model_mean_type, option)[::-1].copy()),
        multistep=solver == "dpm++" and order == 2,
        draws=(solver != "dpm++",) * len(times),
        noisy=solver == "ddpm" or eta != 0,
        draws_last=True,
        learned_range=solver == "ddpm" and diffusion.learns_variance,
    )
