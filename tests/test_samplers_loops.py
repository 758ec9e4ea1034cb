"""Whole sampling runs: the published draws, one op a step, no host sync, shapes and dtypes."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from plain_diffusion import SHAPE, Plain, close, random, toy
from torch import Tensor

import fastdit
from fastdit import backends, reference
from fastdit.diffusion import GaussianDiffusion, create_diffusion
from fastdit.digits import load_digits_model
from fastdit.sampler.published import Stepwise
from fastdit.sampler.run import Run

LOOPS = ("p_sample_loop", "ddim_sample_loop", "dpm_solver_sample_loop")


def dropout(x: Tensor, t: Tensor) -> Tensor:
    """A model that draws from the generator too: the order of all draws matters."""
    return torch.nn.functional.dropout(toy()(x, t), 0.1)


def published_run(diffusion, model, shape, eta: float | None) -> Tensor:
    """DDPM (eta None) or DDIM as published: model, then noise, at every step, t = 0 and eta = 0
    too."""
    plain, x = Plain(diffusion.betas), torch.randn(*shape)
    for t in reversed(range(diffusion.num_timesteps)):
        output = model(x, torch.full(shape[:1], diffusion.timestep_map[t]))
        z = torch.randn_like(x)
        x0 = plain.x0(x, output[:, :2], t)
        spread = plain.variance("learned_range", t, output[:, 2:])
        x = plain.ddpm(x, x0, t, spread, z) if eta is None else plain.ddim(x, x0, t, eta, z)
    return x


@pytest.mark.parametrize("eta", [None, 0.0, 0.5])
@pytest.mark.parametrize("start", [False, True], ids=["drawn", "given"])
def test_a_seed_gives_the_published_samples(eta, start):
    diffusion = create_diffusion("8")
    torch.manual_seed(6)
    want = published_run(diffusion, dropout, SHAPE, eta)
    after = torch.rand(())
    torch.manual_seed(6)
    noise = torch.randn(*SHAPE) if start else None
    given = {"noise": noise, "clip_denoised": False, "device": "cpu"}
    if eta is None:
        got = diffusion.p_sample_loop(dropout, SHAPE, **given)
    else:
        got = diffusion.ddim_sample_loop(dropout, SHAPE, eta=eta, **given)
    close(got, want, rtol=5e-5)  # eight steps in float32, the first of which multiplies by 150
    assert torch.rand(()) == after


@pytest.mark.parametrize("loop", LOOPS)
def test_a_loop_is_its_progressive_run_and_calls_noise_fn_once_a_step(loop):
    diffusion, calls, x = create_diffusion("ddim10"), [], random(0, torch.float32)
    extra = {} if loop.startswith("dpm") else {"noise_fn": lambda x: calls.append(x) or z}
    z = torch.ones(SHAPE)
    steps = list(getattr(diffusion, f"{loop}_progressive")(toy(), SHAPE, noise=x, **extra))
    assert len(steps) == 10
    assert all(set(out) == {"sample", "pred_xstart"} for out in steps)
    if extra:
        inputs = [x, *(out["sample"] for out in steps[:-1])]
        assert all(torch.equal(a, b) for a, b in zip(calls, inputs, strict=True))
    one = torch.ones((), requires_grad=True)
    last = getattr(diffusion, loop)(lambda x, t: one * toy()(x, t), list(SHAPE), noise=x, **extra)
    assert torch.equal(last, steps[-1]["sample"])
    assert not last.requires_grad


@pytest.mark.parametrize("loop", LOOPS)
def test_a_consumer_can_replace_the_sample(loop):
    """As inpainting does between the steps of a progressive run."""
    starts = []

    def model(x, t):
        starts.append(x)
        return toy()(x, t)

    run = getattr(create_diffusion("ddim4"), f"{loop}_progressive")
    for out in run(model, SHAPE, noise=random(0)):
        out["sample"] = torch.zeros_like(out["sample"])
    assert len(starts) == 4
    assert all(not x.any() for x in starts[1:])


def test_there_is_one_loop(monkeypatch):
    """The published loops are runs of the engine; with hooks the diffusion takes its own steps."""
    taken: list[str] = []
    for kind in (Run, Stepwise):

        def advance(self, step, kind=kind, original=kind.advance):
            taken.append(kind.__name__)
            original(self, step)

        monkeypatch.setattr(kind, "advance", advance)
    for loop in LOOPS:
        results = []
        for hooks in ({}, {"denoised_fn": lambda x0: x0}, {"cond_fn": lambda x, t: 0 * x}):
            torch.manual_seed(1)
            run = getattr(create_diffusion("4"), loop)
            results.append(run(toy(), SHAPE, noise=random(0), **hooks))
            assert taken == ["Stepwise" if hooks else "Run"] * 4
            taken.clear()
        assert all((got - results[0]).abs().max() <= 1e-5 for got in results)


class Halving(GaussianDiffusion):
    """Overrides a step with the published signature, and calls its model at another time too."""

    def p_sample(
        self,
        model,
        x,
        t,
        clip_denoised=True,
        denoised_fn=None,
        cond_fn=None,
        model_kwargs=None,
    ):
        last = model(x, torch.zeros_like(t), **model_kwargs)[:, :1]
        out = super().p_sample(model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs)
        return out | {"sample": (out["sample"] + last) / 2, "kept": t}


def test_an_overridden_step_is_the_one_that_runs():
    """With what else it returns; its model is the caller's, however often it is called."""
    betas, model = np.linspace(2e-3, 0.3, 4), load_digits_model()
    y, z = torch.tensor([3, 8]), torch.randn(2, 1, 8, 8)
    given = {"noise": z, "model_kwargs": {"y": y}, "clip_denoised": False}

    def by_hand(x, step):
        with torch.no_grad():
            for t in (3, 2, 1, 0):
                x = step(model, x, torch.tensor([t, t]), False, model_kwargs={"y": y})["sample"]
        return x

    torch.manual_seed(1)
    want = by_hand(z, Halving(betas).p_sample)
    torch.manual_seed(1)
    *_, last = Halving(betas).p_sample_loop_progressive(model, z.shape, **given)
    assert (last["sample"] - want).abs().max() <= 1e-5
    assert last["kept"].tolist() == [0, 0]

    replaced = GaussianDiffusion(betas)
    original = replaced.ddim_sample
    replaced.ddim_sample = lambda *a, **k: {n: v / 2 for n, v in original(*a, **k).items()}
    got = replaced.ddim_sample_loop(model, z.shape, **given)
    assert (got - by_hand(z, replaced.ddim_sample)).abs().max() <= 1e-5


