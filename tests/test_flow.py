"""Flow matching against the published code's outputs, and samplers against exact solutions.

The exact flow: data N(m, s²) in every dimension. Then x_t is N(αm, α²s² + σ²), and the velocity,
the noise and the score that a perfect model predicts are known.
"""

from __future__ import annotations

import functools
import math
import sys

import golden
import numpy as np
import pytest
import torch
from torch import Tensor

import fastdit
from fastdit import ops
from fastdit.flow import Guidance, ModelType, PathType, Sampler, load_transport, transport_metadata
from fastdit.flow.paths import FORMS, PATHS
from fastdit.flow.tables import LAST_STEPS

NAMES = ["flow_0", "flow_1"]
MEAN, STD = 0.7, 0.4
STEPS = 60
PATH_NAMES = [kind.value for kind in PathType]
PREDICTIONS = [kind.value for kind in ModelType]


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


# ---- samplers against the exact flow -----------------------------------------------------------


def exact(transport, calls: list | None = None):
    """A perfect model of N(m, s²), and what it was called with."""

    def model(x: Tensor, t: Tensor, **_kwargs) -> Tensor:
        t = t / transport.time_scale
        if calls is not None:
            calls.append((len(x), float(t[0])))
        (alpha, d_alpha), (sigma, d_sigma) = (
            f(t.double().reshape(-1, *[1] * (x.dim() - 1)))
            for f in (transport.path.alpha, transport.path.sigma)
        )
        variance = (alpha * STD) ** 2 + sigma**2
        off = x - alpha * MEAN
        said = {
            "score": -off / variance,
            "noise": sigma * off / variance,
            "velocity": d_alpha * MEAN
            + (alpha * d_alpha * STD**2 + sigma * d_sigma) * off / variance,
        }
        return said[transport.model_type.value].to(x.dtype)

    return model


def solution(transport, x: Tensor, before: float, after: float) -> Tensor:
    """Where the exact flow takes x: every quantile keeps its place."""
    t = torch.tensor([before, after], dtype=torch.float64)
    alpha, sigma = transport.path.alpha(t)[0], transport.path.sigma(t)[0]
    spread = ((alpha * STD) ** 2 + sigma**2).sqrt()
    return alpha[1] * MEAN + spread[1] / spread[0] * (x - alpha[0] * MEAN)


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
    for plan in (
        sampler.ode_plan("heun", 5),
        sampler.sde_plan("Euler", 5, diffusion_form="sigma", last_step="Tweedie"),
        sampler.sde_plan("Heun", 5, diffusion_form="linear", last_step="Mean"),
    ):
        seen: list = []
        observe = lambda *frame, seen=seen: seen.append(frame)  # noqa: E731
        assert len(list(sampler.states(plan, x, model, {}, observe=observe))) == sum(plan.ends)
        assert len(seen) == len(plan)
        for when, at, data in seen:
            t = torch.tensor([when], dtype=torch.float64)
            expected = transport.convert("data", at, t, model(at, t)) if when < 1 else at
            torch.testing.assert_close(data, expected, rtol=1e-5, atol=1e-5)


def test_sbdms_first_step():
    """Infinite at t = 0 on the linear path: the second time's w is taken there, or the floor's."""
    transport = fastdit.create_transport()
    times = torch.tensor([0.0, 0.1, 0.2], dtype=torch.float64)
    weights = transport.path.diffusion("SBDM", 1.0, times)
    assert weights.isfinite().tolist() == [False, True, True]
    for floor, expected in ((None, [0.1, 0.1, 0.2]), (0.15, [0.15, 0.15, 0.2])):
        plan = Sampler(transport).sde_plan("Euler", 11, last_step=None, diffusion_floor=floor)
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


# ---- guidance, the op, the model's call --------------------------------------------------------


def labelled(seen: list):
    """A model whose velocity is its label, and 10 times that in a second half of channels."""

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.append((len(x), round(float(t[0]), 4)))
        label = y.reshape(-1, 1, 1, 1).to(x) * torch.ones_like(x)
        return torch.cat([label, 10 * label], 1)

    return model


@pytest.mark.parametrize("method", ["euler", "dopri5"])
def test_guidance_in_an_interval(method):
    if method == "dopri5":
        pytest.importorskip("torchdiffeq")
    seen: list = []
    y, x = torch.tensor([1, 2]), torch.zeros(2, 4, 2, 2)
    guidance = Guidance(3.0, interval=(0.25, 0.5), channels=3, null=7)
    sample = Sampler(fastdit.create_transport()).sample_ode(
        sampling_method=method, num_steps=5, guidance=guidance
    )
    out = sample(x, labelled(seen), y=y)[-1]
    if method == "euler":
        assert seen == [(2, 0), (4, 0.25), (4, 0.5), (2, 0.75)]
        guided, plain = 0.5 * (7 + 3 * (y - 7)) + 0.5 * y, y.float()
        assert torch.equal(out[:, :3], guided.reshape(2, 1, 1, 1).expand(2, 3, 2, 2))
        assert torch.equal(out[:, 3:], plain.reshape(2, 1, 1, 1).expand(2, 1, 2, 2))
    else:
        assert {rows for rows, t in seen if 0.25 <= t <= 0.5} == {4}
        assert {rows for rows, t in seen if not 0.25 <= t <= 0.5} == {2}


