"""Every loss and its gradient against distributions worked out in float64, one sample at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from plain_diffusion import Plain, toy
from torch import Tensor, nn

from fastdit.diffusion import GaussianDiffusion, LossType, ModelMeanType, ModelVarType
from fastdit.diffusion.losses import discretized_gaussian_log_likelihood, normal_kl

BETAS = np.linspace(1e-3, 0.2, 12)
T = torch.tensor([0, 1, 5, 11])
KINDS = ("learned_range", "fixed_large", "fixed_small")


def make(loss="mse", variance="learned_range", mean="epsilon") -> GaussianDiffusion:
    return GaussianDiffusion(
        BETAS,
        model_mean_type=ModelMeanType(mean),
        model_var_type=ModelVarType(variance),
        loss_type=LossType(loss),
    )


def batch(dtype=torch.float64) -> tuple[Tensor, Tensor]:
    """Images on the 8-bit grid, with pixels at both ends, and noise."""
    generator = torch.Generator().manual_seed(3)
    levels = torch.randint(-40, 296, (4, 2, 3, 3), generator=generator).clamp(0, 255)
    noise = torch.randn(4, 2, 3, 3, generator=generator, dtype=torch.float64)
    return (levels.double() / 127.5 - 1).to(dtype), noise.to(dtype)


def by_hand(model, x_start, noise, loss: str, variance: str, mean: str, scale: float) -> dict:
    """The losses of all samples, in the order of `T`."""
    plain, terms = Plain(BETAS), {"mse": [], "vb": [], "loss": []}
    for i, t in enumerate(T.tolist()):
        x0, z = x_start[i : i + 1], noise[i : i + 1]
        x = plain.noised(x0, t, z)
        output = model(x, T[i : i + 1])
        first, v = output[:, :2], output[:, 2:]
        for_bound = first if "kl" in loss else first.detach()
        predicted = plain.x0(x, for_bound, t) if mean == "epsilon" else for_bound
        bound = plain.bound_term(x0, x, predicted, t, plain.variance(variance, t, v)) * scale
        mse = ((z if mean == "epsilon" else x0) - first).square().mean()
        total = mse + bound if variance == "learned_range" else mse
        for name, term in (("mse", mse), ("vb", bound), ("loss", bound if "kl" in loss else total)):
            terms[name].append(term)
    return {name: torch.stack(values) for name, values in terms.items()}


SCALES = {"mse": 1.0, "rescaled_mse": 12 / 1000, "kl": 1.0, "rescaled_kl": 12.0}


@pytest.mark.parametrize("mean", ["epsilon", "x_start"])
@pytest.mark.parametrize("variance", KINDS)
@pytest.mark.parametrize("loss", SCALES)
def test_loss_and_its_gradient(loss, variance, mean):
    """Through a 1x1 convolution's weights; with the MSE losses ε gets no gradient of the bound."""
    torch.manual_seed(1)
    learned = variance == "learned_range"
    net = nn.Conv2d(2, 4 if learned else 2, 1).double()

    def model(x, _t):
        return torch.tanh(net(x))

    x_start, noise = batch()
    got = make(loss, variance, mean).training_losses(model, x_start, T, noise=noise)
    want = by_hand(model, x_start, noise, loss, variance, mean, SCALES[loss])
    names = {"loss"} if "kl" in loss else {"loss", "mse", "vb"} if learned else {"loss", "mse"}
    assert set(got) == names
    for name in names:
        assert got[name].dtype == torch.float64
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-6)
    weights = torch.tensor([1.0, 2.0, -1.0, 0.5], dtype=torch.float64)
    gradients = [
        torch.autograd.grad((terms["loss"] * weights).sum(), list(net.parameters()))
        for terms in (got, want)
    ]
    for g, w in zip(*gradients, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5 * float(w.abs().max()))


@pytest.mark.parametrize("loss", ["mse", "kl"])
def test_gradient_by_finite_differences(loss):
    diffusion, (x_start, noise) = make(loss, "learned_range"), batch()
    output = toy()(x_start, T).requires_grad_()

    def total(output: Tensor) -> Tensor:
        return diffusion.training_losses(lambda x, t: output, x_start, T, noise=noise)["loss"]

    if loss == "kl":
        assert torch.autograd.gradcheck(total, output, fast_mode=True)
        return
    (gradient,) = torch.autograd.grad(total(output).sum(), output)
    step = torch.zeros_like(output)
    step[1, 3, 0, 0] = 1e-5  # a variance channel: the bound moves it
    slope = (total(output + step) - total(output - step)).sum() / 2e-5
    torch.testing.assert_close(gradient[1, 3, 0, 0], slope, rtol=1e-6, atol=0)
    error = output[1, 0, 0, 0] - noise[1, 0, 0, 0]  # an ε channel: the mean squared error alone
    torch.testing.assert_close(gradient[1, 0, 0, 0], 2 * error / 18)


