"""Flow matching: the published code's outputs, paths and conversions, training losses."""

from __future__ import annotations

import functools
import math

import golden
import numpy as np
import pytest
import torch
from exact_flow import PATH_NAMES, PREDICTIONS
from torch import Tensor

import fastdit
from fastdit.flow import PathType, Sampler
from fastdit.flow.paths import PATHS
from fastdit.flow.tables import LAST_STEPS

NAMES = ["flow_0", "flow_1"]


def toy(x: Tensor, t: Tensor) -> Tensor:
    """The oracle's model; `t` is 1000 times the path's."""
    return torch.tanh(0.9 * x + 0.3 * torch.sin(7 * t.reshape(-1, 1, 1, 1) / 1000))


@functools.cache
def oracle(name: str):
    data = golden.load(name)
    transport = fastdit.create_transport(
        str(data["path"]), str(data["prediction"]), time_scale=1000.0
    )
    arrays = {k: v for k, v in data.items() if v.ndim}
    return transport, {k: torch.from_numpy(arrays[k]) for k in ("x0", "x1", "t")}, arrays


@pytest.mark.parametrize("name", NAMES)
def test_the_published_path_and_loss(name):
    transport, given, want = oracle(name)
    xt, ut = transport.path.at(given["t"], given["x0"], given["x1"])
    loss = transport.training_losses(toy, given["x1"], noise=given["x0"], t=given["t"])["loss"]
    for got, key in ((xt, "xt"), (ut, "ut"), (loss, "loss")):
        assert golden.relative_error(got, want[key]) < 1e-6


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("method", "steps"), [("euler", 9), ("heun2", 9), ("dopri5", 5)])
def test_the_published_ode(name, method, steps):
    if method == "dopri5":
        pytest.importorskip("torchdiffeq")
    transport, given, want = oracle(name)
    states = Sampler(transport).sample_ode(sampling_method=method, num_steps=steps)(
        given["x0"], toy
    )
    assert states.shape == (steps, *given["x0"].shape)
    assert torch.equal(states[0], given["x0"])
    # dopri5 chooses its steps by an error that rounding moves.
    limit = 1e-4 if method == "dopri5" else 2e-6
    assert golden.relative_error(states[-1], want[f"ode_{method}"]) < limit


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["SBDM", "sigma", "linear"])
def test_the_published_sde(name, form):
    """Every entry that is finite there; the others are finite here."""
    transport, given, want = oracle(name)
    compared = 0
    for method in ("Euler", "Heun"):
        for last in LAST_STEPS:
            draws = iter(torch.from_numpy(want["sde_noise"]))
            states = Sampler(transport).sample_sde(
                sampling_method=method,
                diffusion_form=form,
                last_step=last,
                num_steps=10,
                noise_fn=lambda _x, draws=draws: next(draws),
            )(given["x0"], toy)
            assert len(states) == 10
            assert next(draws, None) is None
            expected = want[f"sde_{method}_{form}_{last}"]
            if np.isfinite(expected).all():
                compared += 1
                assert golden.relative_error(states[-1], expected) < 2e-6
            else:
                assert states[-1].isfinite().all()
    linear = transport.path_type is PathType.LINEAR
    assert compared == (0 if form == "SBDM" else 7 if linear else 8)


# ---- paths and conversions ---------------------------------------------------------------------


@pytest.mark.parametrize("name", PATH_NAMES)
def test_a_paths_derivatives_and_ends(name):
    path = PATHS[PathType(name)]
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64, requires_grad=True)
    for function in (path.alpha, path.sigma):
        value, derivative = function(t)
        (expected,) = torch.autograd.grad(value.sum(), t)
        torch.testing.assert_close(derivative, expected)
    (alpha, d_alpha), (sigma, d_sigma) = path.alpha(t), path.sigma(t)
    torch.testing.assert_close(path.rate(t), d_alpha / alpha)
    torch.testing.assert_close(path.score_weight(t), d_alpha / alpha * sigma**2 - sigma * d_sigma)
    start, end = (torch.tensor(float(end), dtype=torch.float64) for end in (0, 1))
    assert float(path.alpha(start)[0]) == pytest.approx(math.exp(-5.025) if name == "VP" else 0)
    assert float(path.sigma(end)[0]) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", PATH_NAMES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_conversions(name, prediction):
    transport = fastdit.create_transport(name, prediction)
    g = torch.Generator().manual_seed(0)
    x0, x1 = torch.randn(2, 5, 2, 3, generator=g, dtype=torch.float64)
    t = torch.tensor([0.1, 0.3, 0.5, 0.8, 0.99], dtype=torch.float64)
    x, v = transport.path.at(t, x0, x1)
    score = -x0 / transport.path.sigma(t.reshape(-1, 1, 1))[0]
    said = {"velocity": v, "noise": x0, "score": score}[prediction]
    for wanted, expected in (("velocity", v), ("score", score), ("data", x1)):
        torch.testing.assert_close(transport.convert(wanted, x, t, said), expected)
    drift, scored = transport.get_drift(), transport.get_score()
    torch.testing.assert_close(drift(x, t, lambda *_: said), v)
    torch.testing.assert_close(scored(x, t, lambda *_: said), score)


