"""Every sampler's update as rows of one table, derived in float64.

`fastdit.ops.diffusion_step` computes x0 = a·x + b·e from the model's output e and then
x' = cx·x + c0·x0 + cp·x0_previous + σ·z. Here are the coefficients of each solver, one row for each
timestep t of the (respaced) schedule. With ᾱ = ᾱ_t and ᾱ₋ = ᾱ_{t−1} (1 at t = 0), every table reads
the model in the same way:

- ε prediction: x_t = √ᾱ·x0 + √(1 − ᾱ)·ε, so a = √(1/ᾱ), b = −√(1/ᾱ − 1);
- x0 prediction: a = 0, b = 1.

Where an update needs ε, it is that of the x0 in hand, clamped or changed as it may be:
ε = (√(1/ᾱ)·x − x0)/√(1/ᾱ − 1), which leaves x' linear in x and x0.
"""

from __future__ import annotations

import numpy as np

from fastdit.diffusion.kinds import ModelMeanType, ModelVarType
from fastdit.diffusion.schedules import NoiseLevels
from fastdit.ops._checks import fail
from fastdit.reference import TABLE_COLUMNS


def _table(levels: NoiseLevels, mean: ModelMeanType, **columns: np.ndarray | float) -> np.ndarray:
    """`(T, 9)` with the columns that read the model's output and those given; the rest are 0,
    but for guidance, which is 1: the model's output is taken as it is."""
    if mean is ModelMeanType.EPSILON:
        a, b = levels.sqrt_recip_alphas_cumprod, -levels.sqrt_recipm1_alphas_cumprod
    else:
        a, b = 0.0, 1.0
    values = dict.fromkeys(TABLE_COLUMNS, 0.0) | {"guidance": 1.0, "a": a, "b": b} | columns
    table = np.empty((levels.num_timesteps, len(TABLE_COLUMNS)))
    for column, name in enumerate(TABLE_COLUMNS):
        table[:, column] = values[name]
    return table


def _from_epsilon(levels: NoiseLevels, x0_part, epsilon_part) -> dict[str, np.ndarray]:
    """x' = x0_part·x0 + epsilon_part·ε, with ε put in terms of x and x0."""
    per_root = epsilon_part / levels.sqrt_recipm1_alphas_cumprod
    return {"cx": per_root * levels.sqrt_recip_alphas_cumprod, "c0": x0_part - per_root}


def ddpm(levels: NoiseLevels, mean: ModelMeanType, variance: ModelVarType) -> np.ndarray:
    """Ancestral sampling: x' is drawn from p(x_{t−1} | x_t), the posterior at the predicted x0.

    Its mean (Ho et al. 2020, equation 7) is already linear: c0 = β√ᾱ₋/(1 − ᾱ) and
    cx = (1 − ᾱ₋)√α/(1 − ᾱ). σ is the root of the variance: of β (FIXED_LARGE), of β̃ (FIXED_SMALL),
    or, with LEARNED_RANGE, of what the model chooses between them in log space, to which the
    column sigma is a factor 1. The last step, t = 0, adds no noise: σ = 0.
    """
    noisy = (np.arange(levels.num_timesteps) > 0).astype(np.float64)
    if variance is ModelVarType.LEARNED_RANGE:
        sigma = noisy
    elif variance is ModelVarType.FIXED_LARGE:
        sigma = noisy * np.sqrt(levels.large_variance)
    else:
        sigma = noisy * np.sqrt(levels.posterior_variance)
    return _table(
        levels,
        mean,
        cx=levels.posterior_mean_coef2,
        c0=levels.posterior_mean_coef1,
        sigma=sigma,
        min_log=levels.posterior_log_variance_clipped,
        max_log=levels.log_betas,
    )


def ddim(levels: NoiseLevels, mean: ModelMeanType, eta: float) -> np.ndarray:
    """DDIM (Song et al. 2021, equation 12): x' = √ᾱ₋·x0 + √(1 − ᾱ₋ − σ²)·ε + σz.

    σ = η·√((1 − ᾱ₋)/(1 − ᾱ))·√(1 − ᾱ/ᾱ₋) (their equation 16): η = 0 is deterministic, η = 1 has
    DDPM's posterior variance. At t = 0, ᾱ₋ = 1 makes σ = 0 and x' = x0.

    The published code takes these roots of ᾱ in float32, where 1 − ᾱ has lost up to 1e-4 of itself
    at low noise. So are they taken here: the same seed is to give the same samples.

    Raises:
        ValueError: eta is negative, or so large that 1 − ᾱ₋ − σ² is negative at some step.
    """
    bar, before = levels.alphas_cumprod, levels.alphas_cumprod_prev
    largest = np.sqrt(np.min((1 - bar[1:]) / (1 - bar[1:] / before[1:]), initial=np.inf))
    if not 0 <= eta <= largest:
        fail("eta", repr(eta), f"a number from 0 to {largest:.6g} with this schedule")
    bar, before = bar.astype(np.float32), before.astype(np.float32)
    sigma = eta * np.sqrt((1 - before) / (1 - bar)) * np.sqrt(1 - bar / before)
    # At the largest eta one of these is 0 but for rounding.
    direction = np.sqrt(np.maximum(1 - before - sigma**2, 0))
    return _table(levels, mean, sigma=sigma, **_from_epsilon(levels, np.sqrt(before), direction))


def ddim_reverse(levels: NoiseLevels, mean: ModelMeanType) -> np.ndarray:
    """DDIM's ODE run towards noise: x' = √ᾱ₊·x0 + √(1 − ᾱ₊)·ε, with ᾱ₊ = ᾱ_{t+1}, 0 at the end.
    The roots are in float32, as in `ddim`."""
    after = levels.alphas_cumprod_next.astype(np.float32)
    return _table(levels, mean, **_from_epsilon(levels, np.sqrt(after), np.sqrt(1 - after)))


def dpm_solver(levels: NoiseLevels, mean: ModelMeanType, order: int) -> np.ndarray:
    """DPM-Solver++ of order 1 and 2M, midpoint (Lu et al. 2022b, algorithm 2).

    Write x_t = α·x0 + s·ε with α = √ᾱ, s = √(1 − ᾱ), and λ = log(α/s). The exact solution between
    two steps is x' = (s₋/s)·x + α₋∫e^{−(λ₋−λ)}x0 dλ. Order 1 holds x0 fixed: with h = λ₋ − λ,

        x' = (s₋/s)·x + k·x0,   k = α₋·(1 − e^{−h})

    which is DDIM with η = 0. Order 2 extrapolates x0 to the middle of the step along its last
    change, over the step before of length h₊ = λ − λ_{t+1}: x0 + (x0 − x0_previous)·h/(2h₊). So
    c0 = k·(1 + h/2h₊) and cp = −k·h/2h₊. The first step knows no change and the last, to s₋ = 0,
    has h = ∞: both are of order 1, the last one x' = x0.
    """
    before, s = levels.alphas_cumprod_prev, levels.sqrt_one_minus_alphas_cumprod
    half_log_snr = 0.5 * (np.log(levels.alphas_cumprod) - levels.log_one_minus_alphas_cumprod)
    h = np.append(np.inf, -np.diff(half_log_snr))
    k = -np.sqrt(before) * np.expm1(-h)
    extrapolation = np.zeros_like(k)
    if order == 2:
        extrapolation[1:-1] = h[1:-1] / (2 * h[2:])
    return _table(
        levels,
        mean,
        cx=np.sqrt(1 - before) / s,
        c0=k * (1 + extrapolation),
        cp=-k * extrapolation,
    )
