"""`fastdit.Sampler` of a flow: every solver's steps, seeds, previews, intervals, graphs."""

from __future__ import annotations

import itertools

import pytest
import recorded_graphs
import torch
from recorded_graphs import CUDAGraph

import fastdit
from fastdit.digits import load_digits_model, weights_path
from fastdit.flow import ODE, SDE, Guidance, load_transport
from fastdit.flow.paths import FORMS
from fastdit.flow.tables import LAST_STEPS
from fastdit.reference import TABLE_COLUMNS
from fastdit.sampler import graphs
from fastdit.sampler import run as engine

LABELS = [3, 8, 3]
SOLVERS = ["euler", "heun", "sde", "sde_heun"]


@pytest.fixture(scope="module")
def flow():
    return load_digits_model(objective="flow"), load_transport(weights_path("flow"))


@pytest.fixture(scope="module")
def start():
    return torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def plain_loop(model, transport, z, solver, steps, scale, interval):
    """The published loops: no table, no op, nothing ahead; draws for both halves of the batch."""
    y = torch.tensor(LABELS)
    null = torch.full_like(y, 10)
    sde = isinstance(solver, SDE)
    size = (solver.last_step_size or 1 / steps) if sde and solver.last_step else 0.0
    t0, t1 = transport.check_interval(0.0, 0.0, eval=True, sde=sde, last_step_size=size)
    if not sde and solver.reverse:
        t0, t1 = t1, t0
    times = torch.linspace(t0, t1, steps + (1 if not sde or solver.last_step is None else 0))
    times = times.double()

    def velocity(x, t):
        at = torch.full((3,), float(t * transport.time_scale))
        cond = model(x, at, y)
        if not interval[0] - 1e-6 <= t <= interval[1] + 1e-6:
            return cond
        without = model(x, at, null)
        return without + scale * (cond - without)

    def w(t):
        return transport.path.diffusion(solver.diffusion_form, solver.diffusion_norm, t)

    def drift(x, t):
        v = velocity(x, t)
        if not sde:
            return v
        before = t.clamp(max=1 - 1e-7)  # at the data w·s is 0·∞, published NaN: its limit
        return v + float(w(before)) * transport.convert("score", x, before.expand(3), v)

    x = z
    for t, after in itertools.pairwise(times):
        dt = float(after - t)
        if sde:
            noise = torch.randn(6, *x.shape[1:])[:3] * (2 * float(w(t)) * dt) ** 0.5
        if sde and solver.sampling_method == "Euler":
            x = x + dt * drift(x, t) + noise
            continue
        x = x + noise if sde else x
        first = drift(x, t)
        if solver.sampling_method == "euler":
            x = x + dt * first
        else:
            x = x + 0.5 * dt * (first + drift(x + dt * first, after))
    if sde and solver.last_step == "Mean":
        x = x + size * drift(x, times[-1])
    elif sde and solver.last_step == "Euler":
        x = x + size * velocity(x, times[-1])
    elif sde and solver.last_step == "Tweedie":
        t = times[-1]
        x = transport.convert("data", x, t.expand(3), velocity(x, t))
    return x


OPTIONS = [
    ODE("euler"),
    ODE("heun"),
    ODE("euler", reverse=True),
    ODE("heun", reverse=True),
    SDE("Euler", "sigma", last_step_size=None),
    *(SDE(m, "linear", last_step=last) for m in ("Euler", "Heun") for last in LAST_STEPS),
]


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.25, 0.5)])
@pytest.mark.parametrize("solver", OPTIONS, ids=str)
@torch.no_grad()
def test_every_solver_is_the_published_loop(flow, start, solver, interval):
    """Eager steps, with the conditioning ahead and in the step; and `fastdit.flow.Sampler`'s."""
    model, transport = flow
    torch.manual_seed(1)
    with fastdit.backend("reference"):
        want = plain_loop(model, transport, start, solver, 8, 3.0, interval)
    for budget in (0, 2**20):
        sampler = fastdit.Sampler(
            model,
            transport=transport,
            solver=solver,
            steps=8,
            cfg_scale=3.0,
            guidance_interval=interval,
            conditioning_budget=budget,
        )
        torch.manual_seed(1)
        got = sampler(LABELS, noise=start)
        assert (got - want).abs().max() <= 2e-5 * want.abs().max()
    torch.manual_seed(1)
    states = fastdit.flow.Sampler(transport).states(
        solver.plan(transport, solver.times_of(8)),
        start,
        model,
        {"y": torch.tensor(LABELS)},
        Guidance(3.0, interval),
        lambda x: torch.randn(2 * len(x), *x.shape[1:])[: len(x)],
    )
    *_, last = states
    assert (last - want).abs().max() <= 2e-5 * want.abs().max()


