"""What a step calls in the model's place.

A denoiser is called like the model, `forward(x, t, y, conditioning=rows)`, and returns what the
model returns. Here is the one place where another implementation of the forward replaces it.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from fastdit.backends import BackendError

Denoiser = Callable[..., Tensor]


def denoiser(model: nn.Module, native: bool | None, quantize: str | None) -> Denoiser:
    """The forward that a sampler's steps call.

    Args:
        model: a DiT.
        native: False is the model itself; True asks for a compiled forward of the whole stack of
            blocks, and is an error where there is none; None takes it where there is one.
        quantize: numbers of its matrix products, None for the model's own.

    Raises:
        BackendError: what was asked for does not exist for this model on its device.
    """
    if native or quantize is not None:
        asked = f"quantize={quantize!r}" if quantize is not None else "native=True"
        raise BackendError(f"{asked}: no compiled forward is registered for this model's device")
    return model
