"""Likelihood terms of the variational bound, in nats.

    KL(N(m1, s1²) ‖ N(m2, s2²)) = ½(log s2² − log s1² − 1 + e^{log s1² − log s2²} + (m1 − m2)²/s2²)

The discretised Gaussian is the decoder of Ho et al. 2020, equation 13, for 8-bit images scaled to
[−1, 1]: a pixel's probability is that of its bin of width 2/255, the outermost bins reaching to
infinity, with the tanh approximation of the normal distribution function that GELU uses too.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_SMALLEST_PROBABILITY = 1e-12
_EDGE = 0.999


def mean_flat(tensor: Tensor) -> Tensor:
    """The mean over all axes but the first: `(B, ...)` to `(B,)`."""
    return tensor.flatten(1).mean(1)


def normal_kl(mean1: Tensor, logvar1: Tensor, mean2: Tensor, logvar2: Tensor) -> Tensor:
    """KL(first ‖ second) of Gaussians given by mean and log-variance, elementwise and broadcast,
    in nats."""
    squared = (mean1 - mean2).square() * torch.exp(-logvar2)
    return 0.5 * (logvar2 - logvar1 - 1.0 + torch.exp(logvar1 - logvar2) + squared)


def approx_standard_normal_cdf(x: Tensor) -> Tensor:
    """½(1 + tanh(√(2/π)·(x + 0.044715x³)))."""
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(x: Tensor, means: Tensor, log_scales: Tensor) -> Tensor:
    """Log-probability of 8-bit values under a Gaussian, elementwise, in nats.

    Args:
        x: values k·2/255 − 1 of an image.
        means, log_scales: shaped like `x`; the Gaussian and the log of its standard deviation.
    """
    centred, inverse = x - means, torch.exp(-log_scales)
    above = approx_standard_normal_cdf(inverse * (centred + 1.0 / 255.0))
    below = approx_standard_normal_cdf(inverse * (centred - 1.0 / 255.0))
    probability = torch.where(x < -_EDGE, above, torch.where(x > _EDGE, 1.0 - below, above - below))
    return probability.clamp(min=_SMALLEST_PROBABILITY).log()
