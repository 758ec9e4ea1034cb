"""A flow whose answers are known: data N(m, s²) in every dimension.

Then x_t is N(αm, α²s² + σ²), and the velocity, noise and score that a perfect model predicts are
known, as is where the ODE takes every x.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdit.flow import ModelType, PathType

MEAN, STD = 0.7, 0.4
PATH_NAMES = [kind.value for kind in PathType]
PREDICTIONS = [kind.value for kind in ModelType]


def exact(transport, calls: list | None = None):
    """A perfect model of N(m, s²), and what it was called with."""

    def model(x: Tensor, t: Tensor, **_kwargs) -> Tensor:
        t = t / transport.time_scale
        if calls is not None:
            calls.append((len(x), float(t[0])))
        (alpha, d_alpha), (sigma, d_sigma) = (
            f(t.double().reshape(-1, *[1] * (x.dim() - 1)))
            for f in (transport.path.alpha, transport.path.sigma)
        )
        variance = (alpha * STD) ** 2 + sigma**2
        off = x - alpha * MEAN
        said = {
            "score": -off / variance,
            "noise": sigma * off / variance,
            "velocity": d_alpha * MEAN
            + (alpha * d_alpha * STD**2 + sigma * d_sigma) * off / variance,
        }
        return said[transport.model_type.value].to(x.dtype)

    return model


def solution(transport, x: Tensor, before: float, after: float) -> Tensor:
    """Where the exact flow takes x: every quantile keeps its place."""
    t = torch.tensor([before, after], dtype=torch.float64)
    alpha, sigma = transport.path.alpha(t)[0], transport.path.sigma(t)[0]
    spread = ((alpha * STD) ** 2 + sigma**2).sqrt()
    return alpha[1] * MEAN + spread[1] / spread[0] * (x - alpha[0] * MEAN)


def labelled(seen: list):
    """A model whose velocity is its label, and 10 times that in a second half of channels."""

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.append((len(x), round(float(t[0]), 4)))
        label = y.reshape(-1, 1, 1, 1).to(x) * torch.ones_like(x)
        return torch.cat([label, 10 * label], 1)

    return model
