"""One chunk of samples on its way from noise to data: the state, and the step that moves it.

A step is the model on B rows, or 2B where it is guided, and one call of `diffusion_step`, which
reads its row of the table, guides, predicts, draws seeded noise and updates. Where a solver adds
noise before the model is called, that is a call of the same op. Nothing in a step depends on a
value on the host: its index is on the device, so that a CUDA graph of one step replays for all of
its kind.

This is the one loop of all solvers. `fastdit.Sampler` runs a DiT through it, and
`fastdit.flow.Sampler` whatever is called like a model.

Eagerly, a step reads its conditioning as a view and its result becomes the next x. Captured, it
must read and write where the capture did: the rows are gathered by the index on the device, and x
and x0 copied back. Launches of a captured step beside the model's: the rows, x twice over, the
noise, its update where it comes first, the update, x, x0 (2M and Heun only), the index.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdit import ops
from fastdit.plan import Kind, Plan
from fastdit.sampler.conditioning import Conditioning
from fastdit.sampler.conditions import Conditions
from fastdit.sampler.denoiser import Denoiser
from fastdit.sampler.noise import Draw


@dataclass(frozen=True)
class Recipe:
    """What all chunks of a call share.

    Attributes:
        denoise: called in the model's place.
        plan: the solver's rows.
        table: the plan's whole table on the device.
        times: the plan's, `(E,)` on the device.
        guided_channels: of a guided step.
        draw: an evaluation's noise; None draws it from the samples' seeds.
        clip: of x0.
    """

    denoise: Denoiser
    plan: Plan
    table: Tensor
    times: Tensor
    guided_channels: int
    draw: Draw | None
    clip: float | None = None


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
        seen: what the model was given in it.
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
        self.q, self.seen = torch.zeros_like(x), x
        places = conditions.places
        null = torch.full_like(places, conditions.count - 1)
        self.places = {False: places, True: torch.cat([places, null])}
        # On the device: the step's row, the row of the noise before it, then the conditioning row
        # of every sample and its null.
        first = places.new_tensor([0, len(recipe.plan) + 1])
        self.cursor = torch.cat([first, self.places[True]])
        ones = torch.ones_like(first)
        self.stride = torch.cat([ones, torch.full_like(self.places[True], conditions.count)])
        self.first, self.rows = first, torch.arange(len(recipe.table), device=x.device).unbind()
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
        self.cursor[:2].copy_(self.first)
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
        self.cursor[2:].copy_(self.places[True])

    def advance(self, step: int) -> None:
        """An eager step; `step` is its index."""
        plan = self.recipe.plan
        before = self.rows[len(plan) + 1 + step] if plan.noise_before is not None else None
        self.x, self.q = self._evaluate(plan.kind(step), self.rows[step], before, step)

    def advance_captured(self, kind: Kind) -> None:
        """The step that a graph captures: its rows are in `cursor`."""
        x, q = self._evaluate(kind, self.cursor[0], self.cursor[1], None)
        self.x.copy_(x)
        if self.recipe.plan.multistep:
            self.q.copy_(q)
        else:
            self.q = q
        self.cursor.add_(self.stride)

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
        drawn = recipe.draw(x) if kind.draws and recipe.draw is not None else None
        used = kind.draws and plan.noisy
        noise = {"noise": drawn, "seed": self.seeds} if used else {}
        if used and plan.noise_before is not None:
            x, _ = ops.diffusion_step(x, x, recipe.table, before, **noise)
            noise = {}
        self.seen = x
        output = self._denoise(torch.cat([x, x]) if kind.guided else x, kind.guided, index, step)
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

    def _denoise(self, x: Tensor, guided: bool, index: Tensor, step: int | None) -> Tensor:
        denoise, places = self.recipe.denoise, self.places[guided]
        if self.conditioning is None:
            t = self.recipe.times.index_select(0, index.reshape(1)).expand(len(x))
            return denoise(x, t, self.conditions.select(places))
        held = self.conditioning.table
        if step is None:
            rows = held.flatten(0, 1).index_select(0, self.cursor[2 : 2 + len(places)])
        else:
            rows = held[step - self.conditioning.start].index_select(0, places)
        return denoise(x, None, None, conditioning=rows)
