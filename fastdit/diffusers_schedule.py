"""Schedules of `fastdit.diffusers.Scheduler`: betas and timesteps as its config asks for them."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastdit.diffusion.schedules import named_betas, space_timesteps
from fastdit.ops._checks import fail

ALLOWED = {
    "solver": ("ddim", "ddpm", "dpm++"),
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "sample", "v_prediction"),
    "variance_type": ("fixed_small", "fixed_large", "learned_range"),
    "timestep_spacing": ("leading", "trailing", "linspace", "published"),
    "solver_order": (1, 2),
    "final_sigmas_type": ("zero",),
    "thresholding": (False,),
    "rescale_betas_zero_snr": (False,),
    "use_karras_sigmas": (False, None),
}
"""What an option of the config may be."""


def betas(config: Any) -> np.ndarray:
    """The training schedule's, `(T,)`."""
    steps, ends = config.num_train_timesteps, (config.beta_start, config.beta_end)
    if config.trained_betas is not None:
        if len(config.trained_betas) != steps:
            fail("trained_betas", f"{len(config.trained_betas)} of them", f"{steps}")
        return np.asarray(config.trained_betas, dtype=np.float64)
    if config.beta_schedule == "linear":
        return np.linspace(*ends, steps, dtype=np.float64)
    if config.beta_schedule == "scaled_linear":
        return np.linspace(*np.sqrt(ends), steps, dtype=np.float64) ** 2
    return named_betas("squaredcos_cap_v2", steps)


def spaced(config: Any, count: int) -> np.ndarray:
    """`count` falling timesteps, as the scheduler of diffusers with this solver has them."""
    total, spacing = config.num_train_timesteps, config.timestep_spacing
    if spacing == "published":
        return np.array(sorted(space_timesteps(total, str(count)), reverse=True))
    # Diffusers' DPM-Solver++ divides into one more and leaves out the lowest.
    extra = int(config.solver == "dpm++")
    if spacing == "trailing":
        return np.round(np.arange(total, 0, -total / count))[:count].astype(np.int64) - 1
    if spacing == "linspace":
        points = np.linspace(0, total - 1, count + extra).round().astype(np.int64)
    else:
        stride = total // (count + extra)
        points = np.arange(count + extra) * stride + config.steps_offset
    return points[extra:][::-1].copy()
