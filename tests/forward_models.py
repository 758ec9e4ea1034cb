"""Small models, inputs and errors for the tests of the native forward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fastdit
from fastdit import native

Inputs = tuple[Tensor, Tensor, Tensor]


def load_library() -> None:
    """Load the compiled library, or skip the test."""
    try:
        native.load()
    except native.NativeError as error:
        pytest.skip(f"no compiled library: {error}")


def small(**kwargs) -> fastdit.DiT:
    """A model whose every layer matters, and none amplifies rounding."""
    shape = {"input_size": 4, "hidden_size": 36, "depth": 2, "num_heads": 3, "num_classes": 5}
    torch.manual_seed(0)
    model = fastdit.DiT(**{**shape, **kwargs}).eval()
    for name, parameter in model.named_parameters():
        if name != "pos_embed":
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 25
            nn.init.normal_(parameter, std=fan_in**-0.5)
    return model


def inputs(model: fastdit.DiT, batch: int = 2) -> Inputs:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(batch, model.in_channels, *model.input_size, generator=g)
    t = torch.randint(0, 1000, (batch,), generator=g)
    labels = torch.randint(0, max(1, model.num_classes), (batch,), generator=g)
    return x, t, labels if model.num_classes else None


def error(got: Tensor, true: Tensor) -> float:
    return float((got.double() - true).abs().max() / true.abs().max())
