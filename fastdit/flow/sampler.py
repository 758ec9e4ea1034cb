"""Sampling a flow model: ODEs and SDEs from noise to data, by the published names.

    sampler = fastdit.flow.Sampler(transport)
    sample = sampler.sample_ode(sampling_method="heun", num_steps=26)
    images = sample(torch.randn(16, 4, 32, 32), model, y=labels)[-1]

The fixed-step solvers (`fastdit.flow.tables`) are one call of `fastdit.ops.diffusion_step` after
each call of the model, with classifier-free guidance inside it. Every other method of torchdiffeq,
the adaptive `dopri5` above all, is torchdiffeq's (`pip install 'fastdit[flow]'`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastdit import ops
from fastdit.flow import tables
from fastdit.flow.guidance import Guidance
from fastdit.flow.likelihood import fixed_steps, likelihood
from fastdit.flow.paths import FORMS
from fastdit.flow.tables import Plan
from fastdit.flow.transport import Model, Transport, shifted
from fastdit.ops import _checks
from fastdit.reference import TABLE_COLUMNS, guide

NoiseFn = Callable[[Tensor], Tensor]

ODE_METHODS = {"euler": False, "heun": True, "heun2": True}
"""The fixed-step ODE methods that are rows of a table, and whether they correct."""

SDE_METHODS = {"Euler": False, "Heun": True}


def published_noise(x: Tensor) -> Tensor:
    """Noise like `x` from the CPU's generator, in float32, as the published code draws it."""
    return torch.randn(x.shape).to(x)


