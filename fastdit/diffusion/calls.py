"""What a step is called with, and what it calls; `fastdit.diffusion.steps` explains the names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdit.ops import _checks

Model = Callable[..., Any]
DenoisedFn = Callable[[Tensor], Tensor]
Noise = Tensor | Callable[[Tensor], Tensor | None] | None
Sample = dict[str, Tensor]


class Call(NamedTuple):
    """The arguments that all steps share."""

    model: Model
    x: Tensor
    t: Tensor
    clip_denoised: bool
    denoised_fn: DenoisedFn | None
    cond_fn: Model | None
    model_kwargs: dict[str, Any] | None


def no_noise(_x: Tensor) -> None:
    """Of a solver that draws none."""
    return None


def draw(noise: Noise, x: Tensor) -> Tensor | None:
    """A step's noise, or None to add none."""
    if noise is None:
        return torch.randn_like(x)
    return noise(x) if callable(noise) else noise


def checked_output(output: Any, x: Tensor, learns_variance: bool) -> tuple[Tensor, Any]:
    """What a model returned for `x`, its shape checked, and whatever else it returned."""
    output, extra = output if isinstance(output, tuple) else (output, None)
    channels = x.shape[1] * (2 if learns_variance else 1)
    allowed = (x.shape[0], channels, *x.shape[2:])
    if not isinstance(output, Tensor) or output.shape != allowed:
        learned = f"{allowed}, as learn_sigma is {learns_variance}"
        _checks.fail("the model's output", _checks.described(output), learned)
    return output, extra
