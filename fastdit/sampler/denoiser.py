"""What a step calls in the model's place.

A denoiser is called like the model, `forward(x, t, y, conditioning=rows)`, and returns what the
model returns. Here is the one place where another implementation of the forward replaces it.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from fastdit.backends import BackendError
from fastdit.native_forward import NativeForward

Denoiser = Callable[..., Tensor]


def denoiser(model: nn.Module, native: bool | None = None, quantize: str | None = None) -> Denoiser:
    """The forward that a sampler's steps call.

    Args:
        model: a DiT.
        native: True asks for one native call of the whole model (`fastdit.NativeForward`), and is
            an error where it cannot run; False is the model itself; None takes the native call on
            CPUs where it can run.
        quantize: see `fastdit.NativeForward`; None computes in the model's own numbers.

    Raises:
        BackendError: what was asked for cannot run this model here; the message says why.
    """
    on_cpu = next(model.parameters()).device.type == "cpu"
    if native is False and quantize is not None:
        raise BackendError(
            f"quantize={quantize!r}: only the native forward has it, not native=False"
        )
    if native is False or not (on_cpu or native or quantize is not None):
        return model
    forward = NativeForward(model) if quantize is None else NativeForward(model, quantize=quantize)
    runs = forward.explain()
    if not runs.startswith("the model: "):
        return forward
    if native or quantize is not None:
        raise BackendError(f"native=True: no native forward: {runs.removeprefix('the model: ')}")
    return model