class Sampler:
    """Samplers of a transport; each method returns a function that samples.

    Those functions are called as `sample(x, model, **model_kwargs)`: `x` `(B, C, ...)` is the
    start, `model` is called as `model(x, t·time_scale, **model_kwargs)` with `t` `(B,)`. They run
    without gradients.

    Args:
        transport: what the model was trained with, `fastdit.create_transport`.
    """

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.drift, self.score = transport.get_drift(), transport.get_score()

    def sample_ode(
        self,
        *,
        sampling_method: str = "dopri5",
        num_steps: int = 50,
        atol: float = 1e-6,
        rtol: float = 1e-3,
        reverse: bool = False,
        guidance: Guidance | None = None,
    ) -> Callable[..., Tensor]:
        """The probability flow ODE dx = v·dt.

        Args:
            sampling_method: `"euler"`, `"heun"` (also called `"heun2"`), or a method of torchdiffeq
                such as `"dopri5"`.
            num_steps: times on the grid, ends included: Euler calls the model num_steps − 1 times
                and Heun twice as often, as published. An adaptive method takes its own steps and
                interpolates to the grid.
            atol, rtol: the tolerances of an adaptive method.
            reverse: from data to noise.
            guidance: classifier-free guidance; the `y` of the call is then the B labels.

        Returns:
            A function whose result `(num_steps, B, C, ...)` is x at each time of the grid.
        """
        times = self._times(num_steps, reverse=reverse)
        if sampling_method in ODE_METHODS:
            plan = self.ode_plan(sampling_method, num_steps, reverse=reverse)

            def fixed(x: Tensor, model: Model, **model_kwargs: Any) -> Tensor:
                return torch.stack([x, *self.states(plan, x, model, model_kwargs, guidance)])

            return fixed
        odeint = torchdiffeq(sampling_method)

        @torch.no_grad()
        def adaptive(x: Tensor, model: Model, **model_kwargs: Any) -> Tensor:
            def velocity(t: Tensor, state: Tensor) -> Tensor:
                return self._velocity(state, t, model, model_kwargs, guidance)

            grid = times.to(x.device, torch.promote_types(x.dtype, torch.float32))
            return odeint(velocity, x, grid, method=sampling_method, atol=atol, rtol=rtol)

        return adaptive

    def sample_sde(
        self,
        *,
        sampling_method: str = "Euler",
        diffusion_form: str = "SBDM",
        diffusion_norm: float = 1.0,
        last_step: str | None = "Mean",
        last_step_size: float = 0.04,
        num_steps: int = 250,
        diffusion_floor: float | None = None,
        guidance: Guidance | None = None,
        noise_fn: NoiseFn = published_noise,
    ) -> Callable[..., list[Tensor]]:
        """The SDE dx = (v + w·s)dt + √(2w)·dW, whose x has the ODE's distribution at every t.

        Args:
            sampling_method: `"Euler"` (Euler-Maruyama) or `"Heun"`.
            diffusion_form: w: `"constant"` 1, `"SBDM"` g, `"sigma"` σ, `"linear"` 1 − t,
                `"decreasing"` ¼(cos πt + 1)², `"increasing-decreasing"` sin² πt.
            diffusion_norm: scales w.
            last_step: how the last step, without noise, ends: `"Mean"`, `"Tweedie"`, `"Euler"` or
                None for none; see `fastdit.flow.tables.sde_plan`.
            last_step_size: its length; no step has none.
            num_steps: times on the grid; with a last step, the model is called num_steps times.
            diffusion_floor: w is taken at max(t, floor). None takes it at t, as published, except
                where it is infinite: SBDM at t = 0, where the published result is NaN, takes it
                one step later.
            guidance: classifier-free guidance; the `y` of the call is then the B labels.
            noise_fn: called once a step with x; the default draws on the CPU, as published.

        Returns:
            A function whose result is the list of x after each step, num_steps of them; without a
            last step the last one is there twice, as published.
        """
        plan = self.sde_plan(
            sampling_method,
            num_steps,
            diffusion_form=diffusion_form,
            diffusion_norm=diffusion_norm,
            last_step=last_step,
            last_step_size=last_step_size,
            diffusion_floor=diffusion_floor,
        )

        def sample(x: Tensor, model: Model, **model_kwargs: Any) -> list[Tensor]:
            states = list(self.states(plan, x, model, model_kwargs, guidance, noise_fn))
            return states if last_step is not None else [*states, states[-1]]

        return sample

    def sample_ode_likelihood(
        self,
        *,
        sampling_method: str = "dopri5",
        num_steps: int = 50,
        atol: float = 1e-6,
        rtol: float = 1e-3,
        fixed_probe: bool = False,
    ) -> Callable[..., tuple[Tensor, Tensor]]:
        """The log-likelihood of data; `fastdit.flow.likelihood` has the maths and the arguments."""
        back = 1 - self._times(num_steps, reverse=True)
        if sampling_method in ODE_METHODS:
            solve = fixed_steps(ODE_METHODS[sampling_method])
        else:
            solve = functools.partial(
                torchdiffeq(sampling_method), method=sampling_method, atol=atol, rtol=rtol
            )
        return likelihood(self.transport, solve, back, fixed_probe)

    def ode_plan(self, sampling_method: str, num_steps: int, *, reverse: bool = False) -> Plan:
        """The rows of `sample_ode` with a fixed-step method; the same arguments."""
        heun = _one_of("sampling_method", sampling_method, ODE_METHODS)
        times = self._times(num_steps, reverse=reverse)
        return tables.ode_plan(self.transport.path, self.transport.model_type, times, heun)

    def sde_plan(
        self,
        sampling_method: str,
        num_steps: int,
        *,
        diffusion_form: str = "SBDM",
        diffusion_norm: float = 1.0,
        last_step: str | None = "Mean",
        last_step_size: float = 0.04,
        diffusion_floor: float | None = None,
    ) -> Plan:
        """The rows of `sample_sde`; the same arguments."""
        heun = _one_of("sampling_method", sampling_method, SDE_METHODS)
        _one_of("diffusion_form", diffusion_form, dict.fromkeys(FORMS))
        _one_of("last_step", last_step, dict.fromkeys(tables.LAST_STEPS))
        if not 0 < last_step_size < 1:
            _checks.fail("last_step_size", repr(last_step_size), "a number between 0 and 1")
        if not 0 <= diffusion_norm < math.inf:
            _checks.fail("diffusion_norm", repr(diffusion_norm), "a finite number >= 0")
        if diffusion_floor is not None and not 0 <= diffusion_floor < 1:
            _checks.fail("diffusion_floor", repr(diffusion_floor), "None or 0 to below 1")
        size = 0.0 if last_step is None else last_step_size
        return tables.sde_plan(
            self.transport.path,
            self.transport.model_type,
            self._times(num_steps, sde=True, diffusion_form=diffusion_form, last_step_size=size),
            heun=heun,
            form=diffusion_form,
            norm=diffusion_norm,
            floor=diffusion_floor,
            last_step=last_step,
            size=size,
        )

    # ---- what the methods share ---------------------------------------------------------------

    @torch.no_grad()
    def states(
        self,
        plan: Plan,
        x: Tensor,
        model: Model,
        model_kwargs: dict[str, Any],
        guidance: Guidance | None = None,
        noise_fn: NoiseFn = published_noise,
        observe: Callable[[float, Tensor, Tensor], None] | None = None,
    ) -> Iterator[Tensor]:
        """x after each step of `plan`: the model and one op for each of its rows.

        `observe` is called after each call of the model with its time, its x, and the data that
        it predicts there.
        """
        _checks.tensor("x", x, range(2, 6), "(B, C, ...)")
        table = plan.table.clone()
        if guidance is not None:
            table[:, TABLE_COLUMNS.index("guidance")] = guidance.scale
        exact = torch.promote_types(x.dtype, torch.float32)
        table, times = table.to(x.device, exact), plan.times.to(x.device, exact)
        rows = torch.arange(len(plan), device=x.device).unbind(0)
        sigma, when = plan.sigma.tolist(), plan.times.tolist()
        drift = None
        for i, row in enumerate(rows):
            noise = noise_fn(x) if plan.draws[i] else None
            if sigma[i]:
                x, noise = x + sigma[i] * noise, None
            guided = guidance if guidance is not None and guidance.at(when[i]) else None
            output = self._output(x, times[i], model, model_kwargs, guided)
            before = x
            x, drift = ops.diffusion_step(
                x,
                output,
                table,
                row,
                noise=noise,
                x0_previous=drift if plan.corrects[i] else None,
                guided_channels=guided.guided_channels(x) if guided else 0,
            )
            if observe is not None:
                of_x, of_drift = plan.data[i].tolist()
                observe(when[i], before, of_x * before + of_drift * drift)
            if plan.ends[i]:
                yield x

    def _output(
        self,
        x: Tensor,
        t: Tensor,
        model: Model,
        model_kwargs: dict[str, Any],
        guided: Guidance | None,
    ) -> Tensor:
        """The model's output at the time `t` `()`: of B rows, or of 2B to guide."""
        if guided is not None:
            x, model_kwargs = guided.doubled(x, model, model_kwargs)
        return self.transport.model_output(model, x, t.expand(len(x)), model_kwargs)

    def _velocity(
        self,
        x: Tensor,
        t: Tensor,
        model: Model,
        model_kwargs: dict[str, Any],
        guidance: Guidance | None,
    ) -> Tensor:
        """The ODE's right side at the time `t` `()`, guided where the interval says so."""
        guided = guidance if guidance is not None and guidance.at(float(t)) else None
        output = self._output(x, t, model, model_kwargs, guided)
        if guided is not None:
            output = guide(output, guided.scale, guided.guided_channels(x))
        return self.transport.convert("velocity", x, t.expand(len(x)), output)

    def _times(self, num_steps: int, **interval: Any) -> Tensor:
        """The grid `(num_steps,)`, float64 of float32 values: those that the published code has."""
        if not isinstance(num_steps, int) or isinstance(num_steps, bool) or num_steps < 2:
            _checks.fail("num_steps", repr(num_steps), "an int >= 2")
        t0, t1 = self.transport.check_interval(
            self.transport.train_eps, self.transport.sample_eps, eval=True, **interval
        )
        grid = torch.linspace(t0, t1, num_steps, dtype=torch.float32).double()
        return shifted(grid, self.transport.timestep_shift)


def _one_of(name: str, value: Any, allowed: dict[Any, Any]) -> Any:
    if value not in allowed:
        _checks.fail(name, repr(value), ", ".join(map(repr, allowed)))
    return allowed[value]


def torchdiffeq(method: str) -> Callable[..., Any]:
    """torchdiffeq's `odeint`, if it has the method.

    Raises:
        ImportError: torchdiffeq is not installed; the extra is named.
        ValueError: no such method.
    """
    try:
        from torchdiffeq import odeint
        from torchdiffeq._impl.odeint import SOLVERS
    except ImportError:
        raise ImportError(
            f"sampling_method={method!r} is torchdiffeq's: pip install 'fastdit[flow]'; "
            "'euler' and 'heun' need nothing"
        ) from None
    if method not in SOLVERS:
        _checks.fail(
            "sampling_method", repr(method), ", ".join(map(repr, (*ODE_METHODS, *SOLVERS)))
        )
    return odeint
