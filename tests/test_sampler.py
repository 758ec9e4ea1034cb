"""`fastdit.Sampler`: equal to the plain loop, the same image in any batch, previews, intervals."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from plain_diffusion import Plain
from torch import Tensor

import fastdit
from fastdit import Sampler, backends, create_diffusion, reference
from fastdit.digits import load_digits_model
from fastdit.sampler import sampler as engine

LABELS = [3, 8, 3]
NULL = 10
SOLVERS = {
    "ddpm": {"solver": "ddpm"},
    "ddim": {"solver": "ddim"},
    "ddim, eta 1": {"solver": "ddim", "eta": 1.0},
    "dpm++1": {"solver": "dpm++", "order": 1},
    "dpm++2M": {"solver": "dpm++"},
}
every_solver = pytest.mark.parametrize("options", SOLVERS.values(), ids=SOLVERS)


@pytest.fixture(scope="module")
def model():
    return load_digits_model()


class PlainSolver:
    """Each solver's update from its paper, in eager float32 arithmetic with float64 scalars."""

    def __init__(self, diffusion, solver: str, eta: float = 0.0, order: int = 2) -> None:
        self.plain, self.solver, self.eta, self.order = Plain(diffusion.betas), solver, eta, order
        self.last: Tensor | None = None

    def half_log_snr(self, t: int) -> float:
        bar = self.plain.bar[t] if t >= 0 else 1.0
        return math.inf if bar == 1 else 0.5 * math.log(bar / (1 - bar))

    def update(self, x: Tensor, x0: Tensor, v: Tensor, t: int, z: Tensor) -> Tensor:
        if self.solver == "ddpm":
            return self.plain.ddpm(x, x0, t, self.plain.variance("learned_range", t, v), z)
        if self.solver == "ddim":
            return self.plain.ddim(x, x0, t, self.eta, z)
        before, bar = self.plain.before(t), self.plain.bar[t]
        h, target = self.half_log_snr(t - 1) - self.half_log_snr(t), x0
        if self.order == 2 and self.last is not None and t > 0:
            r = (self.half_log_snr(t) - self.half_log_snr(t + 1)) / h
            target = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * self.last
        self.last = x0
        ratio = math.sqrt(1 - before) / math.sqrt(1 - bar)
        return ratio * x - math.sqrt(before) * math.expm1(-h) * target


def plain_loop(model, labels, steps: int, scale: float, clip: bool, interval=None, **options):
    """No hoisting, no fusion, no op of fastdit's: the published draws from torch's generator."""
    diffusion = create_diffusion(str(steps))
    solver = PlainSolver(diffusion, **options)
    count = len(labels)
    x, y = torch.randn(count, 1, 8, 8), torch.tensor([*labels, *[NULL] * count])
    with torch.no_grad(), fastdit.backend("reference"):
        for t in reversed(range(steps)):
            original = diffusion.timestep_map[t]
            inside = interval is None or interval[0] <= original <= interval[1]
            out = model(torch.cat([x, x]), torch.full((2 * count,), original), y)
            cond, null = out.chunk(2)
            e = null[:, :1] + scale * (cond[:, :1] - null[:, :1]) if inside else cond[:, :1]
            z = torch.zeros_like(x)
            if options["solver"] != "dpm++":
                z = torch.randn(2 * count, 1, 8, 8)[:count]
            x0 = solver.plain.x0(x, e, t)
            x0 = x0.clamp(-1, 1) if clip else x0
            x = solver.update(x, x0, cond[:, 1:], t, z)
    return x


@every_solver
@pytest.mark.parametrize("clip", [False, True])
def test_fifty_steps_equal_the_plain_loop(model, options, clip):
    torch.manual_seed(1)
    want = plain_loop(model, LABELS, 50, 2.0, clip, **options)
    torch.manual_seed(1)
    got = Sampler(model, steps=50, cfg_scale=2.0, clip_denoised=clip, **options)(LABELS)
    assert (got - want).abs().max() <= 2e-5 * want.abs().max()


def test_budgets_change_nothing(model):
    """All rows at once, three steps' at a time, and each step's left to the model."""
    options = {"steps": 10, "solver": "ddim", "cfg_scale": 1.5}
    whole = Sampler(model, **options)(LABELS, seed=0)
    a_step = 3 * (6 * 3 + 2) * 96 * 4
    for budget in (0, a_step - 1, a_step, 3 * a_step):
        part = Sampler(model, conditioning_budget=budget, **options)(LABELS, seed=0)
        assert (part - whole).abs().max() <= 2e-5


