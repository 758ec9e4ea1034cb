"""A flow's fixed-step solvers and their options, each a plan of the sampling engine.

    sampler = fastdit.Sampler(model, transport=transport, solver="heun", steps=25)
    sde = fastdit.flow.SDE("Heun", diffusion_form="linear", last_step="Tweedie")
    sampler = fastdit.Sampler(model, transport=transport, solver=sde, steps=100)

The options have the published names and defaults; `fastdit.flow.tables` derives the rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastdit.flow import tables
from fastdit.flow.paths import FORMS
from fastdit.flow.transport import Transport, shifted
from fastdit.ops import _checks
from fastdit.plan import Plan

ODE_METHODS = {"euler": False, "heun": True, "heun2": True}
"""The fixed-step ODE methods, and whether they correct."""

SDE_METHODS = {"Euler": False, "Heun": True}


def _one_of(name: str, value: Any, allowed: Any) -> None:
    if value not in allowed:
        _checks.fail(name, repr(value), ", ".join(map(repr, allowed)))


@dataclass(frozen=True)
class ODE:
    """The probability flow ODE dx = v·dt by a fixed-step method.

    Args:
        sampling_method: `"euler"`, or `"heun"` (also called `"heun2"`).
        reverse: from data to noise.

    Raises:
        ValueError: an unknown method.
    """

    sampling_method: str = "heun"
    reverse: bool = False

    def __post_init__(self) -> None:
        _one_of("sampling_method", self.sampling_method, ODE_METHODS)

    def plan(self, transport: Transport, num_steps: int) -> Plan:
        """The evaluations through a grid of `num_steps` times, ends included."""
        times = grid(transport, num_steps, reverse=self.reverse)
        heun = ODE_METHODS[self.sampling_method]
        plan = tables.ode_plan(transport.path, transport.model_type, times, heun)
        return replace(_scaled(plan, transport), from_data=self.reverse)

    def times_of(self, steps: int) -> int:
        """The times on the grid of so many steps."""
        return checked_steps(steps, 1) + 1


@dataclass(frozen=True)
class SDE:
    """The SDE dx = (v + w·s)dt + √(2w)·dW, whose x has the ODE's distribution at every t.

    Args:
        sampling_method: `"Euler"` (Euler-Maruyama) or `"Heun"`.
        diffusion_form: w: `"constant"` 1, `"SBDM"` g, `"sigma"` σ, `"linear"` 1 − t,
            `"decreasing"` ¼(cos πt + 1)², `"increasing-decreasing"` sin² πt.
        diffusion_norm: scales w.
        last_step: how the last step, without noise, ends: `"Mean"`, `"Tweedie"`, `"Euler"` or None
            for none; see `fastdit.flow.tables.sde_plan`.
        last_step_size: its length; None is one step's share of the time.
        diffusion_floor: w is taken at max(t, floor). None takes it at t, as published, except where
            it is infinite: SBDM at t = 0, where the published result is NaN, takes it one step
            later.

    Raises:
        ValueError: an option that is not allowed, which is named.
    """

    sampling_method: str = "Euler"
    diffusion_form: str = "SBDM"
    diffusion_norm: float = 1.0
    last_step: str | None = "Mean"
    last_step_size: float | None = 0.04
    diffusion_floor: float | None = None

    def __post_init__(self) -> None:
        _one_of("sampling_method", self.sampling_method, SDE_METHODS)
        _one_of("diffusion_form", self.diffusion_form, FORMS)
        _one_of("last_step", self.last_step, tables.LAST_STEPS)
        if self.last_step_size is not None and not 0 < self.last_step_size < 1:
            got = repr(self.last_step_size)
            _checks.fail("last_step_size", got, "None or a number between 0 and 1")
        if not 0 <= self.diffusion_norm < math.inf:
            _checks.fail("diffusion_norm", repr(self.diffusion_norm), "a finite number >= 0")
        if self.diffusion_floor is not None and not 0 <= self.diffusion_floor < 1:
            _checks.fail("diffusion_floor", repr(self.diffusion_floor), "None or 0 to below 1")

    def plan(self, transport: Transport, num_steps: int) -> Plan:
        """The evaluations through a grid of `num_steps` times, and the last step."""
        size = 1 / max(2, num_steps) if self.last_step_size is None else self.last_step_size
        size = 0.0 if self.last_step is None else size
        form = self.diffusion_form
        times = grid(transport, num_steps, sde=True, diffusion_form=form, last_step_size=size)
        plan = tables.sde_plan(
            transport.path,
            transport.model_type,
            times,
            heun=SDE_METHODS[self.sampling_method],
            form=form,
            norm=self.diffusion_norm,
            floor=self.diffusion_floor,
            last_step=self.last_step,
            size=size,
        )
        return _scaled(plan, transport)

    def times_of(self, steps: int) -> int:
        """The times on the grid of so many steps, the last one among them."""
        last = self.last_step is not None
        return checked_steps(steps, 1 + last) + (not last)


Solver = ODE | SDE

SOLVERS: dict[str, Solver] = {
    "euler": ODE("euler"),
    "heun": ODE("heun"),
    "sde": SDE("Euler", "sigma", last_step_size=None),
    "sde_heun": SDE("Heun", "sigma", last_step_size=None),
}
"""Solvers by name; the SDEs' w = σ and `"Mean"` are the published script's choice."""


def checked_steps(steps: Any, least: int) -> int:
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < least:
        _checks.fail("steps", repr(steps), f"an int >= {least}")
    return steps


def grid(transport: Transport, num_steps: int, **interval: Any) -> Tensor:
    """The times `(num_steps,)`, float64 of float32 values: those that the published code has."""
    if not isinstance(num_steps, int) or isinstance(num_steps, bool) or num_steps < 2:
        _checks.fail("num_steps", repr(num_steps), "an int >= 2")
    t0, t1 = transport.check_interval(
        transport.train_eps, transport.sample_eps, eval=True, **interval
    )
    times = torch.linspace(t0, t1, num_steps, dtype=torch.float32).double()
    return shifted(times, transport.timestep_shift)


def _scaled(plan: Plan, transport: Transport) -> Plan:
    return replace(plan, times=plan.times * transport.time_scale)
