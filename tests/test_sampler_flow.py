"""`fastdit.Sampler` of a flow: the plain loop's samples, seeds, previews, guidance intervals."""

from __future__ import annotations

import pytest
import torch

import fastdit
from fastdit.digits import load_digits_model, weights_path
from fastdit.flow import Guidance, load_transport
from fastdit.flow.sampling import draw

LABELS = [3, 8, 3]


@pytest.fixture(scope="module")
def flow():
    return load_digits_model(objective="flow"), load_transport(weights_path("flow"))


@pytest.mark.parametrize("budget", [0, 2**20])
@pytest.mark.parametrize("solver", ["euler", "heun", "sde"])
@pytest.mark.parametrize("interval", [None, (0.25, 0.5)])
def test_the_plain_loops_samples(flow, solver, interval, budget):
    model, transport = flow
    z = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    guidance = Guidance(3.0, interval or (0.0, 1.0))
    y = torch.tensor(LABELS)
    torch.manual_seed(0)
    given = {"steps": 8, "solver": solver}
    expected = draw(transport, model, z, y, guidance=guidance, **given)
    sampler = fastdit.Sampler(
        model,
        transport=transport,
        cfg_scale=3.0,
        guidance_interval=interval,
        conditioning_budget=budget,
        **given,
    )
    assert any(sampler.plan.guided)
    assert all(sampler.plan.guided) == (interval is None)
    if solver == "sde":  # the engine draws for all 2B rows of a guided batch: compare without
        sampler.plan.table[:, fastdit.reference.TABLE_COLUMNS.index("sigma")] = 0
        rows = fastdit.flow.sampling.solver_plan(transport, solver, 8)
        plain = fastdit.flow.Sampler(transport)
        still = plain.states(rows, z, model, {"y": y}, guidance, torch.zeros_like)
        expected = list(still)[-1]
    torch.testing.assert_close(sampler(LABELS, noise=z), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("solver", ["euler", "heun", "sde"])
def test_a_seeded_sample_is_its_own(flow, solver):
    model, transport = flow
    sampler = fastdit.Sampler(model, transport=transport, steps=6, solver=solver)
    whole = sampler(LABELS, seed=[5, 6, 7])
    alone = sampler([8], seed=6)
    torch.testing.assert_close(whole[1:2], alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(whole[0], whole[2], atol=0.1)


@pytest.mark.parametrize("solver", ["euler", "heun", "sde"])
def test_previews_are_the_predicted_data(flow, solver):
    model, transport = flow
    sampler = fastdit.Sampler(model, transport=transport, steps=8, solver=solver, cfg_scale=1.0)
    z = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    previews = list(sampler.iterate(LABELS, noise=z))
    assert [p.step for p in previews] == list(range(8))
    first = sampler.plan.times[0] * torch.ones(3)
    with torch.no_grad():
        velocity = model(z, first, torch.tensor(LABELS))
    if solver != "heun":
        expected = transport.convert("data", z, first / transport.time_scale, velocity)
        torch.testing.assert_close(previews[0].x0, expected, rtol=1e-4, atol=1e-4)
    if solver == "euler":
        torch.testing.assert_close(previews[-1].x0, previews[-1].x, rtol=1e-4, atol=1e-4)
    away = [float((p.x0 - previews[-1].x).square().mean()) for p in previews]
    assert away[-1] < 0.2 * away[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "ddim"}, "solver: got 'ddim', allowed is 'euler', 'heun', 'sde'"),
        ({"solver": "dopri5"}, "solver: got 'dopri5'"),
        ({"steps": 0}, "steps: got 0, allowed is an int >= 1"),
        ({"steps": 2, "solver": "sde"}, "steps: got 2, allowed is an int >= 3"),
        ({"eta": 1.0}, "eta: got 1.0, allowed is none with a transport"),
        ({"spacing": "karras"}, "spacing: got 'karras', allowed is none with a transport"),
        ({"clip_denoised": True}, "clip_denoised: got True, allowed is none with a transport"),
    ],
)
def test_mistakes(flow, options, message):
    model, transport = flow
    with pytest.raises(ValueError, match=message):
        fastdit.Sampler(model, transport=transport, **options)
