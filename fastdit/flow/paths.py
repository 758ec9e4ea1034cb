"""Interpolants between noise and data, and what a model's output says at a point of one.

    x_t = α·x1 + σ·x0,   v_t = α'·x1 + σ'·x0        t = 0: noise x0, t = 1: data x1

| path   | α           | σ          |
|--------|-------------|------------|
| Linear | t           | 1 − t      |
| GVP    | sin(πt/2)   | cos(πt/2)  |
| VP     | e^λ, λ = −¼(1 − t)²·19.9 − ½(1 − t)·0.1 | √(1 − α²) |

Velocity v, noise x0, score s = −x0/σ and data x1 are, at a given x, linear in each other. With
Δ = ασ' − σα', which is never 0 inside a path:

    x1 = (σ'·x − σ·v)/Δ         x0 = (α·v − α'·x)/Δ
    v = r·x + g·s,   r = α'/α,   g = σ·(rσ − σ') = −σΔ/α

so that whatever is wanted is A·x + B·e of the model's output e: `Path.coefficients` gives A and B.
They are written so that a velocity's score is finite at t = 0, where r and g are not.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from fastdit.flow.kinds import ModelType, PathType
from fastdit.ops._checks import fail

FORMS = (
    "constant",
    "SBDM",
    "sigma",
    "linear",
    "decreasing",
    "increasing-decreasing",
    "inccreasing-decreasing",
)
"""The diffusion coefficients w(t) of the SDEs. The last name is the published spelling."""

Pair = tuple[Tensor, Tensor]


class Path(ABC):
    """An interpolant. `t` is a floating-point tensor of any shape; so are all results."""

    kind: PathType

    @abstractmethod
    def alpha(self, t: Tensor) -> Pair:
        """α and α'."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Pair:
        """σ and σ'."""

    def rate(self, t: Tensor) -> Tensor:
        """r = α'/α."""
        alpha, d_alpha = self.alpha(t)
        return d_alpha / alpha

    def score_weight(self, t: Tensor) -> Tensor:
        """g of v = r·x + g·s."""
        sigma, d_sigma = self.sigma(t)
        return sigma * (self.rate(t) * sigma - d_sigma)

    def at(self, t: Tensor, x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
        """x_t and v_t between noise `x0` and data `x1`, `(B, ...)`, at `t` `(B,)`."""
        t = per_sample(t, x1)
        (alpha, d_alpha), (sigma, d_sigma) = self.alpha(t), self.sigma(t)
        return alpha * x1 + sigma * x0, d_alpha * x1 + d_sigma * x0

    def coefficients(self, wanted: str, prediction: ModelType, t: Tensor) -> Pair:
        """A and B of wanted = A·x + B·e, where e is what the model predicts.

        Args:
            wanted: `"velocity"`, `"score"` or `"data"`.
            prediction: what e is.
            t: any shape.
        """
        (alpha, d_alpha), (sigma, d_sigma) = self.alpha(t), self.sigma(t)
        zero, one = torch.zeros_like(t), torch.ones_like(t)
        if wanted == prediction.value:
            return zero, one
        if prediction is ModelType.VELOCITY:
            delta = alpha * d_sigma - sigma * d_alpha
            if wanted == "score":
                return d_alpha / (sigma * delta), -alpha / (sigma * delta)
            return d_sigma / delta, -sigma / delta
        # The score that one unit of e is.
        unit = one if prediction is ModelType.SCORE else -1 / sigma
        if wanted == "score":
            return zero, unit
        if wanted == "data":
            return 1 / alpha, sigma**2 * unit / alpha
        if prediction is ModelType.SCORE:
            return self.rate(t) * one, self.score_weight(t)
        return self.rate(t) * one, d_sigma - self.rate(t) * sigma

    def diffusion(self, form: str, norm: float, t: Tensor) -> Tensor:
        """The coefficient w(t) of the SDE dx = (v + w·s)dt + √(2w)dW.

        `norm` scales it, except in the decreasing form ¼(norm·cos πt + 1)², as published. SBDM's
        w = norm·g is infinite at t = 0 on the linear and the GVP path.

        Raises:
            ValueError: an unknown form.
        """
        if form not in FORMS:
            fail("diffusion_form", repr(form), ", ".join(map(repr, FORMS)))
        if form == "constant":
            return norm * torch.ones_like(t)
        if form == "SBDM":
            return norm * self.score_weight(t)
        if form == "sigma":
            return norm * self.sigma(t)[0]
        if form == "linear":
            return norm * (1 - t)
        if form == "decreasing":
            return 0.25 * (norm * torch.cos(math.pi * t) + 1) ** 2
        return norm * torch.sin(math.pi * t) ** 2


class Linear(Path):
    """α = t, σ = 1 − t: straight lines at constant speed."""

    kind = PathType.LINEAR

    def alpha(self, t: Tensor) -> Pair:
        return t, torch.ones_like(t)

    def sigma(self, t: Tensor) -> Pair:
        return 1 - t, -torch.ones_like(t)


class GVP(Path):
    """α = sin(πt/2), σ = cos(πt/2): the generalised variance-preserving path."""

    kind = PathType.GVP

    def alpha(self, t: Tensor) -> Pair:
        angle = t * (math.pi / 2)
        return torch.sin(angle), math.pi / 2 * torch.cos(angle)

    def sigma(self, t: Tensor) -> Pair:
        angle = t * (math.pi / 2)
        return torch.cos(angle), -math.pi / 2 * torch.sin(angle)


class VP(Path):
    """The diffusion with β from 0.1 at the data to 20 at the noise (Song et al. 2021): r = g = β/2.

    α is e^{−5.0} rather than 0 at t = 0, and σ' is infinite at t = 1.
    """

    kind = PathType.VP
    least, most = 0.1, 20.0

    def rate(self, t: Tensor) -> Tensor:
        return 0.5 * (self.least + (1 - t) * (self.most - self.least))

    def score_weight(self, t: Tensor) -> Tensor:
        return self.rate(t)

    def _log_alpha(self, t: Tensor) -> Tensor:
        back = 1 - t
        return -0.25 * back**2 * (self.most - self.least) - 0.5 * back * self.least

    def alpha(self, t: Tensor) -> Pair:
        alpha = torch.exp(self._log_alpha(t))
        return alpha, alpha * self.rate(t)

    def sigma(self, t: Tensor) -> Pair:
        alpha, d_alpha = self.alpha(t)
        sigma = torch.sqrt(-torch.expm1(2 * self._log_alpha(t)))
        return sigma, -alpha * d_alpha / sigma


PATHS = {path.kind: path for path in (Linear(), GVP(), VP())}


def per_sample(t: Tensor, x: Tensor) -> Tensor:
    """`(B,)` with axes of one, to broadcast against `x` `(B, ...)`."""
    return t.reshape(-1, *[1] * (x.dim() - 1))
