"""What a diffusion model predicts, where its variance comes from and what it is trained on.

The names are the published ones, so that code that reads them keeps working.
"""

from __future__ import annotations

import enum


class ModelMeanType(enum.Enum):
    """What the first channels of the model's output are."""

    EPSILON = "epsilon"
    START_X = "x_start"


class ModelVarType(enum.Enum):
    """The variance of the reverse step p(x_{t-1} | x_t)."""

    LEARNED_RANGE = "learned_range"
    FIXED_LARGE = "fixed_large"
    FIXED_SMALL = "fixed_small"


class LossType(enum.Enum):
    """What `training_losses` calls `loss`."""

    MSE = "mse"
    RESCALED_MSE = "rescaled_mse"
    KL = "kl"
    RESCALED_KL = "rescaled_kl"

    def is_vb(self) -> bool:
        """Whether the loss is the variational bound alone."""
        return self in (LossType.KL, LossType.RESCALED_KL)
