"""A flow's samplers against exact solutions (`exact_flow`): ODEs, SDEs, likelihood."""

from __future__ import annotations

import pytest
import torch
from exact_flow import MEAN, PATH_NAMES, PREDICTIONS, STD, exact, solution

import fastdit
from fastdit.flow import ODE, SDE, Sampler
from fastdit.flow.paths import FORMS

STEPS = 60


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", PATH_NAMES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ode_solvers_converge_with_their_order(name, prediction, reverse):
    if (name, prediction, reverse) == ("VP", "velocity", True):
        pytest.skip("the exact velocity of the VP path is infinite where the reverse starts")
    eps = 0.02 if name == "VP" or prediction != "velocity" else None
    transport = fastdit.create_transport(name, prediction, sample_eps=eps)
    x = torch.linspace(-2, 2, 12, dtype=torch.float64).reshape(1, 3, 4)
    ends = transport.check_interval(0.0, transport.sample_eps, eval=True, reverse=reverse)
    expected, errors = solution(transport, x, *ends), {}
    for method in ("euler", "heun"):
        for steps in (41, 81):
            sample = Sampler(transport).sample_ode(
                sampling_method=method, num_steps=steps, reverse=reverse
            )
            states = sample(x, exact(transport))
            errors[method, steps] = float((states[-1] - expected).abs().max())
    assert errors["euler", 81] < 0.62 * errors["euler", 41]
    assert errors["heun", 81] < 0.32 * errors["heun", 41]
    assert errors["heun", 81] < 0.3 * errors["euler", 81]


def test_dopri5_both_ways():
    pytest.importorskip("torchdiffeq")
    transport = fastdit.create_transport()
    sampler, model = Sampler(transport), exact(transport)
    x = torch.linspace(-2, 2, 12, dtype=torch.float64).reshape(1, 3, 4)
    tolerance = {"rtol": 1e-8, "atol": 1e-8}
    data = sampler.sample_ode(num_steps=3, **tolerance)(x, model)
    for state, t in ((data[1], 0.5), (data[2], 1.0)):
        torch.testing.assert_close(state, solution(transport, x, 0.0, t), rtol=1e-6, atol=1e-6)
    back = sampler.sample_ode(num_steps=2, reverse=True, **tolerance)(data[-1], model)[-1]
    torch.testing.assert_close(back, x, rtol=1e-6, atol=1e-6)


def test_a_timestep_shift_moves_the_grid():
    seen: list = []
    transport = fastdit.create_transport(timestep_shift=0.25)
    sample = Sampler(transport).sample_ode(sampling_method="euler", num_steps=5)
    x = torch.linspace(-2, 2, 12, dtype=torch.float64).reshape(1, 3, 4)
    sample(x, exact(transport, seen))
    times = [0.25 * t / (1 - 0.75 * t) for t in (0, 0.25, 0.5, 0.75)]
    assert [t for _rows, t in seen] == pytest.approx(times)
    seen.clear()
    Sampler(transport).sample_ode_likelihood(sampling_method="euler", num_steps=5)(
        x, exact(transport, seen)
    )
    assert [t for _rows, t in seen] == pytest.approx([1.0, *times[:0:-1]])


@pytest.mark.parametrize("form", [form for form in FORMS if form != "inccreasing-decreasing"])
@pytest.mark.parametrize("name", PATH_NAMES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_sde_ends_in_the_datas_distribution(form, name, prediction):
    """Whatever w is, x has the path's distribution. The perfect model is affine in x, so that one
    run of STEPS + 1 elements, which differ in the start or in one draw, gives mean and variance."""
    transport = fastdit.create_transport(name, prediction)
    x = torch.zeros(1, 1, STEPS + 1, dtype=torch.float64)
    x[..., -1] = 1
    for method, last in (("Euler", "Mean"), ("Heun", "Tweedie")):
        draws = iter(torch.eye(STEPS + 1, dtype=torch.float64)[1:, None, None])
        *_, out = Sampler(transport).sample_sde(
            sampling_method=method,
            diffusion_form=form,
            last_step=last,
            last_step_size=0.005,
            num_steps=STEPS,
            diffusion_floor=0.1 if form == "SBDM" else None,
            noise_fn=lambda _x, draws=draws: next(draws),
        )(x, exact(transport))
        mean, responses = out[0, 0, 0], out[0, 0, 1:] - out[0, 0, 0]
        assert float(mean) == pytest.approx(MEAN, abs=0.03), method
        assert float(responses.square().sum().sqrt()) == pytest.approx(STD, abs=0.03), method


@pytest.mark.parametrize("name", PATH_NAMES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_predicted_data_on_the_way(name, prediction):
    """Of an ODE's and an SDE's rows alike, down to the last step's."""
    transport = fastdit.create_transport(name, prediction)
    sampler, model = Sampler(transport), exact(transport)
    x = torch.linspace(-2, 2, 12, dtype=torch.float64).reshape(1, 3, 4)
    for solver in (
        ODE("heun"),
        SDE("Euler", "sigma", last_step="Tweedie"),
        SDE("Heun", "linear", last_step="Mean"),
    ):
        plan = solver.plan(transport, 5)
        run = sampler.run(plan, x, model, {})
        for step in range(len(plan)):
            run.advance(step)
            t, at = plan.times[step : step + 1], run.seen
            expected = transport.convert("data", at, t, model(at, t)) if t < 1 else at
            torch.testing.assert_close(run.predicted(step), expected, rtol=1e-5, atol=1e-5)


def test_sbdms_first_step():
    """Infinite at t = 0 on the linear path: the second time's w is taken there, or the floor's."""
    transport = fastdit.create_transport()
    times = torch.tensor([0.0, 0.1, 0.2], dtype=torch.float64)
    weights = transport.path.diffusion("SBDM", 1.0, times)
    assert weights.isfinite().tolist() == [False, True, True]
    for floor, expected in ((None, [0.1, 0.1, 0.2]), (0.15, [0.15, 0.15, 0.2])):
        plan = SDE("Euler", last_step=None, diffusion_floor=floor).plan(transport, 11)
        sigma = plan.table[:3, fastdit.reference.TABLE_COLUMNS.index("sigma")]
        at = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(
            sigma, torch.sqrt(0.2 * transport.path.diffusion("SBDM", 1.0, at)), rtol=1e-6, atol=0
        )


@pytest.mark.parametrize("method", ["euler", "heun", "dopri5"])
@pytest.mark.parametrize("fixed_probe", [False, True])
def test_the_likelihood_of_the_exact_flow(method, fixed_probe):
    """Its Jacobian is diagonal, where Hutchinson's estimate is exact."""
    if method == "dopri5":
        pytest.importorskip("torchdiffeq")
    transport = fastdit.create_transport(time_scale=10.0)
    x = MEAN + STD * torch.linspace(-2, 2, 12, dtype=torch.float64).reshape(2, 2, 3)
    steps = 401 if method == "euler" else 101
    sample = Sampler(transport).sample_ode_likelihood(
        sampling_method=method, num_steps=steps, fixed_probe=fixed_probe
    )
    logp, noise = sample(x, exact(transport))
    normal = torch.distributions.Normal(MEAN, STD)
    assert logp.tolist() == pytest.approx(normal.log_prob(x).sum((1, 2)).tolist(), abs=0.05)
    torch.testing.assert_close(noise, (x - MEAN) / STD, rtol=0.02, atol=0.02)
