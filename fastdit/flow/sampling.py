"""What `fastdit.sample` does for a flow model: its solvers by name, on the labels' rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdit.flow.guidance import Guidance
from fastdit.flow.sampler import Sampler
from fastdit.flow.tables import Plan
from fastdit.flow.transport import Transport
from fastdit.ops import _checks

SOLVERS = ("euler", "heun", "dopri5", "sde")
"""`sde` is Euler-Maruyama with w = σ and Mean as its last step, the published script's choice."""


def solver_plan(transport: Transport, solver: str, steps: int) -> Plan:
    """The rows of a fixed-step solver, `steps` of equal length in time: `euler` and `sde` have one
    evaluation in each, `heun` two."""
    if solver not in SOLVERS or solver == "dopri5":
        allowed = ", ".join(map(repr, SOLVERS))
        _checks.fail("solver", repr(solver), f"{allowed} with a transport")
    least = 3 if solver == "sde" else 1
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < least:
        _checks.fail("steps", repr(steps), f"an int >= {least} with solver={solver!r}")
    sampler = Sampler(transport)
    if solver == "sde":
        return sampler.sde_plan("Euler", steps, diffusion_form="sigma", last_step_size=1 / steps)
    return sampler.ode_plan(solver, steps + 1)


def draw(
    transport: Transport,
    model: Any,
    z: Tensor,
    y: Tensor | None,
    *,
    steps: int,
    solver: str,
    guidance: Guidance | None,
    progress: bool = False,
    observe: Callable[[float, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Samples like `z`, the start noise, for the condition `y` that the model is called with.

    `steps` are `solver_plan`'s; `dopri5` takes the steps that its tolerances want instead, and
    cannot be observed.
    """
    if solver == "dopri5":
        if observe is not None:
            _checks.fail("observe", "a function", "None with solver='dopri5'")
        sample = Sampler(transport).sample_ode(num_steps=2, guidance=guidance)
        return sample(z, model, y=y)[-1]
    plan = solver_plan(transport, solver, steps)
    scaled = None
    if observe is not None:
        scaled = lambda t, *rest: observe(t * transport.time_scale, *rest)  # noqa: E731
    states = Sampler(transport).states(plan, z, model, {"y": y}, guidance, torch.randn_like, scaled)
    if progress:
        from tqdm.auto import tqdm

        states = tqdm(states, total=sum(plan.ends))
    for x in states:
        z = x
    return z
