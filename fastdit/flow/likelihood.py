"""The log-likelihood of data under a flow, by the change of variables along its ODE.

    log p(x1) = log N(x0; 0, 1) − ∫₀¹ ∇·v(x_t, t) dt,     x0 = where the ODE takes x1 backwards

The divergence is Hutchinson's estimate ∇·v ≈ zᵀ(∂v/∂x)z with z of ±1 (Grathwohl et al. 2019): exact
where the Jacobian is diagonal, else unbiased. As published, z is drawn at every call of the model;
`fixed_probe=True` draws it once a run, without which an adaptive method sees a right side that
changes at random and takes far smaller steps.

The result's function is called as `log_likelihood(x, model, **model_kwargs)` and returns the
log-likelihoods `(B,)` in nats and the noise x0 like `x`. Divide by −ln 2 times the dimensions for
bits per dimension. `"euler"` and `"heun"` need nothing; other methods are torchdiffeq's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdit.flow.transport import Model, Transport

State = tuple[Tensor, ...]
RightSide = Callable[[Tensor, State], State]


def rademacher(x: Tensor) -> Tensor:
    """±1 with equal odds, like `x`."""
    return (torch.randint(2, x.shape, device=x.device) * 2 - 1).to(x.dtype)


def fixed_steps(heun: bool) -> Callable[[RightSide, State, Tensor], State]:
    """Euler's or Heun's method for a tuple of tensors, with `odeint`'s calling convention."""

    def solve(right_side: RightSide, state: State, times: Tensor) -> State:
        states = [state]
        for t, after in itertools.pairwise(times):
            dt = after - t
            slope = right_side(t, state)
            ahead = tuple(x + dt * f for x, f in zip(state, slope, strict=True))
            if heun:
                second = right_side(after, ahead)
                ahead = tuple(
                    x + 0.5 * dt * (f + g) for x, f, g in zip(state, slope, second, strict=True)
                )
            state = ahead
            states.append(state)
        return tuple(torch.stack(parts) for parts in zip(*states, strict=True))

    return solve


def likelihood(
    transport: Transport,
    solve: Callable[[RightSide, State, Tensor], State],
    times: Tensor,
    fixed_probe: bool,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """See the top of this module.

    Args:
        transport: the flow.
        solve: `odeint` with its method and tolerances.
        times: `(N,)`, the grid of 1 − t.
        fixed_probe: draw one z for the whole run.
    """

    @torch.no_grad()
    def log_likelihood(x: Tensor, model: Model, **model_kwargs: Any) -> tuple[Tensor, Tensor]:
        probe = rademacher(x) if fixed_probe else None

        def right_side(back: Tensor, state: State) -> State:
            t = (1 - back).expand(len(x))
            z = rademacher(x) if probe is None else probe
            with torch.enable_grad():
                at = state[0].detach().requires_grad_(True)
                output = transport.model_output(model, at, t, model_kwargs)
                velocity = transport.convert("velocity", at, t, output)
                (gradient,) = torch.autograd.grad((velocity * z).sum(), at)
            return -velocity.detach(), (gradient * z).flatten(1).sum(1)

        exact = torch.promote_types(x.dtype, torch.float32)
        grid = times.to(x.device, exact)
        start = (x, torch.zeros(len(x), dtype=exact, device=x.device))
        path, divergence = solve(right_side, start, grid)
        return transport.prior_logp(path[-1]) - divergence[-1], path[-1]

    return log_likelihood
