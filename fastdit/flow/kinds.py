"""What a flow model predicts, along which path, and how its loss is weighted.

The names are the published ones (Ma et al. 2024, SiT), so that code that reads them keeps working.
"""

from __future__ import annotations

import enum


class ModelType(enum.Enum):
    """What the first channels of the model's output are."""

    NOISE = "noise"
    SCORE = "score"
    VELOCITY = "velocity"


class PathType(enum.Enum):
    """The interpolant between noise and data; see `fastdit.flow.paths`."""

    LINEAR = "Linear"
    GVP = "GVP"
    VP = "VP"


class WeightType(enum.Enum):
    """The weight of a noise or score model's loss; see `Transport.training_losses`."""

    NONE = None
    VELOCITY = "velocity"
    LIKELIHOOD = "likelihood"