def test_the_noise_is_drawn_first_and_model_kwargs_are_passed():
    diffusion, (x_start, _) = make(), batch(torch.float32)
    torch.manual_seed(4)
    noise = torch.randn_like(x_start)
    seen = {}

    def model(x, t, y):
        seen["y"] = y
        return toy()(x, t)

    torch.manual_seed(4)
    drawn = diffusion.training_losses(model, x_start, T, {"y": 7})
    given = diffusion.training_losses(toy(), x_start, T, noise=noise)
    assert seen == {"y": 7}
    assert torch.equal(drawn["loss"], given["loss"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_samples_have_float32_losses(dtype):
    """The model sees the samples' dtype; what follows its output is float32."""
    diffusion, (x_start, noise) = make(), batch(dtype)
    seen = []

    def model(x, t):
        seen.append(x)
        return toy()(x, t)

    losses = diffusion.training_losses(model, x_start, T, noise=noise)
    plain, x, output = Plain(BETAS), seen[0].double(), toy()(seen[0], T).double()
    assert seen[0].dtype == dtype
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    for i, t in enumerate(T.tolist()):
        first, v = output[i, :2], output[i, 2:]
        mse = (noise[i].double() - first).square().mean()
        spread = plain.variance("learned_range", t, v)
        vb = plain.bound_term(x_start[i].double(), x[i], plain.x0(x[i], first, t), t, spread)
        assert losses["mse"][i].item() == pytest.approx(mse.item(), rel=1e-5)
        assert losses["vb"][i].item() == pytest.approx(vb.item(), rel=1e-5)


def test_an_empty_batch_has_no_losses():
    diffusion, x = make(), torch.zeros(0, 2, 3, 3)
    losses = diffusion.training_losses(toy(), x, torch.zeros(0, dtype=torch.int64))
    assert {loss.shape for loss in losses.values()} == {(0,)}
    assert diffusion.calc_bpd_loop(toy(), x)["vb"].shape == (0, 12)


@pytest.mark.parametrize("variance", KINDS)
@pytest.mark.parametrize("clip", [False, True])
def test_bits_per_dimension(variance, clip):
    diffusion, plain, (x_start, _) = make(variance=variance), Plain(BETAS), batch()
    model = toy(variance == "learned_range")
    draws = torch.randn(12, *x_start.shape, generator=torch.Generator().manual_seed(5)).double()
    noise = iter(draws)
    got = diffusion.calc_bpd_loop(
        model, x_start, clip_denoised=clip, noise_fn=lambda _x: next(noise)
    )
    for column, t in enumerate(reversed(range(12))):
        x = plain.noised(x_start, t, draws[column])
        output = model(x, torch.full((4,), t))
        x0 = plain.x0(x, output[:, :2], t)
        x0 = x0.clamp(-1, 1) if clip else x0
        spread = plain.variance(variance, t, output[:, 2:])
        spread = torch.as_tensor(spread, dtype=torch.float64).expand(x.shape)
        for i in range(4):
            one = slice(i, i + 1)
            vb = plain.bound_term(x_start[one], x[one], x0[one], t, spread[one])
            xstart_mse = (x0[one] - x_start[one]).square().mean()
            mse = (plain.epsilon(x[one], x0[one], t) - draws[column][one]).square().mean()
            for name, want in (("vb", vb), ("xstart_mse", xstart_mse), ("mse", mse)):
                torch.testing.assert_close(got[name][i, column], want, rtol=2e-5, atol=1e-6)
    bar = plain.bar[-1]
    mean_square = bar * x_start.square().flatten(1).mean(1)
    prior = 0.5 * (mean_square + (1 - bar) - 1 - math.log(1 - bar)) / math.log(2)
    torch.testing.assert_close(got["prior_bpd"], prior, rtol=1e-4, atol=0)
    torch.testing.assert_close(got["total_bpd"], got["vb"].sum(1) + got["prior_bpd"])


def test_the_discretised_probabilities_of_all_256_values_sum_to_one():
    x = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    for mean, std in ((0.1, 0.2), (-0.95, 0.3), (0.3, 0.004)):
        mean, log_std = torch.tensor(mean).double(), torch.tensor(std).double().log()
        log = discretized_gaussian_log_likelihood(x, mean, log_std)
        assert log.exp().sum().item() == pytest.approx(1, abs=1e-9)
        exact = torch.distributions.Normal(mean, log_std.exp())
        middle = exact.cdf(x[1:-1] + 1 / 255) - exact.cdf(x[1:-1] - 1 / 255)
        torch.testing.assert_close(log[1:-1].exp(), middle, rtol=0, atol=1e-3)


def test_an_impossible_value_has_a_finite_likelihood():
    log = discretized_gaussian_log_likelihood(
        torch.tensor([0.0]), torch.tensor([50.0]), torch.tensor([-5.0])
    )
    assert log.item() == pytest.approx(math.log(1e-12))


def test_kl_of_gaussians():
    numbers = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)).double().unbind(0)
    mean1, log1, mean2, log2 = numbers
    normal = torch.distributions.Normal
    want = torch.distributions.kl_divergence(
        normal(mean1, (log1 / 2).exp()), normal(mean2, (log2 / 2).exp())
    )
    torch.testing.assert_close(normal_kl(mean1, log1, mean2, log2), want)
