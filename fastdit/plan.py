"""What a sampling run does, row by row, before anything is on a device.

A `Plan` is a table of `fastdit.ops.diffusion_step` in the order in which its rows run, with what
each row needs besides: the time that the model is given, whether it is guided, whether noise is
drawn for it. Every fixed-step solver, of a diffusion or of a flow, becomes one; the loop that runs
it (`fastdit.sampler.run`) knows no solver.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastdit.reference import TABLE_COLUMNS

GUIDANCE, SIGMA, CX = (TABLE_COLUMNS.index(name) for name in ("guidance", "sigma", "cx"))
_SLACK = 1e-6  # of the largest time: the ends of an interval are inside despite float32's rounding


class Kind(NamedTuple):
    """What differs from row to row in what is launched: rows of a kind share a CUDA graph.

    Attributes:
        guided: the model runs on 2B rows.
        draws: noise is drawn.
    """

    guided: bool
    draws: bool


@dataclass(frozen=True)
class Plan:
    """E evaluations of the model and the update after each.

    Attributes:
        times: `(E,)`, what the model is given: int64 timesteps of a diffusion, float64 times of a
            flow, scaled as its model wants them.
        table: `(E, 9)` float64, a row for each evaluation.
        multistep: rows read the x0 (or drift) of the row before; where they have no use for it
            its weight is 0.
        draws: for which rows the solver draws noise, whether or not it is used; () is none.
        noisy: what is drawn is used.
        draws_last: a row's noise is drawn when the model has been called, as published of
            diffusions; else before, as of flows. It matters to a model that draws.
        noise_before: `(E,)` float64, what a row's noise is multiplied by where it is added before
            the model is called; None where noise is added by the rows themselves.
        learned_range: the model's second half of channels chooses σ.
        guided: which rows are guided; () is none.
        ends: after which rows x is a step's result; () is all.
        data: `(E, 2)` float64: what is predicted of the data is data₀·x + data₁·q, with q the row's
            x0 (or drift) and x what the model was given; None where q itself is.
        from_data: the run goes from data to noise.
    """

    times: Tensor
    table: Tensor
    multistep: bool = False
    draws: tuple[bool, ...] = ()
    noisy: bool = False
    draws_last: bool = False
    noise_before: Tensor | None = None
    learned_range: bool = False
    guided: tuple[bool, ...] = ()
    ends: tuple[bool, ...] = ()
    data: Tensor | None = None
    from_data: bool = False

    def __post_init__(self) -> None:
        none, all_of_them = (False,) * len(self), (True,) * len(self)
        object.__setattr__(self, "draws", self.draws or none)
        object.__setattr__(self, "guided", self.guided or none)
        object.__setattr__(self, "ends", self.ends or all_of_them)

    def __len__(self) -> int:
        return len(self.times)

    def kind(self, step: int) -> Kind:
        """What a row launches."""
        return Kind(self.guided[step], self.draws[step])

    def with_guidance(self, scale: float, interval: tuple[float, float] | None) -> Plan:
        """Guided at `scale` where the model's time lies in the closed `interval`; None is always.

        The table's other rows keep a guidance of 1, and are not guided at all: their steps need no
        null half.
        """
        low, high = (-torch.inf, torch.inf) if interval is None else interval
        slack = _SLACK * float(self.times.abs().max())
        inside = (self.times >= low - slack) & (self.times <= high + slack)
        table = self.table.clone()
        table[inside, GUIDANCE] = scale
        return dataclasses.replace(self, table=table, guided=tuple(inside.tolist()))

    def whole_table(self) -> Tensor:
        """`(E + 1, 9)` or `(2E + 1, 9)`: the table; a row that draws start noise; and, where noise
        comes before the model, a row for each evaluation that adds its noise to x."""
        start = self.table.new_zeros(1, len(TABLE_COLUMNS))
        start[0, SIGMA] = 1
        rows = [self.table, start]
        if self.noise_before is not None:
            before = torch.zeros_like(self.table)
            before[:, SIGMA], before[:, CX] = self.noise_before, 1
            rows.append(before)
        return torch.cat(rows)
