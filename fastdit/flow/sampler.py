"""Sampling a flow model: ODEs and SDEs from noise to data, by the published names.

    sampler = fastdit.flow.Sampler(transport)
    sample = sampler.sample_ode(sampling_method="heun", num_steps=26)
    images = sample(torch.randn(16, 4, 32, 32), model, y=labels)[-1]

SiT's API over the sampling engine: any callable is a model, and a plain DiT's conditioning is
computed before the first step. The fixed-step solvers (`fastdit.flow.solvers`) run in the engine's
loop, one call of `fastdit.ops.diffusion_step` after each call of the model, with classifier-free
guidance inside it. `fastdit.Sampler` runs the same plans with seeds of samples, chunks, previews
and CUDA graphs. Every other method of torchdiffeq, the adaptive `dopri5` above all, is
torchdiffeq's (`pip install 'fastdit[flow]'`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastdit.flow.guidance import Guidance
from fastdit.flow.likelihood import fixed_steps, likelihood
from fastdit.flow.solvers import ODE, ODE_METHODS, SDE, grid
from fastdit.flow.transport import Model, Transport
from fastdit.ops import _checks
from fastdit.plan import Plan
from fastdit.reference import guide

if TYPE_CHECKING:
    from fastdit.sampler.run import Run

NoiseFn = Callable[[Tensor], Tensor]


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
        if not isinstance(transport, Transport):
            got = type(transport).__name__
            raise TypeError(f"transport: got {got}, allowed is a fastdit.create_transport")
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
        _checks.instance("guidance", guidance, Guidance, "a fastdit.flow.Guidance")
        if sampling_method in ODE_METHODS:
            plan = ODE(sampling_method, reverse).plan(self.transport, num_steps)

            def fixed(x: Tensor, model: Model, **model_kwargs: Any) -> Tensor:
                return torch.stack([x, *self.states(plan, x, model, model_kwargs, guidance)])

            return fixed
        times = grid(self.transport, num_steps, reverse=reverse)
        odeint = torchdiffeq(sampling_method)

        @torch.no_grad()
        def adaptive(x: Tensor, model: Model, **model_kwargs: Any) -> Tensor:
            def velocity(t: Tensor, state: Tensor) -> Tensor:
                return self._velocity(state, t, model, model_kwargs, guidance)

            exact = times.to(x.device, torch.promote_types(x.dtype, torch.float32))
            return odeint(velocity, x, exact, method=sampling_method, atol=atol, rtol=rtol)

        return adaptive

    def sample_sde(
        self,
        *,
        sampling_method: str = "Euler",
        diffusion_form: str = "SBDM",
        diffusion_norm: float = 1.0,
        last_step: str | None = "Mean",
        last_step_size: float | None = 0.04,
        num_steps: int = 250,
        diffusion_floor: float | None = None,
        guidance: Guidance | None = None,
        noise_fn: NoiseFn = published_noise,
    ) -> Callable[..., list[Tensor]]:
        """The SDE dx = (v + w·s)dt + √(2w)·dW, whose x has the ODE's distribution at every t.

        Args:
            sampling_method, diffusion_form, diffusion_norm, last_step, last_step_size,
                diffusion_floor: see `fastdit.flow.SDE`.
            num_steps: times on the grid; with a last step, the model is called num_steps times.
            guidance: classifier-free guidance; the `y` of the call is then the B labels.
            noise_fn: called once a step with x; the default draws on the CPU, as published.

        Returns:
            A function whose result is the list of x after each step, num_steps of them; without a
            last step the last one is there twice, as published.
        """
        _checks.instance("guidance", guidance, Guidance, "a fastdit.flow.Guidance")
        _checks.function("noise_fn", noise_fn)
        solver = SDE(
            sampling_method,
            diffusion_form,
            diffusion_norm,
            last_step,
            last_step_size,
            diffusion_floor,
        )
        plan = solver.plan(self.transport, num_steps)

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
        back = 1 - grid(self.transport, num_steps, reverse=True)
        if sampling_method in ODE_METHODS:
            solve = fixed_steps(ODE_METHODS[sampling_method])
        else:
            solve = functools.partial(
                torchdiffeq(sampling_method), method=sampling_method, atol=atol, rtol=rtol
            )
        return likelihood(self.transport, solve, back, fixed_probe)

    # ---- what the methods share ---------------------------------------------------------------

    def states(
        self,
        plan: Plan,
        x: Tensor,
        model: Model,
        model_kwargs: dict[str, Any],
        guidance: Guidance | None = None,
        noise_fn: NoiseFn = published_noise,
    ) -> Iterator[Tensor]:
        """x after each step of `plan`."""
        run = self.run(plan, x, model, model_kwargs, guidance, noise_fn)
        for step in run:
            if plan.ends[step]:
                yield run.x

    @torch.no_grad()
    def run(
        self,
        plan: Plan,
        x: Tensor,
        model: Model,
        model_kwargs: dict[str, Any],
        guidance: Guidance | None = None,
        noise_fn: NoiseFn = published_noise,
    ) -> Run:
        """The engine's run of `plan`, before its first step."""
        from fastdit.sampler.ahead import NotPlain, plain  # the engine needs the transports
        from fastdit.sampler.conditions import unconditional
        from fastdit.sampler.run import Recipe, Run

        _checks.tensor("x", x, range(2, 6), "(B, C, ...)")
        channels, rows, both = 0, x, model_kwargs
        given, conditioning = unconditional(len(x), x.device), None

        def call(given: Tensor, t: Tensor, _y: Tensor | None) -> Tensor:
            return model(given, t, **(both if len(given) == len(rows) else model_kwargs))

        if guidance is not None and guidance.scale != 1:
            scale = self.transport.time_scale
            low, high = guidance.interval
            plan = plan.with_guidance(guidance.scale, (low * scale, high * scale))
            channels = guidance.guided_channels(x)
            rows, both = guidance.doubled(x, model, model_kwargs)
        exact = torch.promote_types(x.dtype, torch.float32)
        times = plan.times.to(x.device, exact)
        try:
            found = plain(model, rows, both).ahead(rows, times, halves=rows is not x)
            call, given, conditioning = found.denoise, found.conditions, found.conditioning
        except NotPlain:
            pass

        def denoise(x: Tensor, t: Tensor | None, y: Tensor | None, **ahead: Tensor) -> Tensor:
            return self.transport.checked(call(x, t, y, **ahead), x)

        table = plan.whole_table().to(x.device, exact)
        recipe = Recipe(denoise, plan, table, times, channels, noise_fn)
        return Run(recipe, x, given, None, conditioning)

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