# ---- training ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PATH_NAMES)
@pytest.mark.parametrize("prediction", ["noise", "score"])
def test_loss_weights(name, prediction):
    """`velocity` is the loss of the velocity that the output stands for."""
    g = torch.Generator().manual_seed(1)
    x0, x1, output = torch.randn(3, 6, 2, 3, generator=g, dtype=torch.float64)
    t = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    transport = functools.partial(fastdit.create_transport, name, prediction)

    def loss(weight):
        given = transport(weight).training_losses(lambda *_: output, x1, noise=x0, t=t)
        return given["loss"]

    xt, ut = transport().path.at(t, x0, x1)
    velocity = transport().convert("velocity", xt, t, output)
    torch.testing.assert_close(loss("velocity"), (velocity - ut).square().mean((1, 2)))
    path, at = transport().path, t.reshape(-1, 1, 1)
    sigma, weight = path.sigma(at)[0], path.score_weight(at)
    error = output - x0 if prediction == "noise" else sigma * output + x0
    torch.testing.assert_close(loss(None), error.square().mean((1, 2)))
    likely = (weight / sigma**2 * error.square()).mean((1, 2))
    torch.testing.assert_close(loss("likelihood"), likely)


def test_cosine_loss():
    x1, x0 = torch.ones(1, 2, 3), torch.zeros(1, 2, 3)
    output = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]).T[None]
    plain, both = (
        fastdit.create_transport(cosine_loss=on).training_losses(
            lambda *_: output, x1, noise=x0, t=torch.tensor([0.5])
        )["loss"]
        for on in (False, True)
    )
    root = math.sqrt(0.5)
    assert float(both - plain) == pytest.approx(((1 - root) + (1 - root) + 2) / 3)


def test_times_are_drawn_as_published():
    x1 = torch.zeros(4, 1, 2, 2)
    torch.manual_seed(3)
    noise, t = torch.randn(4, 1, 2, 2), torch.rand(4)
    for options, t0, t1 in [
        ({}, 0, 1),
        ({"path_type": "VP"}, 0, 1 - 1e-5),
        ({"prediction": "noise"}, 1e-3, 1 - 1e-3),
        ({"prediction": "score", "path_type": "GVP", "train_eps": 0.1}, 0.1, 0.9),
        ({"train_eps": 0.25}, 0.25, 0.75),
    ]:
        torch.manual_seed(3)
        got, x0, _ = fastdit.create_transport(**options).sample(x1)
        assert torch.equal(x0, noise)
        torch.testing.assert_close(got, t * (t1 - t0) + t0)


def test_other_times():
    torch.manual_seed(0)
    transport = fastdit.create_transport(t_sampling="logit_normal", logit_mean=-0.5, logit_std=0.8)
    logits = torch.logit(transport.sample_t(20000).double())
    assert float(logits.mean()) == pytest.approx(-0.5, abs=0.03)
    assert float(logits.std()) == pytest.approx(0.8, abs=0.03)
    torch.manual_seed(0)
    shifted = fastdit.create_transport(
        t_sampling="logit_normal", logit_mean=-0.5, logit_std=0.8, timestep_shift=0.3
    ).sample_t(20000)
    expected = torch.sigmoid(logits + math.log(0.3))  # a shift is an addition in logits
    torch.testing.assert_close(shifted.double(), expected, rtol=1e-4, atol=1e-5)
