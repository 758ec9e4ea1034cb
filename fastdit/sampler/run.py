"""One chunk of samples on its way from noise to data: the state, and the step that moves it.

A step is the model on B rows, or 2B where it is guided, and one call of `diffusion_step`, which
reads its row of the table, guides, predicts, draws seeded noise and updates. Where a solver adds
noise before the model is called, that is a call of the same op. Nothing in a step depends on a
value on the host: its index is on the device, so that a CUDA graph of one step replays for all of
its kind (`fastdit.sampler.graphs`).

This is the one loop of all solvers, `for step in run`: `fastdit.Sampler` runs a DiT through it, the
published loops and `fastdit.flow.Sampler` whatever is called like a model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdit import ops
from fastdit.ops._checks import described, fail
from fastdit.plan import Kind, Plan
from fastdit.sampler.conditioning import Conditioning
from fastdit.sampler.conditions import Conditions
from fastdit.sampler.denoiser import Denoiser
from fastdit.sampler.noise import Draw


@dataclass(frozen=True)
class Recipe:
    """What all chunks of a call share.

    Attributes:
        denoise: called in the model's place; None when the call has ended.
        plan: the solver's rows.
        table: the plan's whole table on the device.
        times: the plan's, `(E,)` on the device.
        guided_channels: of a guided step.
        draw: an evaluation's noise; None draws it from the samples' seeds.
        clip: of x0.
    """

    denoise: Denoiser | None
    plan: Plan
    table: Tensor
    times: Tensor
    guided_channels: int
    draw: Draw | None
    clip: float | None = None


class Loop(ABC):
    """Steps in their order; iterating takes them and yields the index of each when it is done."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def advance(self, step: int) -> None:
        """Take a step; `step` is its index."""

    @abstractmethod
    def result(self) -> dict[str, Tensor]:
        """`sample` and `pred_xstart` after the last step taken; they stay as they are."""

    @abstractmethod
    def resume(self, result: dict[str, Tensor]) -> None:
        """Go on from a `result`, which may have been changed."""

    def __iter__(self) -> Iterator[int]:
        for step in range(len(self)):
            with torch.no_grad():
                self.advance(step)
            yield step


class Run(Loop):
    """A chunk's state.

    Args:
        recipe: of the call.
        x: `(B, C, ...)`, the start noise.
        conditions: the call's, with the places of this chunk's samples.
        seeds: `(B,)` int64, in a seeded run.
        conditioning: the rows of the call; None leaves them to the model.

    Attributes:
        x: the samples.
        q: what the last step predicted: x0, or a flow's drift.
        seen: what the model was given in it.
    """

    def __init__(
        self,
        recipe: Recipe,
        x: Tensor,
        conditions: Conditions,
        seeds: Tensor | None = None,
        conditioning: Conditioning | None = None,
    ) -> None:
        self.recipe, self.conditioning = recipe, conditioning
        self.x, self.conditions, self.seeds = x, conditions, seeds
        self.q, self.seen = torch.zeros_like(x), x
        places = conditions.places
        null = torch.full_like(places, conditions.count - 1)
        self.places = {False: places, True: torch.cat([places, null])}
        self.rows = torch.arange(len(recipe.table), device=x.device).unbind()

    def __len__(self) -> int:
        return len(self.recipe.plan)

    def advance(self, step: int) -> None:
        plan = self.recipe.plan
        before = self.rows[len(plan) + 1 + step] if plan.noise_before is not None else None
        self.x, self.q = self._evaluate(plan.kind(step), self.rows[step], before, step)

    def result(self) -> dict[str, Tensor]:
        return {"sample": self.x, "pred_xstart": self.q}

    def resume(self, result: dict[str, Tensor]) -> None:
        self.x, self.q = self._resumable(result["sample"]), result["pred_xstart"]

    def _resumable(self, x: Any) -> Tensor:
        if not isinstance(x, Tensor) or x.shape != self.x.shape or x.device != self.x.device:
            fail("sample", described(x), f"{tuple(self.x.shape)} on {self.x.device}, as it was")
        return x

    def predicted(self, step: int) -> Tensor:
        """What the step just done predicts the data to be, in the tensors that it has now."""
        data = self.recipe.plan.data
        if data is None:
            return self.q
        of_x, of_q = data[step].tolist()
        return of_x * self.seen + of_q * self.q

    def _evaluate(
        self, kind: Kind, index: Tensor, before: Tensor | None, step: int | None
    ) -> tuple[Tensor, Tensor]:
        """x and q after a row of the table; `before` is the row of the noise that it wants in x."""
        recipe, plan, x = self.recipe, self.recipe.plan, self.x
        noise = {} if plan.draws_last else self._noise(kind)
        if noise and plan.noise_before is not None:
            x, _ = ops.diffusion_step(x, x, recipe.table, before, **noise)
            noise = {}
        self.seen = x
        output = self._denoise(torch.cat([x, x]) if kind.guided else x, kind.guided, index, step)
        if plan.draws_last:
            noise = self._noise(kind)
        return ops.diffusion_step(
            x,
            output,
            recipe.table,
            index,
            **noise,
            x0_previous=self.q if plan.multistep else None,
            clip=recipe.clip,
            learned_range=plan.learned_range,
            guided_channels=recipe.guided_channels if kind.guided else 0,
        )

    def _noise(self, kind: Kind) -> dict[str, Any]:
        """What the op takes for a row's noise; as published, what is not used is drawn too."""
        if not kind.draws:
            return {}
        drawn = None if self.recipe.draw is None else self.recipe.draw(self.x)
        return {"noise": drawn, "seed": self.seeds} if self.recipe.plan.noisy else {}

    def _denoise(self, x: Tensor, guided: bool, index: Tensor, step: int | None) -> Tensor:
        denoise, places = self.recipe.denoise, self.places[guided]
        if self.conditioning is None:
            t = self.recipe.times.index_select(0, index.expand(len(x)))
            return denoise(x, t, self.conditions.select(places))
        return denoise(x, None, None, conditioning=self._rows(places, step))

    def _rows(self, places: Tensor, step: int | None) -> Tensor:
        """The conditioning rows of a step."""
        return self.conditioning.rows(step, places)