def test_conditioning_is_one_call_for_the_whole_schedule(model, monkeypatch):
    calls, compute = [], model.conditioning
    monkeypatch.setattr(model, "conditioning", lambda t, y: calls.append(len(t)) or compute(t, y))
    Sampler(model, steps=7, solver="ddim", native=False)(LABELS, seed=0)
    assert calls == [1, 7 * 3]  # a row to know its width; 7 steps of two classes and null
    calls.clear()
    Sampler(model, steps=7, solver="ddim", native=False, chunk=1)(LABELS, seed=0)
    assert calls == [1, 7 * 3]


@every_solver
def test_a_seed_is_an_image_in_any_batch(model, options):
    """Chunks, order and company change a sample by the rounding of matrix products only."""
    sampler = Sampler(model, steps=8, cfg_scale=2.0, clip_denoised=True, **options)
    labels, seeds = [0, 1, 2, 3, 4], [9, 2**62, -5, 0, 7]
    whole = sampler(labels, seed=seeds)
    for chunk in (1, 3):
        sampler.chunk = chunk
        assert (sampler(labels, seed=seeds) - whole).abs().max() <= 1e-4
    sampler.chunk = None
    backwards = sampler(labels[::-1], seed=seeds[::-1]).flip(0)
    assert (backwards - whole).abs().max() <= 1e-4
    alone = sampler([4], seed=7)
    assert (alone[0] - whole[4]).abs().max() <= 1e-4
    assert (sampler([4], seed=8)[0] - whole[4]).abs().max() > 0.1


def test_one_seed_counts_up(model):
    sampler = Sampler(model, steps=4)
    counted = sampler([1, 2, 3], seed=5)
    for seed in (
        [5, 6, 7],
        torch.tensor([5, 6, 7]),
        np.array([5, 6, 7]),
        list(np.array([5, 6, 7])),
    ):
        assert torch.equal(counted, sampler([1, 2, 3], seed=seed))
    assert torch.equal(counted, sampler([1, 2, 3], seed=np.int64(5)))


def test_the_noise_is_the_same_to_the_bit_in_any_batch(model, monkeypatch):
    """Only matrix products depend on the batch: without a model nothing is left of that."""

    def nothing(x, _t, _y, conditioning):
        return torch.zeros(len(x), 2, 8, 8)

    monkeypatch.setattr(engine, "denoiser", lambda *_args: nothing)
    whole = Sampler(model, steps=5, cfg_scale=2.0)([1] * 5, seed=3)
    assert torch.equal(whole, Sampler(model, steps=5, cfg_scale=2.0, chunk=2)([1] * 5, seed=3))
    assert (whole[0] - whole[1]).abs().max() > 0.1


def test_the_guidance_interval(model):
    """Outside it a step is unguided, and runs the model on half the rows."""
    interval = (200, 700)
    rows = []
    hook = model.register_forward_pre_hook(lambda _m, args: rows.append(len(args[0])))
    torch.manual_seed(1)
    options = {"solver": "ddim", "cfg_scale": 3.0, "guidance_interval": interval}
    try:
        got = Sampler(model, steps=20, clip_denoised=True, **options)(LABELS)
    finally:
        hook.remove()
    times = create_diffusion("20").timestep_map[::-1]
    assert rows == [6 if 200 <= t <= 700 else 3 for t in times]
    torch.manual_seed(1)
    want = plain_loop(model, LABELS, 20, 3.0, True, interval, solver="ddim")
    assert (got - want).abs().max() <= 2e-5


def test_previews_are_the_steps(model):
    sampler = Sampler(model, steps=6, solver="dpm++", clip_denoised=True, chunk=2)
    seen = []
    out = sampler(LABELS, seed=1, callback=seen.append)
    assert [(p.step, p.steps, p.samples) for p in seen] == [
        (i, 6, part) for part in (slice(0, 1), slice(1, 3)) for i in range(6)
    ]
    assert torch.equal(torch.cat([p.x for p in seen if p.step == 5]), out)
    assert torch.equal(seen[-1].x0, seen[-1].x)  # the last step ends in the predicted x0
    assert len({p.x.data_ptr() for p in seen}) == len(seen)  # a preview stays as it was
    for ours, theirs in zip(sampler.iterate(LABELS, seed=1), seen, strict=True):
        assert torch.equal(ours.x0, theirs.x0)


def test_a_start_is_given_and_a_bar_is_shown(model, capsys):
    sampler = Sampler(model, steps=3, solver="ddim")
    noise = torch.randn(3, 1, 8, 8)
    out = sampler(LABELS, seed=0, noise=noise, progress=True)
    assert torch.equal(out, sampler(LABELS, seed=9, noise=noise))  # eta 0 draws nothing else
    assert "3/3" in capsys.readouterr().err


