"""Models with weights worth multiplying by, and their inputs.

DiT is initialised as the zero function. Every parameter that starts at zero is drawn here instead,
so that a wrong column cannot agree by giving zeros.
"""

from __future__ import annotations

from typing import Any

import torch
from plain_dit import PlainDiT
from torch import Tensor

import fastdit
from fastdit.model import SIZES

DIGITS = "digits, 6x192"
NAMES = {
    DIGITS: {
        "input_size": 8,
        "patch_size": 2,
        "in_channels": 1,
        "hidden_size": 192,
        "depth": 6,
        "num_heads": 6,
        "num_classes": 10,
    }
}
"""Models beside the published ones: 16 tokens, where calling costs more than computing."""


def config(name: str) -> dict[str, Any]:
    """What differs from the defaults in a model's name such as "S/2"."""
    if name in NAMES:
        return NAMES[name]
    size, _, patch = name.partition("/")
    depth, width, heads = SIZES[size]
    sized = {"depth": depth, "hidden_size": width, "num_heads": heads}
    return {**sized, "patch_size": int(patch)}


def random_dit(name: str, dtype: torch.dtype, device: str, **changes: Any) -> fastdit.DiT:
    """The model of a name such as "S/2", with drawn weights, in eval mode."""
    with torch.device(device):
        model = fastdit.DiT(**{**config(name), **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return model.to(dtype).eval()


def pair(name: str, dtype: torch.dtype, device: str, **changes: Any) -> tuple[Any, PlainDiT]:
    """A model and the plain one on the same parameters."""
    model = random_dit(name, dtype, device, **changes)
    return model, PlainDiT(model)


def inputs(model: Any, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timesteps and labels."""
    parameter = next(model.parameters())
    shape = (batch, model.in_channels, *model.input_size)
    x = torch.randn(shape, device=parameter.device).to(parameter.dtype)
    t = torch.randint(0, 1000, (batch,), device=parameter.device)
    return x, t, torch.randint(0, model.num_classes, (batch,), device=parameter.device)
