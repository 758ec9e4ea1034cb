"""Sampler steps against formulas from first principles, diffusers, and exact solutions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from plain_diffusion import SHAPE, Plain, close, random, toy
from torch import Tensor

from fastdit import backends, reference
from fastdit.diffusion import GaussianDiffusion, ModelMeanType, ModelVarType, create_diffusion

BETAS = np.linspace(2e-3, 0.3, 10)
T = torch.tensor([0, 1, 4, 9])


def make(variance="learned_range", mean="epsilon") -> GaussianDiffusion:
    return GaussianDiffusion(
        BETAS, model_mean_type=ModelMeanType(mean), model_var_type=ModelVarType(variance)
    )


# ---- single steps, one sample at a time -------------------------------------------------------


def squash(x0: Tensor) -> Tensor:
    return 1.4 * torch.sin(x0)


def pull(x: Tensor, t: Tensor, **_kwargs) -> Tensor:
    return torch.cos(x) + t.reshape(-1, 1, 1, 1) / 500


def predicted(plain, output, x, t, mean, clip, denoised) -> Tensor:
    x0 = plain.x0(x, output[:2], t) if mean == "epsilon" else output[:2]
    x0 = squash(x0) if denoised else x0
    return x0.clamp(-1, 1) if clip else x0


OPTIONS = [
    pytest.mark.parametrize("mean", ["epsilon", "x_start"]),
    pytest.mark.parametrize("clip", [False, True]),
    pytest.mark.parametrize("denoised", [False, True]),
    pytest.mark.parametrize("conditioned", [False, True]),
]


def every_option(test):
    for mark in OPTIONS:
        test = mark(test)
    return test


@every_option
@pytest.mark.parametrize("variance", ["learned_range", "fixed_large", "fixed_small"])
def test_ddpm(variance, mean, clip, denoised, conditioned):
    """denoised_fn acts before the clamp; cond_fn moves the mean by variance·gradient."""
    plain, model = Plain(BETAS), toy(variance == "learned_range")
    x, z, output = random(0), random(1), model(random(0), T)
    out = make(variance, mean).p_sample(
        model, x, T, clip, squash if denoised else None, pull if conditioned else None, noise=z
    )
    gradient = pull(x, T) if conditioned else torch.zeros_like(x)
    for i, t in enumerate(T.tolist()):
        x0 = predicted(plain, output[i], x[i], t, mean, clip, denoised)
        spread = plain.variance(variance, t, output[i, 2:])
        if variance == "fixed_small" and t == 0:
            spread = 0.0
        close(out["pred_xstart"][i], x0)
        close(out["sample"][i], plain.ddpm(x[i], x0, t, spread, z[i], gradient[i]))


@every_option
@pytest.mark.parametrize("solver", ["ddim", "ddim_noisy", "reverse", "dpm"])
def test_deterministic_solvers(solver, mean, clip, denoised, conditioned):
    """cond_fn turns the score after the clamp, and x0 follows."""
    plain, model, diffusion = Plain(BETAS), toy(), make(mean=mean)
    x, z, output = random(0), random(1), model(random(0), T)
    given = (clip, squash if denoised else None, pull if conditioned else None)
    if solver == "reverse":
        out = diffusion.ddim_reverse_sample(model, x, T, *given)
    elif solver == "dpm":
        out = diffusion.dpm_solver_sample(model, x, T, *given, order=1)
    else:
        eta = 0.7 if solver == "ddim_noisy" else 0.0
        out = diffusion.ddim_sample(model, x, T, *given, eta=eta, noise=z)
    for i, t in enumerate(T.tolist()):
        x0 = predicted(plain, output[i], x[i], t, mean, clip, denoised)
        if conditioned:
            gradient = pull(x, T)[i]
            epsilon = plain.epsilon(x[i], x0, t) - math.sqrt(1 - plain.bar[t]) * gradient
            x0 = plain.x0(x[i], epsilon, t)
        close(out["pred_xstart"][i], x0)
        if solver == "reverse":
            after = plain.bar[t + 1] if t < 9 else 0.0
            epsilon = plain.epsilon(x[i], x0, t)
            want = math.sqrt(after) * x0 + math.sqrt(1 - after) * epsilon
        else:
            want = plain.ddim(x[i], x0, t, 0.7 if solver == "ddim_noisy" else 0.0, z[i])
        close(out["sample"][i], want)


class Squashing(GaussianDiffusion):
    """As forks do that treat x0 in a way of their own, dynamic thresholding for one."""

    def p_mean_variance(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None):
        assert denoised_fn is None
        return super().p_mean_variance(model, x, t, clip_denoised, squash, model_kwargs)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("conditioned", [False, True])
@pytest.mark.parametrize("variance", ["learned_range", "fixed_large", "fixed_small"])
def test_a_subclasss_moments_are_what_its_steps_go_by(variance, conditioned, clip):
    kinds = {"model_var_type": ModelVarType(variance)}
    ours, theirs = make(variance), Squashing(BETAS, **kinds)
    model, x, cond = toy(variance == "learned_range"), random(0), pull if conditioned else None
    for name, extra in (
        ("p_sample", {"noise": random(1)}),
        ("p_sample", {"noise": lambda _x: None}),
        ("ddim_sample", {"noise": random(1), "eta": 0.7}),
        ("ddim_reverse_sample", {}),
        ("dpm_solver_sample", {"x0_previous": random(2)}),
    ):
        want = getattr(ours, name)(model, x, T, clip, squash, cond, **extra)
        got = getattr(theirs, name)(model, x, T, clip, None, cond, **extra)
        close(got["sample"], want["sample"])
        close(got["pred_xstart"], want["pred_xstart"])


def test_a_subclasss_x0_is_not_clamped_again():
    class Doubling(GaussianDiffusion):
        def p_mean_variance(self, *args, **kwargs):
            out = super().p_mean_variance(*args, **kwargs)
            return out | {"pred_xstart": 2 * out["pred_xstart"]}

    x = random(0)
    clamped = make().ddim_sample(toy(), x, T)["pred_xstart"]
    assert clamped.abs().max() == 1
    for name in ("p_sample", "ddim_sample", "dpm_solver_sample"):
        out = getattr(Doubling(BETAS), name)(toy(), x, T)
        close(out["pred_xstart"], 2 * clamped)


def test_the_model_and_cond_fn_are_given_original_timesteps_and_kwargs():
    diffusion, seen = create_diffusion("ddim10"), []

    def spy(function):
        def called(x, t, **kwargs):
            seen.append((t.tolist(), t.dtype, kwargs))
            return function(x, t)

        return called

    x, t = random(0), torch.tensor([0, 3, 9, 3])
    for step in (diffusion.p_sample, diffusion.ddim_sample, diffusion.dpm_solver_sample):
        seen.clear()
        step(spy(toy()), x, t, cond_fn=spy(pull), model_kwargs={"y": 1})
        assert seen == [([0, 300, 900, 300], torch.int64, {"y": 1})] * 2


def test_p_mean_variance_passes_on_what_else_the_model_returns():
    diffusion, x = make(), random(0)
    plain = diffusion.p_mean_variance(toy(), x, T)
    assert plain["extra"] is None
    both = diffusion.p_mean_variance(lambda x, t: (toy()(x, t), "more"), x, T)
    assert both["extra"] == "more"
    assert torch.equal(both["mean"], plain["mean"])
    fixed = make("fixed_small").p_mean_variance(toy(False), x, T)
    assert fixed["variance"].shape == fixed["log_variance"].shape == x.shape


def test_the_forward_process():
    plain, diffusion, x0, z = Plain(BETAS), make(), random(0), random(1)
    mean, variance, log_variance = diffusion.q_mean_variance(x0, T)
    posterior = diffusion.q_posterior_mean_variance(x0, z, T)
    for i, t in enumerate(T.tolist()):
        close(diffusion.q_sample(x0, T, z)[i], plain.noised(x0[i], t, z[i]))
        close(mean[i], math.sqrt(plain.bar[t]) * x0[i])
        assert variance[i].unique().item() == pytest.approx(1 - plain.bar[t], rel=1e-6)
        close(posterior[0][i], plain.posterior_mean(x0[i], z[i], t))
        want = plain.posterior_variance(t)
        assert posterior[1][i].unique().item() == pytest.approx(want if t else 0.0, rel=1e-6)
        assert posterior[2][i].unique().item() == pytest.approx(math.log(want), rel=1e-6)
    assert variance.shape == posterior[1].shape == posterior[2].shape == x0.shape
    torch.testing.assert_close(variance.log(), log_variance)


def test_single_steps_are_differentiable():
    x = random(0).requires_grad_()
    diffusion = make()
    for step in (diffusion.p_sample, diffusion.ddim_sample, diffusion.dpm_solver_sample):

        def function(x, step=step):
            extra = {} if step == diffusion.dpm_solver_sample else {"noise": random(1)}
            return step(toy(), x, T, clip_denoised=False, **extra)["sample"]

        assert torch.autograd.gradcheck(function, x, fast_mode=True)


def test_tables_first_used_in_inference_mode_serve_training_later():
    """A kernel saves its table for the backward pass, which an inference tensor would refuse."""
    diffusion, x = make(), random(0)
    leaf = random(0).requires_grad_()
    kernel = backends.Kernel("diffusion_step", "cpu", "opaque", reference.diffusion_step)
    backends.register(kernel)
    try:
        with torch.inference_mode():
            diffusion.p_sample(toy(), x, T)
            diffusion.q_sample(x, T)
        losses = diffusion.training_losses(lambda x, t: toy()(x * leaf, t), x, T)
        losses["loss"].sum().backward()
    finally:
        backends.unregister(kernel)
    assert leaf.grad.abs().max() > 0


def test_dpm_solver_without_history_is_of_order_1():
    diffusion, x = make(), random(0)
    one, two = (diffusion.dpm_solver_sample(toy(), x, T, order=order) for order in (1, 2))
    assert torch.equal(one["sample"], two["sample"])
    history = diffusion.dpm_solver_sample(toy(), x, T, x0_previous=random(1))["sample"]
    changed = [not torch.equal(a, b) for a, b in zip(history, one["sample"], strict=True)]
    assert changed == [False, True, True, False]  # T is 0, 1, 4, 9: the ends are of order 1


def test_noise_none_of_a_function_adds_none():
    diffusion, x = make(), random(0)
    mean = diffusion.p_mean_variance(toy(), x, T)["mean"]
    assert torch.equal(diffusion.p_sample(toy(), x, T, noise=lambda x: None)["sample"], mean)


# ---- diffusers --------------------------------------------------------------------------------


def scheduler(diffusion: GaussianDiffusion, name: str, **kwargs):
    """Theirs, on the same betas, set to every step of them."""
    diffusers = pytest.importorskip("diffusers")
    made = getattr(diffusers, name)(
        num_train_timesteps=diffusion.num_timesteps, trained_betas=diffusion.betas, **kwargs
    )
    return made


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("mean", ["epsilon", "x_start"])
def test_ddim_is_that_of_diffusers(eta, clip, mean):
    diffusion = make("fixed_small", mean)
    theirs = scheduler(
        diffusion,
        "DDIMScheduler",
        clip_sample=clip,
        prediction_type="epsilon" if mean == "epsilon" else "sample",
    )
    theirs.set_timesteps(10)
    x = want = random(0)
    for t in theirs.timesteps.tolist():
        z, index = random(t + 1), torch.full((4,), t)
        out = diffusion.ddim_sample(toy(False), x, index, clip_denoised=clip, eta=eta, noise=z)
        output = toy(False)(want, index)
        step = theirs.step(
            output, t, want, eta=eta, use_clipped_model_output=True, variance_noise=z
        )
        x, want = out["sample"], step.prev_sample
        close(x, want)
        close(out["pred_xstart"], step.pred_original_sample)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("respacing", ["10", "ddim20", "30,5,5"])
@pytest.mark.parametrize("predict_xstart", [False, True])
def test_dpm_solver_is_that_of_diffusers(order, respacing, predict_xstart):
    diffusion = create_diffusion(respacing, learn_sigma=False, predict_xstart=predict_xstart)
    theirs = scheduler(
        diffusion,
        "DPMSolverMultistepScheduler",
        algorithm_type="dpmsolver++",
        solver_order=order,
        solver_type="midpoint",
        final_sigmas_type="zero",
        prediction_type="sample" if predict_xstart else "epsilon",
    )
    theirs.set_timesteps(timesteps=list(range(diffusion.num_timesteps))[::-1])
    bars = np.array(Plain(diffusion.betas).bar[::-1])
    sigmas = torch.from_numpy(np.append(np.sqrt((1 - bars) / bars), 0.0))
    np.testing.assert_allclose(1 / (1 + theirs.sigmas[:-1] ** 2), bars, rtol=2e-6)
    theirs.sigmas = sigmas  # Theirs are float32: 1 − ᾱ has lost four digits at low noise.
    want = random(0)
    ours = diffusion.dpm_solver_sample_loop_progressive(
        toy(False), SHAPE, noise=want, clip_denoised=False, order=order
    )
    for t, out in zip(theirs.timesteps.tolist(), ours, strict=True):
        output = toy(False)(want, torch.full((4,), diffusion.timestep_map[t]))
        want = theirs.step(output, t, want).prev_sample
        close(out["sample"], want)
    assert torch.equal(out["sample"], out["pred_xstart"])


# ---- exact solutions --------------------------------------------------------------------------


def gaussian_data(diffusion: GaussianDiffusion, spread: float):
    """The exact model of data N(0, spread²): ε = √(1 − ᾱ)·x/(ᾱ·spread² + 1 − ᾱ)."""
    bars = dict(zip(diffusion.timestep_map, diffusion.alphas_cumprod.tolist(), strict=True))

    def model(x, t):
        bar = torch.tensor([bars[i] for i in t.tolist()]).to(x).reshape(-1, 1, 1, 1)
        return x * (1 - bar).sqrt() / (bar * spread**2 + 1 - bar)

    return model


def flow_error(respacing: str, order: int) -> float:
    """At the least noise, ᾱ_0: along the exact flow x/√(ᾱ·spread² + 1 − ᾱ) is constant."""
    diffusion, x = create_diffusion(respacing, learn_sigma=False), random(0)
    steps = diffusion.dpm_solver_sample_loop_progressive(
        gaussian_data(diffusion, 0.5), SHAPE, noise=x, clip_denoised=False, order=order
    )
    *_, got, _last = (out["sample"] for out in steps)
    width = [math.sqrt(bar * 0.25 + 1 - bar) for bar in diffusion.alphas_cumprod[[0, -1]]]
    return float((got - x * width[0] / width[1]).abs().max())


def test_dpm_solver_converges_with_its_order():
    errors = {order: [flow_error(n, order=order) for n in ("50", "100")] for order in (1, 2)}
    first, second = (math.log2(coarse / fine) for coarse, fine in errors.values())
    assert first == pytest.approx(1, abs=0.1)
    assert second == pytest.approx(2, abs=0.1)


def test_reverse_undoes_ddim():
    """For a linear model both are linear maps; the shorter the steps, the nearer to inverse."""
    errors = []
    for respacing in ("ddim50", "ddim500"):
        diffusion = create_diffusion(respacing, learn_sigma=False)
        model, x = gaussian_data(diffusion, 0.5), random(0)
        there = x
        for t in range(len(diffusion.betas) - 1):
            there = diffusion.ddim_reverse_sample(
                model, there, torch.full((4,), t), clip_denoised=False
            )["sample"]
        back = there
        for t in range(len(diffusion.betas) - 1, 0, -1):
            back = diffusion.ddim_sample(model, back, torch.full((4,), t), clip_denoised=False)[
                "sample"
            ]
        errors.append(float((back - x).abs().max()))
    order = math.log10(errors[0] / errors[1])
    assert order == pytest.approx(1, abs=0.1)


def test_reverse_is_the_exact_inverse_where_epsilon_does_not_change():
    diffusion, x, constant = make("fixed_small"), random(0), random(1)

    def model(x, t):
        return constant

    for t in range(9):
        after, now = torch.full((4,), t + 1), torch.full((4,), t)
        up = diffusion.ddim_reverse_sample(model, x, now, clip_denoised=False)["sample"]
        down = diffusion.ddim_sample(model, up, after, clip_denoised=False)["sample"]
        close(down, x)