@pytest.mark.parametrize("loop", LOOPS)
def test_a_sample_of_another_shape_is_refused(loop):
    steps = getattr(create_diffusion("4"), f"{loop}_progressive")(toy(), SHAPE, noise=random(0))
    out = next(steps)
    out["sample"] = out["sample"][:1]
    with pytest.raises(ValueError, match=r"sample: got \(1, 2, 3, 3\) .*allowed is \(4, 2, 3, 3\)"):
        next(steps)


@pytest.mark.parametrize("kind", ["module", "bound", "partial", "function", "wrapped"])
@pytest.mark.parametrize("hook", [False, True])
def test_whatever_is_called_like_a_model_samples_alike(kind, hook):
    """A plain DiT, whose conditioning is computed ahead, however it is reached, and other callables
    that call it; with a hook too."""
    model, z = load_digits_model(), torch.randn(2, 1, 8, 8)
    y = torch.tensor([3, 8])

    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = model

        def forward(self, *args, **kwargs):
            return self.module(*args, **kwargs)

    called, kwargs = {
        "module": (model, {"y": y}),
        "bound": (model.forward, {"y": y}),
        "partial": (functools.partial(model.forward_with_cfg, cfg_scale=1.0), {"y": y}),
        "function": (lambda x, t: model(x, t, y), {}),
        "wrapped": (Wrapped(), {"y": y}),
    }[kind]
    hooks = {"denoised_fn": lambda x0: x0} if hook else {}
    diffusion = create_diffusion("5")
    got = diffusion.ddim_sample_loop(
        called, z.shape, noise=z, model_kwargs=kwargs, clip_denoised=False, **hooks
    )
    if kind == "partial":
        z = z[:1].repeat(2, 1, 1, 1)
        got = got[:1]
    x = z
    with torch.no_grad(), fastdit.backend("reference"):
        for t in (4, 3, 2, 1, 0):
            call = (lambda x, t: model(x, t, y), x, torch.tensor([t, t]), False)
            x = diffusion.ddim_sample(*call)["sample"]
    assert (got - x[: len(got)]).abs().max() <= 2e-5 * x.abs().max()


