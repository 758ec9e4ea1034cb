"""What `fastdit.sample` does for a flow model: its solvers by name, on the labels' rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdit.flow.guidance import Guidance
from fastdit.flow.sampler import Sampler
from fastdit.flow.transport import Transport
from fastdit.ops import _checks

SOLVERS = ("euler", "heun", "dopri5", "sde")
"""`sde` is Euler-Maruyama with w = σ and Mean as its last step, the published script's choice."""


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

    `steps` are the solver's, of equal length in time: `euler` calls the model once in each, `heun`
    twice; `dopri5` takes the steps that its tolerances want instead, and cannot be observed.
    """
    if solver not in SOLVERS:
        allowed = ", ".join(map(repr, SOLVERS))
        _checks.fail("solver", repr(solver), f"{allowed} with a transport")
    if not isinstance(steps, int) or steps < 1:
        _checks.fail("steps", repr(steps), "an int >= 1")
    sampler = Sampler(transport)
    if solver == "dopri5":
        if observe is not None:
            _checks.fail("observe", "a function", "None with solver='dopri5'")
        sample = sampler.sample_ode(num_steps=2, guidance=guidance)
        return sample(z, model, y=y)[-1]
    if solver == "sde":
        if steps < 3:
            _checks.fail("steps", steps, "an int >= 3 with solver='sde'")
        options: dict[str, Any] = {"diffusion_form": "sigma", "last_step_size": 1 / steps}
        plan = sampler.sde_plan("Euler", steps, **options)
    else:
        plan = sampler.ode_plan(solver, steps + 1)
    scaled = None
    if observe is not None:
        scaled = lambda t, *rest: observe(t * transport.time_scale, *rest)  # noqa: E731
    states = sampler.states(plan, z, model, {"y": y}, guidance, torch.randn_like, scaled)
    if progress:
        from tqdm.auto import tqdm

        states = tqdm(states, total=sum(plan.ends))
    for x in states:
        z = x
    return z
