"""Which timesteps a sampler of few steps visits, chosen by their noise level.

With λ_t = ½·log(ᾱ/(1 − ᾱ)), half the log-SNR, and s_t = e^{−λ} the noise over the signal, N steps
from the last timestep to the first are

- `uniform`: evenly spaced in t, the published respacing `"N"`;
- `logsnr`: evenly spaced in λ (Lu et al. 2022a): many steps where little noise is left;
- `karras`: evenly spaced in s^{1/7} (Karras et al. 2022, equation 5): between the two.

A wanted level becomes the nearest timestep that the model was trained on, so that every solver
takes the steps as it takes any respaced schedule. Where two levels share a timestep, the later one
takes the next free.
"""

from __future__ import annotations

import numpy as np

from fastdit.ops._checks import fail

SPACINGS = ("uniform", "logsnr", "karras")
_RHO = 7.0


def _levels(log_snr: np.ndarray, steps: int, spacing: str) -> np.ndarray:
    """The wanted λ, from the least noise to the most."""
    ends = log_snr[0], log_snr[-1]
    if spacing == "logsnr":
        return np.linspace(*ends, steps)
    low, high = (np.exp(-end / _RHO) for end in ends)
    return -_RHO * np.log(np.linspace(low, high, steps))


def spaced_timesteps(betas: np.ndarray, steps: int, spacing: str) -> set[int]:
    """N timesteps of a schedule, its first and its last among them.

    Args:
        betas: `(T,)`, the schedule that the model was trained on.
        steps: N, from 1 to T; one step is the last timestep.
        spacing: `"logsnr"` or `"karras"`.

    Raises:
        ValueError: an unknown spacing, or more steps than there are.

    Source: Lu et al. 2022a; Karras et al. 2022.
    """
    total = len(betas)
    if spacing not in SPACINGS[1:]:
        fail("spacing", repr(spacing), ", ".join(map(repr, SPACINGS[1:])))
    if not isinstance(steps, int) or isinstance(steps, bool) or not 1 <= steps <= total:
        fail("steps", repr(steps), f"an int from 1 to {total}")
    if steps == 1:
        return {total - 1}
    bar = np.cumprod(1.0 - np.asarray(betas, dtype=np.float64))
    log_snr = 0.5 * (np.log(bar) - np.log1p(-bar))
    wanted = _levels(log_snr, steps, spacing)
    t = np.rint(np.interp(-wanted, -log_snr, np.arange(total))).astype(int)
    room = np.arange(steps)
    t = np.maximum.accumulate(t - room) + room  # each at least one after the one before
    return set(np.minimum(t, total - steps + room).tolist())