def test_parameters_may_change_between_calls(model):
    changing = copy.deepcopy(model)
    sampler = Sampler(changing, steps=3, solver="ddim")
    before = sampler(LABELS, seed=0)
    with torch.no_grad():
        changing.t_embedder.mlp[0].weight.mul_(1.5)
    assert not torch.equal(sampler(LABELS, seed=0), before)
    low = sampler.model.bfloat16()
    assert Sampler(low, steps=3)(LABELS, seed=0).dtype == torch.bfloat16


def test_every_step_is_one_call_of_the_op(model):
    calls = []

    def run(*args):
        calls.append(args)
        return reference.diffusion_step(*args)

    counting = backends.Kernel("diffusion_step", "cpu", "counting", run)
    with backends.replaced("diffusion_step", "cpu", [counting]):
        Sampler(model, steps=10, solver="dpm++")(LABELS)
    assert len(calls) == 10
    assert all(args[8] == 1 for args in calls)  # guided inside the op


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"solver": "euler"}, "solver: got 'euler', allowed is 'ddpm', 'ddim', 'dpm\\+\\+'"),
        ({"eta": 0.5}, "eta: got 0.5, allowed is 0 with solver='ddpm'"),
        ({"order": 3}, "order: got 3, allowed is 1 or 2"),
        ({"steps": 0}, "steps: got 0, allowed is an int >= 1"),
        ({"spacing": "even"}, "spacing: got 'even', allowed is 'uniform', 'logsnr', 'karras'"),
        ({"guided_channels": 3}, "guided_channels: got 3, allowed is an int from 0 to 2"),
        ({"guidance_interval": (5, 1)}, "guidance_interval: got .5, 1."),
        ({"chunk": 0}, "chunk: got 0"),
        ({"conditioning_budget": -1}, "conditioning_budget: got -1"),
        ({"steps": 3, "diffusion": create_diffusion("3")}, "steps: got 3, allowed is None beside"),
        ({"diffusion": create_diffusion("3", learn_sigma=False)}, "diffusion: got one with"),
        ({"steps": 1001}, "steps: got 1001, allowed is at most 1000"),
        ({"solver": "ddim", "eta": "1"}, "eta: got '1', allowed is a number"),
        ({"solver": "dpm++", "order": True}, "order: got True"),
        ({"cfg_scale": True}, "cfg_scale: got True, allowed is a finite number"),
        ({"guided_channels": True}, "guided_channels: got True"),
        ({"guidance_interval": 5}, "guidance_interval: got 5, allowed is two times"),
        ({"guidance_interval": "ab"}, "guidance_interval: got 'ab'"),
        ({"guidance_interval": (None, 1)}, r"guidance_interval: got \(None, 1\)"),
        ({"quality": ["fast"]}, r"quality: got \['fast'\], allowed is 'fast'"),
        ({"graph": "yes"}, "graph: got 'yes', allowed is None, True or False"),
        ({"native": "yes"}, "native: got 'yes'"),
    ],
)
def test_wrong_options_are_named(model, changes, message):
    with pytest.raises(ValueError, match=message):
        Sampler(model, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": [10]}, r"classes: got \[10\], allowed is 0 to 9"),
        ({"classes": []}, "classes: .*non-empty"),
        ({"classes": None}, "classes: got None"),
        ({"seed": [1]}, "seed: got 1 values"),
        ({"seed": [1, 2**63]}, "seed: got 9223372036854775808"),
        ({"noise": torch.zeros(1, 1, 8, 8)}, r"noise: got \(1, 1, 8, 8\)"),
    ],
)
def test_wrong_calls_are_named(model, changes, message):
    with pytest.raises(ValueError, match=message):
        Sampler(model, steps=2)(**{"classes": [1, 2], **changes})


def test_what_cannot_be_done_says_so(model):
    for options, call, message in (
        ({}, {"seed": "1"}, "seed: got str"),
        ({}, {"callback": 3}, "callback: got int, allowed is None or a function"),
        ({}, {"noise": [[0.0]]}, "noise: got list, allowed is a tensor"),
        (
            {"diffusion": "10"},
            {},
            "diffusion: got str, allowed is None or a fastdit.create_diffusi",
        ),
        ({"transport": "Linear"}, {}, "transport: got str"),
    ):
        with pytest.raises(TypeError, match=message):
            Sampler(model, steps=2, **options)([1], **call)
    with pytest.raises(ValueError, match=r"noise: got .* int64 on cpu, allowed is a floating"):
        Sampler(model, steps=2)([1], noise=torch.zeros(1, 1, 8, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match="graph: got True, allowed is False or None"):
        Sampler(model, steps=2, graph=True)([1])
    model.train()
    try:
        with pytest.raises(ValueError, match="model: got one in training mode"):
            Sampler(model, steps=2)([1])
    finally:
        model.eval()