@pytest.mark.parametrize("method", ["Euler", "Heun"])
@pytest.mark.parametrize("form", FORMS)
def test_every_diffusion_form_and_last_step_samples(flow, form, method):
    model, transport = flow
    for last in LAST_STEPS:
        if form == "constant" and method == "Heun" and last is None:
            continue  # w·s is infinite at the data: an error, in tests/test_flow_calls.py
        solver = SDE(method, form, last_step=last)
        out = fastdit.Sampler(model, transport=transport, solver=solver, steps=4)([3], seed=0)
        assert out.isfinite().all(), solver


def test_there_is_one_loop(flow, start, monkeypatch):
    """SiT's API, `fastdit.sample` and `fastdit.Sampler` advance the same run."""
    model, transport = flow
    steps, advance = [], engine.Run.advance
    monkeypatch.setattr(engine.Run, "advance", lambda s, i: steps.append(i) or advance(s, i))
    fastdit.flow.Sampler(transport).sample_ode(sampling_method="heun", num_steps=3)(
        start, model, y=torch.tensor(LABELS)
    )
    fastdit.flow.Sampler(transport).sample_sde(sampling_method="Heun", num_steps=2)(
        start, lambda x, _t: x
    )
    fastdit.sample(model, LABELS, steps=3, transport=transport, solver="euler")
    assert steps == [0, 1, 2, 3, 0, 1, 2, 0, 1, 2]


