"""Classifier-free guidance over an interval of a flow's time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from fastdit.ops import _checks


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance u + s·(c − u) inside an interval of time.

    Outside the interval only the conditional half runs: the model sees B rows, not 2B.

    Args:
        scale: s; 1 is none.
        interval: the times t in [0, 1], ends included, at which to guide (Kynkäänniemi et al.
            2024); LightningDiT guides from a start on: `(start, 1)`.
        channels: how many of the output's leading channels are guided, 3 as published; None is
            all.
        null: the label of the null class; None asks the model for its `null_condition`.
    """

    scale: float
    interval: tuple[float, float] = (0.0, 1.0)
    channels: int | None = 3
    null: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.scale, Real) or not math.isfinite(self.scale):
            _checks.fail("scale", repr(self.scale), "a finite number")
        ends = self.interval if isinstance(self.interval, tuple | list) else ()
        if len(ends) != 2 or not 0 <= ends[0] <= ends[1] <= 1:
            _checks.fail("interval", repr(self.interval), "(low, high) with 0 <= low <= high <= 1")
        if self.channels is not None and (type(self.channels) is not int or self.channels < 0):
            _checks.fail("channels", repr(self.channels), "None or an int >= 0")

    def at(self, t: float) -> bool:
        """Whether to guide at time `t`; the ends count as inside despite float32's rounding."""
        low, high = self.interval
        return self.scale != 1 and low - 1e-6 <= t <= high + 1e-6

    def nulls(self, model: Any, y: Tensor) -> Tensor:
        """What stands for no condition, like `y`."""
        if self.null is not None:
            return torch.full_like(y, self.null)
        owner = getattr(model, "__self__", model)
        if not hasattr(owner, "null_condition"):
            _checks.fail("null", None, "a label, as the model has no null_condition")
        return owner.null_condition(len(y)).to(y)

    def guided_channels(self, x: Tensor) -> int:
        return x.shape[1] if self.channels is None else min(self.channels, x.shape[1])

    def doubled(
        self, x: Tensor, model: Any, model_kwargs: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        """`x` twice, and the keyword arguments with y followed by as many nulls."""
        y = model_kwargs.get("y")
        if not isinstance(y, Tensor) or y.shape[:1] != x.shape[:1]:
            got = type(y).__name__ if not isinstance(y, Tensor) else tuple(y.shape)
            _checks.fail("y", got, f"a tensor of {x.shape[0]} labels or vectors, to guide")
        return torch.cat([x, x]), {**model_kwargs, "y": torch.cat([y, self.nulls(model, y)])}
