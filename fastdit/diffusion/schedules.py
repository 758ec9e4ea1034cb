"""Noise schedules: the betas, which of their steps are kept, and what follows from them.

With α_t = 1 − β_t and ᾱ_t = ∏ α_s, the forward process is x_t = √ᾱ_t·x_0 + √(1 − ᾱ_t)·ε. A
respaced schedule keeps some of the steps and takes β'_i = 1 − ᾱ_i/ᾱ_{i−1} over those kept, so that
its ᾱ are the original ones there. Everything here is float64 on the host.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np

from fastdit.ops._checks import fail

SCHEDULES = ("linear", "squaredcos_cap_v2", "cosine")
_LARGEST_BETA = 0.999


def named_betas(name: str, steps: int) -> np.ndarray:
    """The betas of a named schedule.

    Args:
        name: `"linear"` (Ho et al. 2020: 1e-4 to 0.02 over 1000 steps, both ends scaled by
            1000/steps) or `"squaredcos_cap_v2"`, also called `"cosine"` (Nichol & Dhariwal 2021,
            equation 17, capped at 0.999).
        steps: how many, at least 1.

    Returns:
        `(steps,)` float64, each in (0, 1).

    Raises:
        ValueError: an unknown name; too few steps for the linear schedule, whose last beta would
            reach 1.
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        fail("diffusion_steps", repr(steps), "a positive int")
    if name not in SCHEDULES:
        fail("noise_schedule", repr(name), ", ".join(map(repr, SCHEDULES)))
    if name == "linear":
        scale = 1000 / steps
        betas = np.linspace(scale * 1e-4, scale * 0.02, steps, dtype=np.float64)
        if betas[-1] >= 1:
            fail("diffusion_steps", steps, "an int > 20 with the linear schedule")
        return betas
    signal = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
    pairs = itertools.pairwise(signal)
    return np.array([min(1 - after / before, _LARGEST_BETA) for before, after in pairs])


def space_timesteps(num_timesteps: int, section_counts: str | Sequence[int]) -> set[int]:
    """The original timesteps that a respaced schedule keeps.

    Args:
        num_timesteps: the length of the original schedule.
        section_counts: `"250"`, 250 steps evenly spaced from first to last; `"10,10,5"` or
            `[10, 10, 5]`, so many in each of equal sections; `"ddim50"`, the integer stride that
            gives exactly 50 steps from 0 on (Song et al. 2021); `""` or an empty list, all of them.

    Raises:
        ValueError: no integer stride gives the count; a section is shorter than its count; the
            string cannot be read.
        TypeError: `section_counts` is neither a string nor a sequence of ints.

    Example:
        >>> sorted(space_timesteps(1000, "ddim4"))
        [0, 250, 500, 750]
    """
    if isinstance(section_counts, str) and section_counts.startswith("ddim"):
        return _integer_stride(num_timesteps, section_counts)
    counts = _section_counts(section_counts) or [num_timesteps]
    size, longer = divmod(num_timesteps, len(counts))
    kept: set[int] = set()
    start = 0
    for section, count in enumerate(counts):
        length = size + (section < longer)
        if not 0 <= count <= length:
            allowed = f"counts from 0 to {length} in section {section} of {num_timesteps} steps"
            fail("timestep_respacing", repr(section_counts), allowed)
        kept.update(start + _spread(length, count))
        start += length
    if not kept:
        fail("timestep_respacing", repr(section_counts), "at least one step")
    return kept


def _spread(length: int, count: int) -> np.ndarray:
    """`count` of `range(length)`, first and last included, rounded half to even.

    The stride is summed, not multiplied: the published rounding depends on it.
    """
    stride = (length - 1) / (count - 1) if count > 1 else 1.0
    return np.rint(np.cumsum([0.0, *[stride] * (count - 1)])[:count]).astype(int)


