"""Diffusion from first principles, in float64 and one sample at a time: a second opinion.

Nothing here uses fastdit. The posterior comes from multiplying two Gaussians, not from its
published coefficients, and distributions from `torch.distributions`.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

SHAPE = (4, 2, 3, 3)


def toy(learn_sigma: bool = True):
    """The analytic model of the oracle's diffusion files."""

    def model(x: Tensor, t: Tensor, **_kwargs) -> Tensor:
        tt = t.reshape(-1, *[1] * (x.ndim - 1)).to(x) / 1000
        epsilon = torch.tanh(0.9 * x + 0.3 * torch.sin(7 * tt))
        return torch.cat([epsilon, torch.cos(1.3 * x - tt)], 1) if learn_sigma else epsilon

    return model


def random(seed: int, dtype=torch.float64, shape=SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def close(got: Tensor, want: Tensor, rtol: float = 1e-5) -> None:
    """Within `rtol` of each element, or of 1 where it is smaller."""
    assert got.shape == want.shape
    error = ((got - want).abs() / want.abs().clamp(min=1)).max().item()
    assert error <= rtol, f"{error:.1e}"


class Plain:
    """One schedule's formulas at a single index t."""

    def __init__(self, betas: np.ndarray) -> None:
        self.beta = [float(b) for b in betas]
        self.bar = [math.prod(1 - b for b in self.beta[: t + 1]) for t in range(len(self.beta))]

    def before(self, t: int) -> float:
        return self.bar[t - 1] if t else 1.0

    def noised(self, x0: Tensor, t: int, z: Tensor) -> Tensor:
        return math.sqrt(self.bar[t]) * x0 + math.sqrt(1 - self.bar[t]) * z

    def x0(self, x: Tensor, epsilon: Tensor, t: int) -> Tensor:
        return (x - math.sqrt(1 - self.bar[t]) * epsilon) / math.sqrt(self.bar[t])

    def epsilon(self, x: Tensor, x0: Tensor, t: int) -> Tensor:
        return (x - math.sqrt(self.bar[t]) * x0) / math.sqrt(1 - self.bar[t])

    def posterior_mean(self, x0: Tensor, x: Tensor, t: int) -> Tensor:
        """q(x_{t-1} | x_0) times q(x_t | x_{t-1}): means weighted by their precisions."""
        if t == 0:
            return x0
        before, beta = self.before(t), self.beta[t]
        prior, likelihood = 1 / (1 - before), (1 - beta) / beta
        mean = prior * math.sqrt(before) * x0 + likelihood * x / math.sqrt(1 - beta)
        return mean / (prior + likelihood)

    def posterior_variance(self, t: int) -> float:
        """Of the same product; at t = 0, where it is 0, that of t = 1."""
        t = max(t, 1)
        return 1 / (1 / (1 - self.before(t)) + (1 - self.beta[t]) / self.beta[t])

    def variance(self, kind: str, t: int, v: Tensor | None = None):
        if kind == "fixed_large":
            return self.beta[t] if t else self.posterior_variance(1)
        if kind == "fixed_small":
            return self.posterior_variance(t)
        f = (v + 1) / 2
        return torch.exp(
            f * math.log(self.beta[t]) + (1 - f) * math.log(self.posterior_variance(t))
        )

    def ddpm(self, x, x0, t, variance, z, gradient=0.0):
        mean = self.posterior_mean(x0, x, t) + variance * gradient
        std = variance.sqrt() if isinstance(variance, Tensor) else math.sqrt(variance)
        return mean + std * z if t else mean

    def ddim(self, x, x0, t, eta, z):
        bar, before = self.bar[t], self.before(t)
        sigma = eta * math.sqrt((1 - before) / (1 - bar) * (1 - bar / before))
        direction = math.sqrt(1 - before - sigma**2)
        return math.sqrt(before) * x0 + direction * self.epsilon(x, x0, t) + sigma * z

    def bound_term(self, x_start, x, x0, t, variance) -> Tensor:
        """The variational bound's term at t in bits per dimension."""
        variance = torch.as_tensor(variance, dtype=torch.float64).expand(x.shape)
        mean = self.posterior_mean(x0, x, t)
        if t:
            q = Normal(self.posterior_mean(x_start, x, t), math.sqrt(self.posterior_variance(t)))
            return kl_divergence(q, Normal(mean, variance.sqrt())).mean() / math.log(2)
        return -self.log_likelihood(x_start, mean, variance.sqrt()).mean() / math.log(2)

    @staticmethod
    def log_likelihood(x, mean, std) -> Tensor:
        """Of 8-bit bins; the outer ones are infinitely wide. Φ in its tanh approximation."""

        def phi(z):
            return (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2

        upper = torch.where(x > 0.999, 1.0, phi((x + 1 / 255 - mean) / std))
        lower = torch.where(x < -0.999, 0.0, phi((x - 1 / 255 - mean) / std))
        return torch.log((upper - lower).clamp(min=1e-12))
