"""The published sampler's arithmetic in eager PyTorch: what the benchmarks call eager.

Every coefficient is copied from a float64 array to the device, indexed, and expanded to the shape
of x, also those of the true posterior's variance, which its code returns beside the mean; and DDIM
draws noise that η = 0 multiplies by nothing. That is how the published code spends its time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Published:
    """Single steps of a `GaussianDiffusion` with a learned variance."""

    def __init__(self, diffusion) -> None:
        self.diffusion = diffusion
        row = diffusion.posterior_log_variance_clipped
        self.arrays = {"min_log": row, "max_log": torch.tensor(diffusion.betas).log().numpy()}
        for name in (
            "posterior_variance",
            "sqrt_recip_alphas_cumprod",
            "sqrt_recipm1_alphas_cumprod",
            "posterior_mean_coef1",
            "posterior_mean_coef2",
            "alphas_cumprod",
            "alphas_cumprod_prev",
        ):
            self.arrays[name] = getattr(diffusion, name)

    def coefficient(self, name: str, t: Tensor, x: Tensor) -> Tensor:
        value = torch.from_numpy(self.arrays[name]).to(x.device)[t].float()
        while value.dim() < x.dim():
            value = value[..., None]
        return value + torch.zeros(x.shape, device=x.device)

    def _mean_and_variance(self, x: Tensor, output: Tensor, t: Tensor, clip: bool):
        epsilon, v = torch.split(output, x.shape[1], dim=1)
        low, high = self.coefficient("min_log", t, x), self.coefficient("max_log", t, x)
        fraction = (v + 1) / 2
        log_variance = fraction * high + (1 - fraction) * low
        variance = torch.exp(log_variance)
        x0 = (
            self.coefficient("sqrt_recip_alphas_cumprod", t, x) * x
            - self.coefficient("sqrt_recipm1_alphas_cumprod", t, x) * epsilon
        )
        x0 = x0.clamp(-1, 1) if clip else x0
        mean = (
            self.coefficient("posterior_mean_coef1", t, x) * x0
            + self.coefficient("posterior_mean_coef2", t, x) * x
        )
        posterior = [self.coefficient(name, t, x) for name in ("posterior_variance", "min_log")]
        assert all(value.shape == x.shape for value in (mean, variance, x0, *posterior))
        return mean, log_variance, x0

    def ddpm(
        self, x: Tensor, output: Tensor, t: Tensor, noise: Tensor | None, clip: bool = True
    ) -> Tensor:
        mean, log_variance, _x0 = self._mean_and_variance(x, output, t, clip)
        noise = torch.randn_like(x) if noise is None else noise
        not_last = (t != 0).float().view(-1, *[1] * (x.dim() - 1))
        return mean + not_last * torch.exp(0.5 * log_variance) * noise

    def ddim(
        self, x: Tensor, output: Tensor, t: Tensor, eta: float = 0.0, clip: bool = False
    ) -> Tensor:
        _mean, _log_variance, x0 = self._mean_and_variance(x, output, t, clip)
        epsilon = (self.coefficient("sqrt_recip_alphas_cumprod", t, x) * x - x0) / self.coefficient(
            "sqrt_recipm1_alphas_cumprod", t, x
        )
        bar = self.coefficient("alphas_cumprod", t, x)
        before = self.coefficient("alphas_cumprod_prev", t, x)
        sigma = eta * torch.sqrt((1 - before) / (1 - bar)) * torch.sqrt(1 - bar / before)
        noise = torch.randn_like(x)
        mean = x0 * torch.sqrt(before) + torch.sqrt(1 - before - sigma**2) * epsilon
        not_last = (t != 0).float().view(-1, *[1] * (x.dim() - 1))
        return mean + not_last * sigma * noise

    def ddim_loop(self, model: Callable[..., Tensor], x: Tensor, clip: bool = False) -> Tensor:
        """A whole run from the noise `x`; `model` takes x and the timesteps of training."""
        for index in reversed(range(self.diffusion.num_timesteps)):
            t = torch.full((len(x),), index, device=x.device)
            now = torch.full_like(t, self.diffusion.timestep_map[index])
            x = self.ddim(x, model(x, now), t, clip=clip)
        return x
