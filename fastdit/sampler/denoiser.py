"""What a step calls in the model's place.

A denoiser is called like the model, `forward(x, t, y, conditioning=rows)`, and returns what the
model returns. Here is the one place where another implementation of the forward replaces it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastdit.backends import BackendError
from fastdit.native_forward import NativeForward

Denoiser = Callable[..., Tensor]


def stand_in(model: nn.Module, native: bool | None, quantize: str | None) -> NativeForward | None:
    """What may run in the model's place; a sampler keeps it, for it keeps the packed weights.

    Args:
        model: a DiT.
        native: False is the model itself. True asks for the native forward, and is an error where
            it does not fit; None takes it where it does: on CPUs, in float32.
        quantize: numbers of its matrix products, see `fastdit.NativeForward`; None is float32.

    Raises:
        ValueError: `quantize` is unknown, or asked for with native=False.
    """
    if native is False:
        if quantize is not None:
            raise ValueError(
                f"native: got False with quantize={quantize!r}, allowed is None or True"
            )
        return None
    return NativeForward(model, quantize)


def denoiser(model: nn.Module, forward: NativeForward | None, required: bool) -> Denoiser:
    """The forward that a sampler's steps call.

    Args:
        model: a DiT.
        forward: its stand-in, or None.
        required: whether the stand-in was asked for, with native=True or quantize.

    Raises:
        BackendError: it was asked for and does not fit; the message says why.
    """
    if forward is None:
        return model
    if required:
        with torch.no_grad():
            why = forward.unfit()
        if why is not None:
            asked = f"quantize={forward.quantize!r}" if forward.quantize else "native=True"
            raise BackendError(f"{asked}: the native forward does not fit: {why}")
    return forward if next(model.parameters()).device.type == "cpu" else model