def test_guidance_is_the_published_forward_with_cfg():
    model = fastdit.DiT(input_size=4, hidden_size=24, depth=1, num_heads=2, num_classes=5)
    golden.set_reference_weights(model, 1)
    model.eval()
    x, y = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 3])
    sampler = Sampler(fastdit.create_transport())
    got = sampler.sample_ode(sampling_method="heun", num_steps=4, guidance=Guidance(4.0))(
        x, model, y=y
    )[-1]
    both = {"y": torch.cat([y, torch.full_like(y, 5)]), "cfg_scale": 4.0}
    expected = sampler.sample_ode(sampling_method="heun", num_steps=4)(
        torch.cat([x, x]), model.forward_with_cfg, **both
    )[-1][:2]
    torch.testing.assert_close(got, expected)
    assert torch.equal(
        got,
        fastdit.flow.sampling.draw(
            sampler.transport, model, x, y, steps=3, solver="heun", guidance=Guidance(4.0)
        ),
    )


@pytest.mark.parametrize(("method", "calls"), [("euler", 4), ("heun", 8)])
def test_a_step_is_one_op_after_each_call_of_the_model(method, calls, monkeypatch):
    step, ran, seen = ops.diffusion_step, [], []
    monkeypatch.setattr(ops, "diffusion_step", lambda *a, **k: ran.append(1) or step(*a, **k))
    sample = Sampler(fastdit.create_transport(time_scale=1000.0)).sample_ode(
        sampling_method=method, num_steps=5
    )
    sample(torch.zeros(2, 4, 2, 2), labelled(seen), y=torch.tensor([1, 2]))
    assert len(ran) == len(seen) == calls
    assert seen[1] == (2, 250)


def test_half_precision_keeps_the_times():
    seen: list = []
    transport = fastdit.create_transport(time_scale=1000.0)

    def model(x, t):
        seen.append((x.dtype, t.dtype))
        return exact(transport)(x, t)

    x = torch.randn(1, 2, 3, 3, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    out = Sampler(transport).sample_ode(sampling_method="heun", num_steps=20)(x, model)[-1]
    assert out.dtype == torch.bfloat16
    assert set(seen) == {(torch.bfloat16, torch.float32)}
    assert golden.relative_error(out, solution(transport, x.double(), 0, 1).numpy()) < 0.03
    assert transport.training_losses(model, x)["loss"].dtype == torch.float32


def test_fastdit_sample_draws_a_flow():
    model = fastdit.DiT(input_size=4, hidden_size=24, depth=1, num_heads=2, num_classes=5)
    golden.set_reference_weights(model, 1)
    model.eval()
    transport = fastdit.create_transport(time_scale=1000.0)
    outs = {}
    for solver in (None, "euler", "heun", "sde", "dopri5"):
        if solver == "dopri5" and "torchdiffeq" not in sys.modules:
            continue
        outs[solver] = fastdit.sample(
            model, [1, 3], steps=6, solver=solver, seed=0, transport=transport
        )
        assert outs[solver].isfinite().all()
    assert torch.equal(outs[None], outs["heun"])
    assert not torch.equal(outs["euler"], outs["sde"])
    part = fastdit.sample(model, [1, 3], steps=6, seed=0, transport=transport, cfg_scale=1)
    never = fastdit.sample(
        model, [1, 3], steps=6, seed=0, transport=transport, guidance_interval=(0.05, 0.07)
    )
    assert torch.equal(part, never)


def test_a_file_keeps_its_transport(tmp_path):
    model = fastdit.DiT(input_size=4, hidden_size=24, depth=1, num_heads=2, num_classes=5)
    transport = fastdit.create_transport("GVP", "score", "likelihood", 0.01, time_scale=1000.0)
    path = tmp_path / "flow.safetensors"
    fastdit.save_model(model, path, metadata=transport_metadata(transport))
    assert load_transport(path).config == transport.config
    fastdit.save_model(model, path, metadata=transport_metadata(None))
    assert load_transport(path) is None
    for text in ("{", "[]", '{"path": 1}', '{"path_type": "Bent"}'):
        fastdit.save_model(model, path, metadata={"transport": text})
        with pytest.raises(fastdit.CheckpointError, match="the transport inside"):
            load_transport(path)


# ---- mistakes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path_type": "VE"}, "path_type: got 'VE', allowed is 'Linear', 'GVP', 'VP'"),
        ({"prediction": "x0"}, "prediction: got 'x0'"),
        ({"loss_weight": "snr"}, "loss_weight: got 'snr', allowed is None, 'velocity'"),
        ({"train_eps": 0.5}, "train_eps: got 0.5"),
        ({"sample_eps": -1}, "sample_eps: got -1"),
        ({"t_sampling": "beta"}, "t_sampling: got 'beta'"),
        ({"logit_std": 0}, "logit_std: got 0"),
        ({"timestep_shift": 0.0}, "timestep_shift: got 0.0"),
        ({"time_scale": float("nan")}, "time_scale: got nan"),
    ],
)
def test_wrong_transports(options, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        fastdit.create_transport(**options)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("sample_ode", {"num_steps": 1}, "num_steps: got 1, allowed is an int >= 2"),
        ("sample_ode", {"sampling_method": "rk5"}, "sampling_method: got 'rk5'"),
        ("sample_sde", {"sampling_method": "euler"}, "sampling_method: got 'euler'"),
        ("sample_sde", {"diffusion_form": "flat"}, "diffusion_form: got 'flat'"),
        ("sample_sde", {"last_step": "mean"}, "last_step: got 'mean'"),
        ("sample_sde", {"last_step_size": 0}, "last_step_size: got 0"),
        ("sample_sde", {"diffusion_norm": -1}, "diffusion_norm: got -1"),
        ("sample_sde", {"diffusion_floor": 1.5}, "diffusion_floor: got 1.5"),
        (
            "sample_sde",
            {"sampling_method": "Heun", "diffusion_form": "constant", "last_step": None},
            "t: got 1, allowed is a solver whose coefficients are finite",
        ),
    ],
)
def test_wrong_samplers(method, options, message):
    if options.get("sampling_method") == "rk5":
        pytest.importorskip("torchdiffeq")
    with pytest.raises(ValueError, match=message):
        getattr(Sampler(fastdit.create_transport()), method)(**options)


