"""What a sampling run does, step by step, before anything is on a device.

A `Plan` is a table of `fastdit.ops.diffusion_step` in the order in which its rows run, with what
each row needs besides: the time that the model is given, whether it is guided, whether it reads the
row before. Every solver becomes one; the loop that runs it knows no solver.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fastdit.diffusion import GaussianDiffusion, tables
from fastdit.ops._checks import fail
from fastdit.reference import TABLE_COLUMNS

GUIDANCE = TABLE_COLUMNS.index("guidance")
DIFFUSION_SOLVERS = ("ddpm", "ddim", "dpm++")


@dataclass(frozen=True)
class Plan:
    """E evaluations of the model and the update after each.

    Attributes:
        times: `(E,)`, what the model is given: int64 timesteps of a diffusion, float64 times of a
            flow.
        table: `(E, 9)` float64, a row for each evaluation.
        multistep: rows read the x0 (or drift) of the row before; the first row's weight for it
            is 0.
        draws: the solver draws noise at every evaluation, whether or not it is used.
        noisy: some row's noise is used.
        learned_range: the model's second half of channels chooses σ.
        guided: which rows are guided.
        ends: after which rows x is a step's result.
        data: `(E, 2)`: what is predicted of the data is data₀·x + data₁·q, with q the row's x0
            (or drift) and x before it; None where q itself is.
    """

    times: np.ndarray
    table: np.ndarray
    multistep: bool = False
    draws: bool = False
    noisy: bool = False
    learned_range: bool = False
    guided: tuple[bool, ...] = ()
    ends: tuple[bool, ...] = ()
    data: np.ndarray | None = None

    def __post_init__(self) -> None:
        none, all_of_them = (False,) * len(self), (True,) * len(self)
        object.__setattr__(self, "guided", self.guided or none)
        object.__setattr__(self, "ends", self.ends or all_of_them)

    def __len__(self) -> int:
        return len(self.times)

    def with_guidance(self, scale: float, interval: tuple[float, float] | None) -> Plan:
        """Guided at `scale` where the model's time lies in the closed `interval`; None is always.

        The table's other rows keep a guidance of 1, and are not guided at all: their steps need no
        null half.
        """
        low, high = (-np.inf, np.inf) if interval is None else interval
        inside = (self.times >= low) & (self.times <= high)
        table = self.table.copy()
        table[inside, GUIDANCE] = scale
        return dataclasses.replace(self, table=table, guided=tuple(map(bool, inside)))


def diffusion_plan(
    diffusion: GaussianDiffusion, solver: str, eta: float = 0.0, order: int = 2
) -> Plan:
    """Every step of a (respaced) diffusion from the last timestep to the first.

    Args:
        diffusion: the schedule, and what the model predicts.
        solver: `"ddpm"`, `"ddim"` or `"dpm++"`.
        eta: DDIM's noise.
        order: of DPM-Solver++, 1 or 2.

    Raises:
        ValueError: an unknown solver, or an option it does not have.
    """
    if solver not in DIFFUSION_SOLVERS:
        fail("solver", repr(solver), ", ".join(map(repr, DIFFUSION_SOLVERS)))
    if eta and solver != "ddim":
        fail("eta", repr(eta), f"0 with solver={solver!r}")
    if order not in (1, 2):
        fail("order", repr(order), "1 or 2")
    kinds = {
        "ddpm": (tables.ddpm, diffusion.model_var_type),
        "ddim": (tables.ddim, float(eta)),
        "dpm++": (tables.dpm_solver, order),
    }
    make: Callable[..., np.ndarray]
    make, option = kinds[solver]
    return Plan(
        times=np.array(diffusion.timestep_map[::-1], dtype=np.int64),
        table=make(diffusion, diffusion.model_mean_type, option)[::-1].copy(),
        multistep=solver == "dpm++" and order == 2,
        draws=solver != "dpm++",
        noisy=solver == "ddpm" or eta != 0,
        learned_range=solver == "ddpm" and diffusion.learns_variance,
    )
