"""A flow's calls: guidance, one op a step, dtypes, `fastdit.sample`, files, and mistakes."""

from __future__ import annotations

import importlib.util
import math
import sys

import golden
import pytest
import torch
from exact_flow import exact, labelled, solution

import fastdit
from fastdit import ops
from fastdit.flow import ODE, SDE, Guidance, Sampler, load_transport, transport_metadata

ODES = Sampler(fastdit.create_transport())


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
    options = {"seed": 0, "transport": transport}
    outs = {}
    for solver in (None, "euler", "heun", "sde", "sde_heun", SDE("Heun"), ODE("euler")):
        outs[solver] = fastdit.sample(model, [1, 3], steps=6, solver=solver, **options)
        assert outs[solver].isfinite().all()
    assert torch.equal(outs[None], outs["heun"])
    assert torch.equal(outs[ODE("euler")], outs["euler"])
    assert not torch.equal(outs["euler"], outs["sde"])
    assert not torch.equal(outs["sde"], outs["sde_heun"])
    if importlib.util.find_spec("torchdiffeq"):
        adaptive = fastdit.sample(model, [1, 3], solver="dopri5", **options)
        fine = fastdit.sample(model, [1, 3], steps=40, **options)
        assert (adaptive - fine).abs().max() < 0.02 * fine.abs().max()
    part = fastdit.sample(model, [1, 3], steps=6, seed=0, transport=transport, cfg_scale=1)
    never = fastdit.sample(
        model, [1, 3], steps=6, seed=0, transport=transport, guidance_interval=(0.05, 0.07)
    )
    assert torch.equal(part, never)


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ({}, "path_type='Linear', prediction='velocity'"),
        ({"path_type": "VP", "prediction": "noise"}, "path_type='VP', prediction='noise'"),
        (
            {"time_scale": 1000.0, "loss_weight": "velocity", "sample_eps": 0.01},
            "path_type='Linear', prediction='velocity', loss_weight='velocity', sample_eps=0.01, "
            "time_scale=1000.0",
        ),
    ],
)
def test_a_transport_shows_the_call_that_makes_it(arguments, shown):
    transport = fastdit.create_transport(**arguments)
    assert repr(transport) == f"create_transport({shown})"
    again = eval(repr(transport), {"create_transport": fastdit.create_transport})
    assert again.config == transport.config


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda: Guidance("2"), ValueError, "scale: got '2', allowed is a finite number"),
        (lambda: Guidance(2.0, 0.5), ValueError, "interval: got 0.5, allowed is .low, high."),
        (lambda: Guidance(2.0, channels=1.5), ValueError, "channels: got 1.5"),
        (lambda: Sampler("Linear"), TypeError, "transport: got str"),
        (lambda: ODES.sample_ode(guidance=2.0), TypeError, "guidance: got float"),
        (lambda: ODES.sample_sde(guidance=2.0), TypeError, "guidance: got float"),
        (lambda: ODES.sample_sde(noise_fn=3), TypeError, "noise_fn: got int"),
    ],
)
def test_what_is_no_guidance_transport_or_function_is_named(wrong, error, message):
    with pytest.raises(error, match=message):
        wrong()


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


def test_a_scale_of_one_runs_no_null_half():
    seen: list = []
    sample = Sampler(fastdit.create_transport()).sample_ode(
        sampling_method="euler", num_steps=3, guidance=Guidance(1.0)
    )
    sample(torch.zeros(2, 4, 2, 2), labelled(seen), y=torch.tensor([1, 2]))
    assert seen == [(2, 0), (2, 0.5)]