def test_a_noise_models_singular_end_is_an_error():
    transport = fastdit.create_transport(prediction="noise", sample_eps=0.0)
    with pytest.raises(ValueError, match=r"a noise model's are not at t = 0; sample_eps > 0"):
        Sampler(transport).sample_ode(sampling_method="euler")


def test_wrong_calls():
    sampler = Sampler(fastdit.create_transport())
    x = torch.zeros(2, 4, 2, 2)
    sample = sampler.sample_ode(sampling_method="euler", guidance=Guidance(2.0))
    with pytest.raises(ValueError, match=r"y: got NoneType, allowed is a tensor of 2 labels"):
        sample(x, labelled([]))
    with pytest.raises(ValueError, match="null: got None, allowed is a label"):
        sample(x, labelled([]), y=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"interval: got \(0.5, 0.2\)"):
        Guidance(2.0, interval=(0.5, 0.2))
    with pytest.raises(ValueError, match="channels: got -1"):
        Guidance(2.0, channels=-1)
    plain = sampler.sample_ode(sampling_method="euler")
    with pytest.raises(ValueError, match=r"the model's output: got \(2, 3, 2, 2\)"):
        plain(x, lambda x, _t: x[:, :3])
    losses = fastdit.create_transport().training_losses
    with pytest.raises(ValueError, match="noise: got"):
        losses(lambda x, _t: x, x, noise=x[:1], t=torch.rand(2))
    with pytest.raises(ValueError, match=r"t: got .*, allowed is floating point \(2,\)"):
        losses(lambda x, _t: x, x, noise=x, t=torch.tensor([1, 2]))


def test_without_torchdiffeq(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    sampler = Sampler(fastdit.create_transport())
    with pytest.raises(ImportError, match=r"pip install 'fastdit\[flow\]'"):
        sampler.sample_ode()
    with pytest.raises(ImportError, match=r"pip install 'fastdit\[flow\]'"):
        sampler.sample_ode_likelihood()


def test_an_empty_batch_and_a_nan():
    sampler = Sampler(fastdit.create_transport())
    sample = sampler.sample_ode(sampling_method="heun", num_steps=3)
    assert sample(torch.zeros(0, 4, 2, 2), lambda x, _t: x)[-1].shape == (0, 4, 2, 2)
    x = torch.ones(2, 1, 1, 1)
    x[1] = math.nan
    out = sample(x, lambda x, _t: x)[-1].flatten()
    assert out.isnan().tolist() == [False, True]
