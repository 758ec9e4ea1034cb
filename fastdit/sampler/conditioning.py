"""A run's conditioning, computed before its steps: everything in a forward that x has no part in.

The timestep and label embedders and all layers' modulations depend on (t, label) alone. A run has
E times and L distinct conditions (the null class is one of them), so its E·L rows of
`model.conditioning` are one matrix product, and each step reads its own. A third of a DiT-XL's
weights then leaves the loop. The rows weigh E·L·W elements: 390 MB for a DiT-XL/2, 250 steps, one
class and null in float32. Beyond a budget they are computed for as many steps at a time as it
holds; a budget that does not hold one step's rows, 0 for instance, leaves them to the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from fastdit.sampler.conditions import Conditions


class Conditioning:
    """The rows of a run, `(steps, L, W)` of them at a time.

    Args:
        model: with the method `conditioning(t, y)`.
        times: `(E,)`, on the model's device, in the order of the run.
        conditions: of the call, L distinct ones.
        budget: bytes that the rows may take.
        reuse: a table of an earlier run to write to, if it has the shape: the one that a captured
            graph reads.

    Attributes:
        steps: how many steps' rows are held at a time; 0 where the budget holds none.
        start: the first step of those held.
        table: the rows held, `(steps, L, W)`; the same tensor from the first `fill` on.
    """

    def __init__(
        self,
        model: Any,
        times: Tensor,
        conditions: Conditions,
        budget: int,
        reuse: Sequence[Tensor] = (),
    ) -> None:
        self.model, self.times, self.conditions = model, times, conditions
        # A row's width is the model's own business: ask for one row.
        y = None if conditions.y is None else conditions.y[:1]
        row = model.conditioning(times[:1], y)
        a_step = conditions.count * row.shape[1] * row.element_size()
        # A design without conditioning has rows of width 0: there is nothing to hold.
        self.steps = min(len(times), budget // a_step) if a_step else 0
        self.start = -len(times)
        shape = (self.steps, conditions.count, row.shape[1])
        fitting = [t for t in reuse if t.shape == shape and t.dtype == row.dtype]
        self.table: Tensor = fitting[0] if fitting else row.new_empty(0)

    def holds(self, step: int) -> bool:
        """Whether this step's rows are in the table."""
        return self.start <= step < self.start + self.steps

    def rows(self, step: int, places: Tensor) -> Tensor:
        """`(B, W)`, a step's rows of the conditions at `places` `(B,)`."""
        if not self.holds(step):
            self.fill(step)
        return self.table[step - self.start].index_select(0, places)

    # A table may outlive the call that made it, and be written to outside its inference mode.
    @torch.inference_mode(False)
    @torch.no_grad()
    def fill(self, step: int) -> None:
        """Hold the rows from `step` on."""
        times = self.times[step : step + self.steps]
        count, each = len(times), self.conditions.count
        t, y = times.repeat_interleave(each), self.conditions.repeated(count)
        with record_function("conditioning"):  # for `fastdit.profiling`
            rows = self.model.conditioning(t, y).view(count, each, -1)
        if self.table.numel():
            self.table[:count].copy_(rows)
        else:
            self.table = rows
        self.start = step
