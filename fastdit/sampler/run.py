"""One chunk of samples on its way from noise to data: the state, and the step that moves it.

A step is the model on B rows, or 2B where it is guided, and one call of `diffusion_step`, which
reads its row of the table, guides, predicts, draws seeded noise and updates. Nothing in it depends
on a value on the host: the step's index is on the device, so that a CUDA graph of one step replays
for all of them.

Eagerly, a step reads its conditioning as a view and its result becomes the next x. Captured, it
must read and write where the capture did: the rows are gathered by the index on the device, and x
and x0 copied back. Launches of a captured step beside the model's: the rows, x twice over, the
noise, the update, x, x0 (2M and Heun only), the index.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdit import ops
from fastdit.sampler.conditioning import Conditioning
from fastdit.sampler.conditions import Conditions
from fastdit.sampler.denoiser import Denoiser
from fastdit.sampler.plan import Plan


@dataclass(frozen=True)
class Recipe:
    """What all chunks of a call share.

    Attributes:
        denoise: called in the model's place.
        plan: the solver's rows.
        table: the plan's, `(E + 1, 9)` on the device; its last row draws the start noise.
        times: the plan's, `(E,)` on the device.
        clip: of x0.
        guided_channels: of a guided step.
        seeded: noise comes from the samples' seeds, not from torch's generator.
    """

    denoise: Denoiser
    plan: Plan
    table: Tensor
    times: Tensor
    clip: float | None
    guided_channels: int
    seeded: bool


class Run:
    """A chunk's state.

    Args:
        recipe: of the call.
        x: `(B, C, ...)`, the start noise.
        conditions: the call's, with the places of this chunk's samples.
        seeds: `(B,)` int64, in a seeded run.
        captured: steps write where they read, as a CUDA graph needs.

    Attributes:
        x: the samples.
        q: what the last step predicted: x0, or a flow's drift.
    """

    def __init__(
        self,
        recipe: Recipe,
        x: Tensor,
        conditions: Conditions,
        seeds: Tensor | None,
        captured: bool,
    ) -> None:
        self.recipe, self.captured = recipe, captured
        self.x, self.conditions, self.seeds = x, conditions, seeds
        self.q = torch.zeros_like(x)
        places = conditions.places
        null = torch.full_like(places, conditions.count - 1)
        self.places = {False: places, True: torch.cat([places, null])}
        # On the device: the step's index, then the conditioning row of every sample and its null.
        zero, one = places.new_zeros(1), places.new_ones(1)
        self.cursor = torch.cat([zero, self.places[True]])
        self.stride = torch.cat([one, torch.full_like(self.places[True], conditions.count)])
        self.steps = torch.arange(len(recipe.plan), device=x.device).unbind()
        self.conditioning: Conditioning | None = None

    def start(self, x: Tensor, conditions: Conditions, seeds: Tensor | None) -> None:
        """Begin again with another chunk of the same shape, in the same tensors."""
        self.x.copy_(x)
        self.q.zero_()
        if self.conditions.y is not None:
            self.conditions.y.copy_(conditions.y)
        places = conditions.places
        self.places[False].copy_(places)
        self.places[True][: len(places)].copy_(places)
        self.cursor[:1].zero_()
        self._first_rows()
        if self.seeds is not None:
            self.seeds.copy_(seeds)

    def hold(self, conditioning: Conditioning | None, step: int) -> None:
        """See to it that the step's conditioning rows are there. Not part of a captured step."""
        self.conditioning = conditioning
        if conditioning is None:
            return
        if not conditioning.holds(step):
            conditioning.fill(step)
        if self.captured and step == conditioning.start:
            self._first_rows()

    def _first_rows(self) -> None:
        self.cursor[1:].copy_(self.places[True])

    def advance(self, step: int) -> None:
        """An eager step; `step` is its index."""
        plan = self.recipe.plan
        self.x, self.q = self._evaluate(plan.guided[step], self.steps[step], step)

    def advance_captured(self, guided: bool) -> None:
        """The step that a graph captures: its index is in `cursor`."""
        x, q = self._evaluate(guided, self.cursor[0], None)
        self.x.copy_(x)
        if self.recipe.plan.multistep:
            self.q.copy_(q)
        else:
            self.q = q
        self.cursor.add_(self.stride)

    def _evaluate(self, guided: bool, index: Tensor, step: int | None) -> tuple[Tensor, Tensor]:
        recipe, plan = self.recipe, self.recipe.plan
        x = torch.cat([self.x, self.x]) if guided else self.x
        output = self._denoise(x, guided, index, step)
        return ops.diffusion_step(
            self.x,
            output,
            recipe.table,
            index,
            noise=self._noise(),
            seed=self.seeds if plan.noisy else None,
            x0_previous=self.q if plan.multistep else None,
            clip=recipe.clip,
            learned_range=plan.learned_range,
            guided_channels=recipe.guided_channels if guided else 0,
        )

    def _denoise(self, x: Tensor, guided: bool, index: Tensor, step: int | None) -> Tensor:
        denoise, places = self.recipe.denoise, self.places[guided]
        if self.conditioning is None:
            t = self.recipe.times.index_select(0, index.reshape(1)).expand(len(x))
            return denoise(x, t, self.conditions.select(places))
        held = self.conditioning.table
        if step is None:
            rows = held.flatten(0, 1).index_select(0, self.cursor[1 : 1 + len(places)])
        else:
            rows = held[step - self.conditioning.start].index_select(0, places)
        return denoise(x, None, None, conditioning=rows)

    def _noise(self) -> Tensor | None:
        """The published draw: for all rows of a guided batch, of which the first half is used."""
        plan = self.recipe.plan
        if self.recipe.seeded or not plan.draws:
            return None
        rows = len(self.x) * (2 if any(plan.guided) else 1)
        shape = (rows, *self.x.shape[1:])
        drawn = torch.randn(shape, dtype=self.x.dtype, device=self.x.device)[: len(self.x)]
        return drawn if plan.noisy else None