def test_sits_api_computes_conditioning_ahead(flow, start, monkeypatch):
    model, transport = flow
    calls, conditioning = [], type(model).conditioning
    monkeypatch.setattr(
        type(model), "conditioning", lambda *a: calls.append(len(a[1])) or conditioning(*a)
    )
    guidance = Guidance(2.0, (0.2, 0.6))
    with fastdit.backend("reference"):
        sample = fastdit.flow.Sampler(transport).sample_ode(
            sampling_method="heun", num_steps=6, guidance=guidance
        )
        sample(start, model, y=torch.tensor(LABELS))
    assert calls == [1, 10 * 3]  # a row to know its width; 10 evaluations of 3, 8 and null


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_seeded_sample_is_its_own(flow, solver):
    model, transport = flow
    sampler = fastdit.Sampler(model, transport=transport, steps=6, solver=solver, chunk=2)
    whole = sampler(LABELS, seed=[5, 6, 7])
    alone = sampler([8], seed=6)
    torch.testing.assert_close(whole[1:2], alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(whole[0], whole[2], atol=0.1)


@pytest.mark.parametrize("method", ["Euler", "Heun"])
def test_seeded_steps_draw_independent_noise_of_the_right_size(flow, method):
    """Without drift a step adds √(2w·dt)·z, w = 1 − t, and every step's z is another."""
    model, transport = flow
    solver = SDE(method, "linear", last_step=None)
    sampler = fastdit.Sampler(model, transport=transport, solver=solver, steps=2, cfg_scale=1.0)
    for column in ("a", "b", "c0", "cp"):
        sampler.plan.table[:, TABLE_COLUMNS.index(column)] = 0
    nothing = torch.zeros(400, 1, 8, 8)
    first, both = (p.x for p in sampler.iterate([1] * 400, seed=3, noise=nothing))
    assert float(first.var()) == pytest.approx(1.0, abs=0.03)  # 2·1·½
    assert float((both - first).var()) == pytest.approx(0.5, abs=0.02)  # 2·½·½
    assert abs(float((first * (both - first)).mean())) < 0.02


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("graph", [False, True])
def test_previews_are_the_predicted_data(flow, start, solver, graph, monkeypatch):
    model, transport = flow
    if graph:
        recorded_graphs.install(monkeypatch)
        monkeypatch.setattr(graphs, "capturable", lambda _device: True)
    sampler = fastdit.Sampler(
        model, transport=transport, steps=8, solver=solver, cfg_scale=1.0, native=False
    )
    previews = list(sampler.iterate(LABELS, seed=0, noise=start))
    assert [p.step for p in previews] == list(range(8))
    for preview in previews:
        t = torch.full((3,), preview.time)
        with torch.no_grad():
            velocity = model(preview.seen, t, torch.tensor(LABELS))
        if preview.time < transport.time_scale:
            at = t / transport.time_scale
            expected = transport.convert("data", preview.seen, at, velocity)
            torch.testing.assert_close(preview.x0, expected, rtol=1e-4, atol=1e-4)
    if solver == "euler":
        torch.testing.assert_close(previews[-1].x0, previews[-1].x, rtol=1e-4, atol=1e-4)
    away = [float((p.x0 - previews[-1].x).square().mean()) for p in previews]
    assert away[-1] < 0.2 * away[0]


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize(
    ("solver", "kinds"), [("euler", 2), ("heun", 2), ("sde", 4), ("sde_heun", 4)]
)
def test_replayed_steps_give_the_eager_samples(flow, solver, kinds, seed, monkeypatch):
    """A graph for each kind of step: guided or not, with noise or without."""
    recorded_graphs.install(monkeypatch)
    monkeypatch.setattr(graphs, "capturable", lambda _device: True)
    model, transport = flow
    results, after = [], []
    for graph in (True, False):
        torch.manual_seed(4)
        sampler = fastdit.Sampler(
            model,
            transport=transport,
            solver=solver,
            steps=6,
            native=False,
            graph=graph,
            guidance_interval=(0.4, 1.0 if solver == "heun" else 0.7),
        )
        results.append(sampler(LABELS, seed=seed))
        after.append(torch.rand(()))
    assert (results[0] - results[1]).abs().max() <= 1e-5
    assert after[0] == after[1]
    made = {sampler.plan.kind(i) for i in range(len(sampler.plan))}
    assert len(CUDAGraph.made) == len(made) <= kinds
    assert sum(graph.replays for graph in CUDAGraph.made) == len(sampler.plan)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "ddim"}, "solver: got 'ddim', allowed is 'euler', 'heun', 'sde', 'sde_heun'"),
        ({"solver": "dopri5"}, "solver: got 'dopri5'"),
        ({"steps": 0}, "steps: got 0, allowed is an int >= 1"),
        ({"steps": 1, "solver": "sde"}, "steps: got 1, allowed is an int >= 2"),
        ({"eta": 1.0}, "eta: got 1.0, allowed is none with a transport"),
        ({"order": 1}, "order: got 1, allowed is none with a transport"),
        ({"spacing": "karras"}, "spacing: got 'karras', allowed is none with a transport"),
        ({"clip_denoised": True}, "clip_denoised: got True, allowed is none with a transport"),
        ({"guidance_interval": (100, 700)}, "guidance_interval: got .100.0, 700.0., allowed is ti"),
    ],
)
def test_mistakes(flow, options, message):
    model, transport = flow
    with pytest.raises(ValueError, match=message):
        fastdit.Sampler(model, transport=transport, **options)


def test_a_reverse_run_needs_data_and_brings_it_back(flow, start):
    model, transport = flow
    options = {"transport": transport, "steps": 30, "cfg_scale": 1.0}
    data = fastdit.Sampler(model, solver="heun", **options)(LABELS, noise=start)
    back = fastdit.Sampler(model, solver=ODE("heun", reverse=True), **options)
    with pytest.raises(ValueError, match="noise: got None, allowed is the data that a reverse"):
        back(LABELS)
    assert (back(LABELS, noise=data) - start).abs().mean() < 0.05


def test_options_of_a_diffusion_solver_are_not_a_flows(flow):
    model, _transport = flow
    with pytest.raises(ValueError, match=r"solver: got ODE\("):
        fastdit.Sampler(model, solver=ODE())
    with pytest.raises(ValueError, match="steps: got 3, allowed is none with solver='dopri5'"):
        fastdit.sample(model, [1], steps=3, solver="dopri5", transport=flow[1])
