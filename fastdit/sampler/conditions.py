"""What a call's samples are conditioned on: the distinct conditions, and each sample's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdit.model import DiT
from fastdit.ops._checks import fail

Classes = Sequence[int] | Tensor | int
"""B labels; `(B, condition_dim)` vectors for a model of these; for one without condition the number
of samples."""


@dataclass(frozen=True)
class Conditions:
    """A call's conditions.

    Attributes:
        y: `(L,)` labels or `(L, condition_dim)` vectors, the null condition last where there are
            guided steps; None for a model without condition, whose L is 1.
        places: `(B,)`, each sample's condition.
        count: L.
    """

    y: Tensor | None
    places: Tensor
    count: int

    def repeated(self, times: int) -> Tensor | None:
        """All y, one after another, `times` times."""
        return None if self.y is None else self.y.repeat(times, *[1] * (self.y.dim() - 1))

    def select(self, places: Tensor) -> Tensor | None:
        """The y of rows."""
        return None if self.y is None else self.y.index_select(0, places)


def given_conditions(model: DiT, classes: Classes) -> tuple[Tensor | None, int]:
    """The y of every sample, checked, and how many there are."""
    if model.y_embedder is None:
        if not isinstance(classes, int) or isinstance(classes, bool) or classes < 1:
            fail("classes", repr(classes), "a number of samples, of a model without condition")
        return None, classes
    if model.design.condition_dim:
        vectors, width = torch.as_tensor(classes), model.design.condition_dim
        if vectors.dim() != 2 or vectors.shape[1] != width or len(vectors) == 0:
            fail("classes", tuple(vectors.shape), f"(B, {width}) vectors")
        return vectors, len(vectors)
    try:
        labels = torch.as_tensor(classes)
    except (TypeError, ValueError, RuntimeError):
        fail("classes", repr(classes), "a list of labels")
    if labels.dim() != 1 or labels.numel() == 0:
        fail("classes", tuple(labels.shape), "a non-empty list of labels")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        fail("classes", repr(classes), "integer labels")
    labels = labels.long()
    if labels.min() < 0 or labels.max() >= model.num_classes:
        fail("classes", labels.tolist(), f"0 to {model.num_classes - 1}")
    return labels, len(labels)


def conditions(
    model: DiT, classes: Classes, *, guided: bool, padded: bool, device: torch.device
) -> Conditions:
    """The conditions of a call.

    Args:
        model: says which are allowed, and what its null condition is.
        classes: see `Classes`.
        guided: add the null condition.
        padded: fill up to a power of two, so that a call with other conditions finds the graph
            that an earlier one captured.
        device: of the result.

    Raises:
        ValueError: conditions that the model does not have.
    """
    given, samples = given_conditions(model, classes)
    if given is None:
        return unconditional(samples, device)
    return grouped(given.to(device), model.null_condition(1) if guided else None, padded)


def unconditional(samples: int, device: torch.device) -> Conditions:
    """Of a model without condition."""
    return Conditions(None, torch.zeros(samples, dtype=torch.int64, device=device), 1)


def grouped(y: Tensor, null: Tensor | None, padded: bool) -> Conditions:
    """The distinct ones of `(B, ...)` y, behind them `null` `(1, ...)` if there is one; filled up
    to a power of two if `padded`."""
    distinct, places = y.unique(dim=0, return_inverse=True)
    more = int(null is not None)
    if padded:
        more = (1 << (len(distinct) + more - 1).bit_length()) - len(distinct)
    if more:
        last = distinct[-1:] if null is None else null
        distinct = torch.cat([distinct, last.expand(more, *last.shape[1:]).to(distinct)])
    return Conditions(distinct, places, len(distinct))
