"""Gaussian diffusion: schedules, losses and samplers, every sampler a table.

    diffusion = fastdit.create_diffusion("250")
    samples = diffusion.p_sample_loop(model, (16, 4, 32, 32), clip_denoised=False)

The object has the published methods and, for the same seed, gives the published samples. Its
sampler updates are single calls of `fastdit.ops.diffusion_step`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastdit.diffusion.gaussian import GaussianDiffusion
from fastdit.diffusion.kinds import LossType, ModelMeanType, ModelVarType
from fastdit.diffusion.schedules import named_betas, space_timesteps
from fastdit.diffusion.spacing import SPACINGS, spaced_timesteps
from fastdit.ops._checks import fail

__all__ = [
    "GaussianDiffusion",
    "LossType",
    "ModelMeanType",
    "ModelVarType",
    "create_diffusion",
    "named_betas",
    "space_timesteps",
    "spaced_timesteps",
]


def _kept(betas: np.ndarray, respacing: str | Sequence[int]) -> set[int]:
    """The timesteps of a respacing, by number or by noise level."""
    for spacing in SPACINGS[1:]:
        if isinstance(respacing, str) and respacing.startswith(spacing):
            count = respacing.removeprefix(spacing)
            if not count.isdecimal():
                allowed = f"'{spacing}N' with N from 1 to {len(betas)}"
                fail("timestep_respacing", repr(respacing), allowed)
            return spaced_timesteps(betas, int(count), spacing)
    return space_timesteps(len(betas), respacing)


def create_diffusion(
    timestep_respacing: str | Sequence[int] | None,
    noise_schedule: str = "linear",
    use_kl: bool = False,
    sigma_small: bool = False,
    predict_xstart: bool = False,
    learn_sigma: bool = True,
    rescale_learned_sigmas: bool = False,
    diffusion_steps: int = 1000,
) -> GaussianDiffusion:
    """The diffusion of the published DiT by default: 1000 linear steps, learned variance.

    Args:
        timestep_respacing: `"250"`, `"10,10,5"`, `"ddim50"`, a list of ints, or `""` or None for
            all steps, see `space_timesteps`; `"logsnr20"` or `"karras10"`, see
            `fastdit.diffusion.spacing`.
        noise_schedule: `"linear"`, `"squaredcos_cap_v2"` or its other name `"cosine"`.
        use_kl: train on the variational bound (RESCALED_KL).
        sigma_small: where the variance is not learned, fix it to β̃ rather than β.
        predict_xstart: the model predicts x0, not ε.
        learn_sigma: the model's second half of channels chooses the variance between β̃ and β.
        rescale_learned_sigmas: scale the bound's term in the loss by T/1000; `use_kl` goes first.
        diffusion_steps: the length of the schedule before respacing.

    Raises:
        ValueError, TypeError: an unknown schedule or an impossible respacing, which is named.

    Example:
        >>> create_diffusion("ddim4").timestep_map
        [0, 250, 500, 750]
    """
    betas = named_betas(noise_schedule, diffusion_steps)
    respacing = "" if timestep_respacing is None else timestep_respacing
    fixed = ModelVarType.FIXED_SMALL if sigma_small else ModelVarType.FIXED_LARGE
    mse = LossType.RESCALED_MSE if rescale_learned_sigmas else LossType.MSE
    return GaussianDiffusion(
        betas,
        _kept(betas, respacing),
        model_mean_type=ModelMeanType.START_X if predict_xstart else ModelMeanType.EPSILON,
        model_var_type=ModelVarType.LEARNED_RANGE if learn_sigma else fixed,
        loss_type=LossType.RESCALED_KL if use_kl else mse,
    )