def _integer_stride(num_timesteps: int, respacing: str) -> set[int]:
    strided = [range(0, num_timesteps, stride) for stride in range(1, num_timesteps)]
    fitting = [steps for steps in strided if str(len(steps)) == respacing.removeprefix("ddim")]
    if not fitting:
        allowed = f"'ddimN' where an integer stride takes N steps out of {num_timesteps}"
        fail("timestep_respacing", repr(respacing), allowed)
    return set(fitting[0])


def _section_counts(section_counts: str | Sequence[int]) -> list[int]:
    allowed = "a string such as '250', '10,10,5', 'ddim50' or '', or a list of ints"
    if isinstance(section_counts, str):
        parts = section_counts.split(",") if section_counts else []
        if not all(part.strip().isdecimal() for part in parts):
            fail("timestep_respacing", repr(section_counts), allowed)
        return [int(part) for part in parts]
    if not isinstance(section_counts, list | tuple):
        raise TypeError(f"timestep_respacing: got {section_counts!r}, allowed is {allowed}")
    if not all(isinstance(count, int) and not isinstance(count, bool) for count in section_counts):
        fail("timestep_respacing", repr(section_counts), allowed)
    return list(section_counts)


def respaced_betas(betas: np.ndarray, kept: Iterable[int]) -> np.ndarray:
    """The betas between the kept steps: 1 − ᾱ_i/ᾱ of the kept step before."""
    alphas_cumprod = np.cumprod(1.0 - betas)[sorted(kept)]
    return 1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])


class NoiseLevels:
    """The constants of a schedule, `(T,)` float64 each, under their published names.

    `betas`, `alphas_cumprod` (ᾱ), `alphas_cumprod_prev` (1 at t = 0), `alphas_cumprod_next` (0 at
    the end), their roots and logs, and the posterior q(x_{t-1} | x_t, x_0): mean
    `posterior_mean_coef1`·x_0 + `posterior_mean_coef2`·x_t, variance
    β̃ = β·(1 − ᾱ_prev)/(1 − ᾱ). As β̃ is 0 at t = 0, its clipped log takes t = 1's value there (β's
    own where there is no t = 1). Likewise FIXED_LARGE's variance `large_variance` is β, but β̃_1 at
    t = 0.

    Raises:
        ValueError: the betas are not a vector of numbers in (0, 1).
    """

    def __init__(self, betas: Sequence[float] | np.ndarray) -> None:
        self.betas = np.array(betas, dtype=np.float64)
        if self.betas.ndim != 1 or not self.betas.size:
            fail("betas", f"shape {self.betas.shape}", "(T,) with T >= 1")
        if not ((self.betas > 0) & (self.betas < 1)).all():
            fail("betas", f"{self.betas.min()} to {self.betas.max()}", "numbers in (0, 1)")
        self.num_timesteps = len(self.betas)

        alphas, bar = 1.0 - self.betas, np.cumprod(1.0 - self.betas)
        before = np.append(1.0, bar[:-1])
        self.alphas_cumprod = bar
        self.alphas_cumprod_prev = before
        self.alphas_cumprod_next = np.append(bar[1:], 0.0)
        self.sqrt_alphas_cumprod = np.sqrt(bar)
        self.one_minus_alphas_cumprod = 1.0 - bar
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1.0 - bar)
        self.log_one_minus_alphas_cumprod = np.log(1.0 - bar)
        self.sqrt_recip_alphas_cumprod = np.sqrt(1.0 / bar)
        self.sqrt_recipm1_alphas_cumprod = np.sqrt(1.0 / bar - 1)

        self.posterior_variance = self.betas * (1.0 - before) / (1.0 - bar)
        first = self.posterior_variance[1:2] if self.num_timesteps > 1 else self.betas
        self.posterior_log_variance_clipped = np.log(np.append(first, self.posterior_variance[1:]))
        self.posterior_mean_coef1 = self.betas * np.sqrt(before) / (1.0 - bar)
        self.posterior_mean_coef2 = (1.0 - before) * np.sqrt(alphas) / (1.0 - bar)
        self.log_betas = np.log(self.betas)
        self.large_variance = np.append(first, self.betas[1:])
        self.log_large_variance = np.log(self.large_variance)
