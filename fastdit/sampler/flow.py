"""A flow's solvers as plans of the sampling engine; their rows are `fastdit.flow.tables`'s."""

from __future__ import annotations

import numpy as np

from fastdit.flow import Transport
from fastdit.flow.sampling import SOLVERS, solver_plan
from fastdit.ops._checks import fail
from fastdit.sampler.plan import Plan

FLOW_SOLVERS = tuple(solver for solver in SOLVERS if solver != "dopri5")


def flow_plan(transport: Transport, solver: str | None, steps: int | None) -> Plan:
    """Every evaluation of a fixed-step solver from noise to data.

    The rows give the drift, which is not clamped; `Plan.data` makes previews of it.

    Args:
        transport: what the model was trained with.
        solver: `"heun"` (the default), `"euler"` or `"sde"`.
        steps: the solver's; None is 25. Heun's have two evaluations each.

    Raises:
        ValueError: an unknown solver, or steps that it does not have.
    """
    solver = "heun" if solver is None else solver
    if solver not in FLOW_SOLVERS:
        fail("solver", repr(solver), ", ".join(map(repr, FLOW_SOLVERS)) + " with a transport")
    rows = solver_plan(transport, solver, 25 if steps is None else steps)
    return Plan(
        times=(rows.times * transport.time_scale).numpy(),
        table=rows.table.numpy(),
        multistep=any(rows.corrects),
        draws=any(rows.draws),
        noisy=any(rows.draws),
        ends=rows.ends,
        data=np.asarray(rows.data),
    )
