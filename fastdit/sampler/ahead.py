"""A loop's model, with the conditioning of every step computed ahead.

A loop such as `p_sample_loop(model.forward_with_cfg, ..., model_kwargs={"y": y, "cfg_scale": 4.0})`
calls the model once a step, with times that are known before the first and conditions that never
change. Where the model is a plain DiT its conditioning is therefore hoisted out of the loop, as
`fastdit.Sampler` does, and the steps call the same forward.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdit.embeddings import LabelEmbedder
from fastdit.model import DiT
from fastdit.sampler.conditioning import Conditioning
from fastdit.sampler.conditions import Conditions, grouped, unconditional
from fastdit.sampler.denoiser import Denoiser, denoiser, stand_in

BUDGET = 2**30
_OPTIONS = {"forward": set(), "forward_with_cfg": {"cfg_scale", "guided_channels"}}


class NotPlain(Exception):
    """Why a model is called as it is in every step."""


@dataclass(frozen=True)
class Ahead:
    """A plain DiT as the engine calls it.

    Attributes:
        denoise: called as `denoise(x, t, y)` or `denoise(x, None, None, conditioning=rows)`.
        conditions: of the rows of a step, or of those without the null half.
        conditioning: the rows of all times; None where the budget does not hold one time's.
    """

    denoise: Denoiser
    conditions: Conditions
    conditioning: Conditioning | None


@dataclass(frozen=True)
class PlainDiT:
    """A DiT whose method is called in a loop with nothing else to it.

    Attributes:
        model: the DiT.
        method: its name.
        options: what the method is called with beside y.
        y: `(B, ...)`, what all calls are conditioned on; None in a model without condition.
    """

    model: DiT
    method: str
    options: dict[str, Any]
    y: Tensor | None

    @torch.no_grad()
    def ahead(
        self,
        x: Tensor,
        times: Tensor,
        *,
        halves: bool = False,
        padded: bool = False,
        reuse: Sequence[Tensor] = (),
    ) -> Ahead:
        """The model with its conditioning computed.

        Args:
            x: `(B, C, ...)`, what it will be called with.
            times: `(E,)` on x's device, in their order.
            halves: the second half of y is one null condition, and not of all steps.
            padded, reuse: for a captured graph, see `conditions` and `Conditioning`.
        """
        if self.y is None:
            given = unconditional(len(x), x.device)
        elif halves:
            given = grouped(self.y[: len(self.y) // 2], self.y[-1:], padded)
        else:
            given = grouped(self.y, None, padded)
        forward = stand_in(self.model, None, None)
        rows = Conditioning(forward, times, given, BUDGET, reuse)
        if rows.steps:
            rows.fill(0)
        run = denoiser(self.model, forward, required=False)
        call = run if self.method == "forward" else run.forward_with_cfg
        call = functools.partial(call, **self.options) if self.options else call
        return Ahead(call, given, rows if rows.steps else None)


def plain(model: Any, x: Tensor, model_kwargs: dict[str, Any] | None) -> PlainDiT:
    """The DiT that `model` is, where calling it is one of its own methods and nothing else.

    Args:
        model: what a loop was given.
        x: `(B, C, ...)`, its start.
        model_kwargs: what the model is called with.

    Raises:
        NotPlain: it is something else; the message says what.
    """
    kwargs = dict(model_kwargs or {})
    if isinstance(model, functools.partial) and not model.args:
        model, kwargs = model.func, {**model.keywords, **kwargs}
    owner, method = getattr(model, "__self__", model), getattr(model, "__name__", "forward")
    if type(owner) is not DiT:
        raise NotPlain(f"the model is a {type(owner).__name__}, not a fastdit.DiT or its method")
    if owner.training or "forward" in vars(owner) or method not in _OPTIONS:
        raise NotPlain("the DiT is in training mode, or its forward is another")
    if owner._forward_hooks or owner._forward_pre_hooks or torch.compiler.is_compiling():
        raise NotPlain("the DiT has a forward hook, or torch.compile traces it")
    y = kwargs.pop("y", None)
    if not kwargs.keys() <= _OPTIONS[method]:
        raise NotPlain(f"it is called with {', '.join(kwargs.keys() - _OPTIONS[method])}")
    if x.is_meta or not len(x) or not _ordinary(owner, y, x):
        raise NotPlain("its y is none that it has, or there are no samples")
    return PlainDiT(owner, method, kwargs, y)


def _ordinary(model: DiT, y: Any, x: Tensor) -> bool:
    """Whether y is one of the model's conditions for each sample. Any other is left to the model,
    which says what is wrong."""
    if model.y_embedder is None:
        return y is None
    if not isinstance(y, Tensor) or y.device != x.device or len(y) != len(x):
        return False
    if not isinstance(model.y_embedder, LabelEmbedder):
        return y.shape[1:] == (model.design.condition_dim,) and y.is_floating_point()
    if y.dtype != torch.int64 or y.dim() != 1:
        return False
    return bool(y.min() >= 0) and bool(y.max() < model.num_classes + model.guidable)
