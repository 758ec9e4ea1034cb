"""A flow's solvers as plans of the sampling engine; their rows are `fastdit.flow.tables`'s."""

from __future__ import annotations

from fastdit.flow.solvers import ODE, SDE, SOLVERS, Solver
from fastdit.flow.transport import Transport
from fastdit.ops._checks import fail
from fastdit.plan import Plan

FLOW_SOLVERS = tuple(SOLVERS)


def flow_plan(transport: Transport, solver: str | Solver | None, steps: int) -> Plan:
    """Every evaluation of a fixed-step solver.

    The rows give the drift, which is not clamped; `Plan.data` makes previews of it.

    Args:
        transport: what the model was trained with.
        solver: `"heun"` (the default), `"euler"`, `"sde"` or `"sde_heun"`, or an `ODE` or `SDE` of
            `fastdit.flow`.
        steps: the solver's, an SDE's last one among them. Heun's have two evaluations each.

    Raises:
        ValueError: an unknown solver, or steps that it does not have.
    """
    solver = "heun" if solver is None else solver
    if not isinstance(solver, ODE | SDE):
        if solver not in FLOW_SOLVERS:
            names = ", ".join(map(repr, FLOW_SOLVERS))
            fail("solver", repr(solver), f"{names}, an ODE or an SDE with a transport")
        solver = SOLVERS[solver]
    return solver.plan(transport, solver.times_of(steps))
