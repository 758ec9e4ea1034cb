"""Fixed-step ODE and SDE solvers as rows of `diffusion_step`'s table, derived in float64.

The op computes q = a·x + b·e from the model's output e, and then x' = cx·x + c0·q + cp·q₋ + σ·z.
In a diffusion q is the predicted x0; here it is the drift itself, which no step ever divides by
σ(t): f = v for an ODE, f = v + w·s for the SDE dx = f·dt + √(2w)·dW. Each is A·x + B·e at its time
(`fastdit.flow.paths`), and each evaluation of the model is one row, with dt to the next time:

    Euler            x' = x + dt·f
    Euler-Maruyama   x' = x + dt·f + √(2w·dt)·z
    Heun, predictor  x' = x + dt·f₁
    Heun, corrector  x'' = x' − ½dt·f₁ + ½dt·f₂ = x + ½dt·(f₁ + f₂)

The corrector starts from the predictor's x', so that Heun keeps no third tensor. The SDE's Heun
adds its noise before the predictor (Ma et al. 2024), when the model has not been called yet: a row
of its own, x' = x + √(2w·dt)·z, which `Plan.noise_before` asks for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fastdit.flow.kinds import ModelType
from fastdit.flow.paths import Path
from fastdit.ops._checks import fail
from fastdit.plan import SIGMA, Plan
from fastdit.reference import TABLE_COLUMNS

Drift = Callable[[Tensor], tuple[Tensor, Tensor]]
"""A time to the A and B of the drift A·x + B·e."""

LAST_STEPS = ("Mean", "Tweedie", "Euler", None)
_NEAR_DATA = 1e-7
"""Where σ is exactly 0, w·s is taken this much before it: its error is of this size."""


def _rows(times: Tensor, drift: tuple[Tensor, Tensor], **columns: Tensor | float) -> Tensor:
    """`(E, 9)`: q from `drift`, cx = 1 and guidance 1 but where `columns` say otherwise."""
    values = dict.fromkeys(TABLE_COLUMNS, 0.0) | {"a": drift[0], "b": drift[1]}
    values |= {"cx": 1.0, "guidance": 1.0} | columns
    table = torch.empty(len(times), len(TABLE_COLUMNS), dtype=torch.float64)
    for column, name in enumerate(TABLE_COLUMNS):
        table[:, column] = values[name]
    return table


def _interleaved(first: Tensor, second: Tensor) -> Tensor:
    return torch.stack([first, second], 1).flatten(0, 1)


def _checked(plan: Plan, path: Path, prediction: ModelType) -> Plan:
    """`plan` with its `data`, if its coefficients are finite."""
    bad = ~plan.table.isfinite().all(1)
    if plan.noise_before is not None:
        bad |= ~plan.noise_before.isfinite()
    if bad.any():
        t = float(plan.times[bad][0])
        allowed = (
            f"a solver whose coefficients are finite: a {prediction.value} model's are not at "
            f"t = {t:g}; sample_eps > 0 in create_transport keeps away from there"
        )
        fail("t", f"{t:g}", allowed)
    # e = (q − a·x)/b in data = A·x + B·e; with no noise left in x, at σ = 0, B is 0 as well.
    a, b = (plan.table[:, TABLE_COLUMNS.index(name)] for name in "ab")
    data_a, data_b = path.coefficients("data", prediction, plan.times)
    per_q = torch.where(data_b == 0, 0.0, data_b / b)
    return replace(plan, data=torch.stack([data_a - per_q * a, per_q], 1))


def ode_plan(path: Path, prediction: ModelType, times: Tensor, heun: bool) -> Plan:
    """Euler's or Heun's method for dx = v·dt through `times` `(N,)` float64, N ≥ 2, in order."""
    start, dt = times[:-1], times.diff()

    def drift(t: Tensor) -> tuple[Tensor, Tensor]:
        return path.coefficients("velocity", prediction, t)

    return _checked(_steps(start, times[1:], dt, drift, heun), path, prediction)


def _steps(start: Tensor, end: Tensor, dt: Tensor, drift: Drift, heun: bool) -> Plan:
    """Steps without noise from `start` to `end`."""
    first = _rows(start, drift(start), c0=dt)
    if not heun:
        return Plan(start, first)
    second = _rows(end, drift(end), c0=0.5 * dt, cp=-0.5 * dt)
    times, table = _interleaved(start, end), _interleaved(first, second)
    return Plan(times, table, multistep=True, ends=(False, True) * len(start))


def sde_plan(
    path: Path,
    prediction: ModelType,
    times: Tensor,
    *,
    heun: bool,
    form: str,
    norm: float,
    floor: float | None,
    last_step: str | None,
    size: float,
) -> Plan:
    """Euler-Maruyama's or Heun's method for dx = (v + w·s)dt + √(2w)·dW, and the last step.

    Args:
        path, prediction: what the model predicts, and where.
        times: `(N,)` float64, N ≥ 2, rising.
        heun: Heun's method rather than Euler-Maruyama's.
        form, norm: of w; see `Path.diffusion`.
        floor: w is taken at max(t, floor). None takes it at t, but for an infinite w(0), which
            becomes w at the second time.
        last_step: from the last time to the data: `"Mean"`, the drift without noise; `"Tweedie"`,
            the predicted data; `"Euler"`, the velocity; None, no step.
        size: its dt.

    Raises:
        ValueError: coefficients that are not finite, with the time.
    """
    start, dt = times[:-1], times.diff()
    if floor is None:
        infinite = not path.diffusion(form, norm, start[:1]).isfinite().all()
        floor = float(times[1]) if infinite else 0.0

    def w(t: Tensor) -> Tensor:
        return path.diffusion(form, norm, t.clamp(min=floor))

    def drift(t: Tensor) -> tuple[Tensor, Tensor]:
        a, b = path.coefficients("velocity", prediction, t)
        sigma, _ = path.sigma(t)
        before = torch.where(sigma == 0, t - _NEAR_DATA, t)
        score_a, score_b = path.coefficients("score", prediction, before)
        weight = w(before)
        if form == "constant" and prediction is not ModelType.SCORE:
            # w/σ has no limit at the data.
            weight = torch.where(sigma.abs() < _NEAR_DATA, math.inf, weight)
        return a + weight * score_a, b + weight * score_b

    plan = _steps(start, times[1:], dt, drift, heun)
    noise = torch.sqrt(2 * w(start) * dt)
    if heun:
        before = _interleaved(noise, torch.zeros_like(noise))
        plan = replace(plan, noise_before=before, draws=(True, False) * len(dt), noisy=True)
    else:
        plan.table[:, SIGMA] = noise
        plan = replace(plan, draws=(True,) * len(dt), noisy=True)
    if last_step is not None:
        plan = _with_last(plan, _last_row(path, prediction, times[-1:], drift, last_step, size))
    return _checked(plan, path, prediction)


def _last_row(
    path: Path, prediction: ModelType, t: Tensor, drift: Drift, last_step: str, size: float
) -> tuple[Tensor, Tensor]:
    """The last time and its row."""
    if last_step == "Tweedie":
        return t, _rows(t, path.coefficients("data", prediction, t), cx=0.0, c0=1.0)
    if last_step == "Mean":
        return t, _rows(t, drift(t), c0=size)
    return t, _rows(t, path.coefficients("velocity", prediction, t), c0=size)


def _with_last(plan: Plan, last: tuple[Tensor, Tensor]) -> Plan:
    """`plan` and one row more, without noise."""
    t, row = last
    before = plan.noise_before
    return replace(
        plan,
        times=torch.cat([plan.times, t]),
        table=torch.cat([plan.table, row]),
        draws=(*plan.draws, False),
        noise_before=None if before is None else torch.cat([before, torch.zeros_like(t)]),
        guided=(),
        ends=(*plan.ends, True),
    )
