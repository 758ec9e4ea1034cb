"""The published loops' model, with the conditioning of every step computed ahead.

A loop such as `p_sample_loop(model.forward_with_cfg, ..., model_kwargs={"y": y, "cfg_scale": 4.0})`
calls the model once a step, with times that are known before the first and labels that never
change. Where the model is a plain DiT its conditioning is therefore hoisted out of the loop, as
`fastdit.Sampler` does, and the steps call the same forward; so are those of `fastdit.flow.Sampler`.
Callbacks, noise and what a consumer does to the samples between the steps stay as they are: they
never see the difference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdit.model import DiT
from fastdit.sampler.conditioning import Conditioning
from fastdit.sampler.conditions import Conditions
from fastdit.sampler.denoiser import denoiser, stand_in

BUDGET = 2**30
_OPTIONS = {"forward": set(), "forward_with_cfg": {"cfg_scale", "guided_channels"}}


class Ahead:
    """A model that is called once for each of the times, in their order.

    Args:
        call: of the model.
        conditioning: the rows of all times.
        places: `(B,)`, each row's condition; a call with fewer rows has the first ones.
        options: what else the model is called with.
    """

    def __init__(
        self,
        call: Callable[..., Tensor],
        conditioning: Conditioning,
        places: Tensor,
        options: dict[str, Any],
    ) -> None:
        self.call, self.conditioning, self.places = call, conditioning, places
        self.options, self.step = options, 0

    def __call__(self, x: Tensor, _t: Tensor, **_kwargs: Any) -> Tensor:
        held = self.conditioning
        if not held.holds(self.step):
            held.fill(self.step)
        rows = held.table[self.step - held.start].index_select(0, self.places[: len(x)])
        self.step += 1
        return self.call(x, None, None, conditioning=rows, **self.options)


def _plain(model: Any, x: Tensor, kwargs: dict[str, Any]) -> tuple[DiT, str] | None:
    """The DiT that `model` is, and its method, where calling it is that method and nothing else."""
    owner = getattr(model, "__self__", model)
    name = getattr(model, "__name__", "forward")
    if type(owner) is not DiT or owner.training or "forward" in vars(owner):
        return None
    if name not in _OPTIONS or not _OPTIONS[name] | {"y"} >= kwargs.keys() >= {"y"}:
        return None
    if owner._forward_hooks or owner._forward_pre_hooks or torch.compiler.is_compiling():
        return None
    y = kwargs["y"]
    ordinary = isinstance(y, Tensor) and y.dtype == torch.int64 and y.device == x.device
    return (owner, name) if ordinary and y.shape == x.shape[:1] and not x.is_meta else None


@torch.no_grad()
def ahead(model: Any, x: Tensor, times: Tensor, model_kwargs: dict[str, Any] | None) -> Any:
    """`model`, or the same with its conditioning computed ahead.

    Args:
        model: what a loop was given.
        x: `(B, C, ...)`, its start.
        times: `(E,)`, what the model will be called with, in this order.
        model_kwargs: what else.
    """
    kwargs = dict(model_kwargs or {})
    found = _plain(model, x, kwargs)
    if found is None or not len(x):
        return model
    owner, name = found
    distinct, places = kwargs.pop("y").unique(return_inverse=True)
    if distinct[0] < 0 or distinct[-1] > owner.num_classes - (not owner.guidable):
        return model  # which says what is wrong
    forward = stand_in(owner, None, None)
    given = Conditions(distinct, places, len(distinct))
    rows = Conditioning(forward, times.to(x.device), given, BUDGET)
    if not rows.steps:
        return model
    run = denoiser(owner, forward, required=False)
    call = run if name == "forward" else run.forward_with_cfg
    return Ahead(call, rows, places, kwargs)
