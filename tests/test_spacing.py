"""Timesteps by noise level: the formulas of their papers, distinct, and as a respacing."""

from __future__ import annotations

import numpy as np
import pytest

from fastdit.diffusion import create_diffusion, named_betas, spaced_timesteps

BETAS = named_betas("linear", 1000)
RATIO = np.sqrt(1 / np.cumprod(1 - BETAS) - 1)  # noise over signal: the σ of Karras et al.


def karras(steps: int) -> np.ndarray:
    ramp = np.linspace(0, 1, steps)
    return (RATIO[0] ** (1 / 7) + ramp * (RATIO[-1] ** (1 / 7) - RATIO[0] ** (1 / 7))) ** 7


@pytest.mark.parametrize("spacing", ["karras", "logsnr"])
@pytest.mark.parametrize("steps", [2, 6, 10, 20])
def test_levels_are_the_papers(spacing, steps):
    wanted = karras(steps) if spacing == "karras" else np.geomspace(RATIO[0], RATIO[-1], steps)
    t = sorted(spaced_timesteps(BETAS, steps, spacing))
    assert (t[0], t[-1]) == (0, 999)
    for step, level in zip(t, wanted, strict=True):
        nearest = np.abs(np.log(RATIO) - np.log(level)).argmin()
        assert abs(step - nearest) <= 1


@pytest.mark.parametrize("spacing", ["karras", "logsnr"])
@pytest.mark.parametrize("steps", [1, 100, 250, 999, 1000])
def test_as_many_steps_as_asked_for(spacing, steps):
    diffusion = create_diffusion(f"{spacing}{steps}")
    assert diffusion.num_timesteps == steps
    assert diffusion.timestep_map[-1] == 999


def test_diffusers_takes_the_same_karras_steps():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_start=1e-4, beta_end=0.02, use_karras_sigmas=True
    )
    scheduler.set_timesteps(10)
    ours = create_diffusion("karras10").timestep_map[::-1]
    assert np.abs(scheduler.timesteps.numpy() - ours).max() <= 1


@pytest.mark.parametrize("respacing", ["karras", "karras1.5", "logsnr0", "karras1001", "logsnr-3"])
def test_impossible_ones_are_named(respacing):
    with pytest.raises(ValueError, match=r"timestep_respacing: got '|steps: got"):
        create_diffusion(respacing)