@pytest.mark.parametrize("loop", LOOPS)
def test_every_step_is_one_call_of_the_op(loop):
    """Which reads noise only where its σ is not 0 throughout."""
    calls = []

    def run(*args):
        calls.append(args)
        return reference.diffusion_step(*args)

    kernel = backends.Kernel("diffusion_step", "cpu", "counting", run)
    backends.register(kernel)
    try:
        getattr(create_diffusion("ddim10"), loop)(toy(), SHAPE, noise=random(0))
    finally:
        backends.unregister(kernel)
    assert len(calls) == 10
    noise = [args[4] for args in calls]
    assert all((z is not None) == (loop == "p_sample_loop") for z in noise)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_loop_reads_no_tensor_on_the_host(loop):
    """Meta tensors have no values: reading one is an error."""
    samples = getattr(create_diffusion("ddim10"), loop)(toy(), SHAPE, device="meta")
    assert samples.is_meta
    assert samples.shape == SHAPE


@pytest.mark.parametrize("progress", [False, True])
def test_the_device_comes_from_the_model_and_the_bar_only_when_asked(progress, capsys):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, x, t):
            return toy()(x, t) * self.scale

    for model in (Model(), Model().forward):
        samples = create_diffusion("ddim4").p_sample_loop(model, SHAPE, progress=progress)
        assert samples.device.type == "cpu"
    assert ("4/4" in capsys.readouterr().err) == progress


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loop", LOOPS)
def test_low_precision_runs_stay_near_the_exact_one(loop, dtype):
    diffusion, x = create_diffusion("ddim10"), random(0, dtype)
    draws = [random(seed, dtype) for seed in range(10)]

    def run(dtype):
        noise = iter(draws)
        extra = {} if loop.startswith("dpm") else {"noise_fn": lambda _x: next(noise).to(dtype)}
        return getattr(diffusion, loop)(toy(), SHAPE, noise=x.to(dtype), **extra)

    low, exact = run(dtype), run(torch.float64)
    assert low.dtype == dtype
    assert (low - exact).abs().max() <= 30 * torch.finfo(dtype).eps


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("shape", [(0, 2, 3, 3), (3, 5), (2, 3, 7)], ids=["empty", "flat", "1d"])
def test_other_shapes(loop, shape):
    """Each sample's values do not depend on how they are laid out."""
    diffusion, x = create_diffusion("ddim4"), random(0, shape=shape)
    extra = {} if loop.startswith("dpm") else {"noise_fn": torch.ones_like}
    got = getattr(diffusion, loop)(toy(), shape, noise=x, **extra)
    assert got.shape == shape
    as_image = x.reshape(*shape[:2], math.prod(shape[2:]), 1)
    want = getattr(diffusion, loop)(toy(), as_image.shape, noise=as_image, **extra)
    assert torch.equal(got, want.reshape(shape))


def test_one_step_schedule():
    """There is no t = 1 to take the variance at t = 0 from: beta's own stands in."""
    diffusion, x = create_diffusion("1"), random(0, torch.float32)
    out = diffusion.p_sample_loop(toy(), SHAPE, noise=x, clip_denoised=False)
    want = Plain(diffusion.betas).x0(x, toy()(x, torch.zeros(4))[:, :2], 0)
    close(out, want)
    for sigma_small in (False, True):
        fixed = create_diffusion("1", learn_sigma=False, sigma_small=sigma_small)
        log = fixed.p_mean_variance(toy(False), x, torch.zeros(4, dtype=torch.int64))
        assert log["log_variance"].unique().item() == pytest.approx(math.log(fixed.betas[0]))
