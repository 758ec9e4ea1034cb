"""Training: the update, exact resume, and what a run leaves behind."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.util
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image

import fastdit
from fastdit import cli, digits, training
from fastdit import trainer as trainer_module
from fastdit.checkpoint import load_model
from fastdit.commands import train as train_command
from fastdit.flow import load_transport
from fastdit.trainer import DivergedError, TrainConfig, Trainer, learning_rate
from fastdit.training import train


def tiny(out, **changes) -> TrainConfig:
    defaults = {
        "data": "digits",
        "depth": 1,
        "hidden_size": 24,
        "num_heads": 2,
        "patch_size": 4,
        "steps": 6,
        "batch_size": 8,
        "lr": 1e-3,
        "ema": 0.9,
        "class_dropout_prob": 0.3,
    }
    return TrainConfig(out=str(out), **{**defaults, **changes})


def same(a, b) -> bool:
    """Two states with equal bits everywhere."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize(
    "changes",
    [
        {"accumulate": 2, "clip_grad": 0.5, "warmup_steps": 4},
        {"amp": "bf16", "flip": False, "weight_decay": 0.1, "schedule": "cosine"},
        {"amp": "fp16"},
        {"objective": "flow", "t_sampling": "logit_normal", "time_scale": 1000.0},
    ],
    ids=["fp32", "bf16", "fp16", "flow"],
)
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path, changes, monkeypatch):
    whole = train(tiny(tmp_path / "whole", **changes), progress=False).state()

    step, calls = Trainer.step, []

    def interrupted(self):
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)  # as Ctrl-C in the middle of a step
        return step(self)

    config = tiny(tmp_path / "parts", **changes)
    monkeypatch.setattr(Trainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(config, progress=False)
    assert len(calls) == 4
    monkeypatch.setattr(Trainer, "step", step)
    torch.manual_seed(99)  # what happens in between does not matter
    resumed = train(config, resume=True, progress=False).state()
    del whole["config"], resumed["config"]
    assert resumed["step"] == 6
    assert same(whole, resumed)


def test_sampling_on_the_way_does_not_change_the_run(tmp_path):
    plain = train(tiny(tmp_path / "a"), progress=False).state()
    sampled = train(tiny(tmp_path / "b", sample_every=3), progress=False).state()
    assert same(plain["model"], sampled["model"])
    assert Image.open(tmp_path / "b" / "samples-0000006.png").size[0] > 8 * 64


def test_accumulation_is_one_large_batch(tmp_path, monkeypatch):
    """With the same draws, two halves give the gradient of the whole batch."""
    monkeypatch.setattr(
        Trainer,
        "_loss",
        lambda self, x, y: (
            self.model(x, torch.full_like(y, 500), y, torch.zeros_like(y)).sub(1).square().mean()
        ),
    )
    states = []
    for accumulate in (1, 2):
        trainer = Trainer(tiny(tmp_path, accumulate=accumulate))
        losses = [trainer.step() for _ in range(3)]
        states.append((losses, [p.detach() for p in trainer.model.parameters()]))
    assert states[0][0] == pytest.approx(states[1][0], rel=1e-5)
    for a, b in zip(states[0][1], states[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_warmup_and_the_average(tmp_path):
    trainer = Trainer(tiny(tmp_path, warmup_steps=4, lr=0.1))
    rates, expected = [], copy.deepcopy(trainer.average).state_dict()
    for _ in range(5):
        trainer.step()
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        for name, value in trainer.model.state_dict().items():
            expected[name] = 0.9 * expected[name] + 0.1 * value
    assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1])
    cosine = tiny(tmp_path, steps=12, warmup_steps=2, lr=0.1, schedule="cosine")
    rates = [learning_rate(cosine, step) for step in (0, 2, 7, 12)]
    assert rates == pytest.approx([0.05, 0.1, 0.05, 0.0])
    for name, value in trainer.average.state_dict().items():
        torch.testing.assert_close(value, expected[name])


def test_a_run_learns_and_leaves_its_files(tmp_path):
    trainer = train(tiny(tmp_path, steps=60, hidden_size=48, lr=3e-3), progress=False)
    assert np.mean(trainer.losses[-10:]) < 0.8 * np.mean(trainer.losses[:5])
    loaded = load_model(tmp_path / "ema.safetensors")
    assert loaded.config == trainer.model.config
    assert same(loaded.state_dict(), trainer.average.state_dict())
    assert Image.open(tmp_path / "loss.png").size == (720, 420)


def test_a_flow_learns_and_its_file_says_what_it_is(tmp_path):
    options = {"objective": "flow", "learn_sigma": False, "time_scale": 1000.0, "sample_every": 60}
    config = tiny(tmp_path, steps=60, hidden_size=48, lr=3e-3, **options)
    trainer = train(config, progress=False)
    assert np.mean(trainer.losses[-10:]) < 0.8 * np.mean(trainer.losses[:5])
    transport = load_transport(tmp_path / "ema.safetensors")
    assert transport.config == config.transport().config
    assert transport.time_scale == 1000
    assert (tmp_path / "samples-0000060.png").exists()


def test_a_state_from_before_an_option_has_its_default(tmp_path):
    trainer = Trainer(tiny(tmp_path))
    state = trainer.state()
    for name in ("objective", *trainer_module.FLOW_OPTIONS):
        del state["config"][name]
    trainer.restore(state)
    with pytest.raises(ValueError, match="objective = 'diffusion' then, 'flow' now"):
        Trainer(tiny(tmp_path, objective="flow")).restore(state)


def test_a_cut_off_save_leaves_the_last_one(tmp_path, monkeypatch):
    config = tiny(tmp_path, steps=2)
    train(config, progress=False)
    before = (tmp_path / "state.pt").read_bytes()

    def half(state, file):
        file.write(b"half a file")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="No space left"):
        train(dataclasses.replace(config, steps=3), resume=True, progress=False)
    assert (tmp_path / "state.pt").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ema.safetensors", "loss.png", "state.pt"]


def test_a_diverged_run_keeps_its_last_checkpoint(tmp_path):
    config = tiny(tmp_path, steps=2)
    train(config, progress=False)
    before = (tmp_path / "state.pt").read_bytes()
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    state["model"]["final_layer.linear.bias"][0] = float("nan")
    torch.save(state, tmp_path / "state.pt")
    broken = (tmp_path / "state.pt").read_bytes()
    with pytest.raises(DivergedError, match="the loss of step 3 is nan"):
        train(dataclasses.replace(config, steps=4), resume=True, progress=False)
    assert (tmp_path / "state.pt").read_bytes() == broken != before


def test_a_missing_matplotlib_is_told_before_the_first_step(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    with pytest.raises(ImportError, match=r"pip install 'fastdit\[train\]'"):
        train(tiny(tmp_path / "run"), progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"design": {"conditioning": "in_context", "positions": "learned_2d", "qk_norm": "rms"}},
        {"design": fastdit.presets["literal"], "unconditional": True},
    ],
    ids=["in_context", "literal"],
)
def test_other_designs_train_and_sample(tmp_path, changes, monkeypatch):
    monkeypatch.setattr(training, "plot_losses", lambda losses, path: path.write_bytes(b""))
    config = tiny(tmp_path, steps=2, **changes)
    trainer = train(config, progress=False)
    model = load_model(tmp_path / "ema.safetensors")
    assert model.design.options() == changes["design"]
    assert bool(model.num_classes) != config.unconditional
    training.save_samples(trainer, tmp_path / "samples.png")
    assert (tmp_path / "samples.png").stat().st_size > 0


def test_the_command_takes_every_choice_of_design(tmp_path):
    argv = ["train", "--data", "digits", "--out", str(tmp_path), "--preset", "literal"]
    argv += ["--conditioning", "adaln_zero", "--rope", "--qk-norm", "none", "--frequency-dim", "64"]
    config = train_command.config_from(cli.build_parser().parse_args(argv))
    assert config.design == {
        **fastdit.presets["literal"],
        "conditioning": "adaln_zero",
        "rope": True,
        "qk_norm": None,
        "frequency_dim": 64,
    }


def test_without_a_learned_variance(tmp_path):
    trainer = train(tiny(tmp_path, steps=2, learn_sigma=False), progress=False)
    assert trainer.model.out_channels == 1
    assert not load_model(tmp_path / "ema.safetensors").learn_sigma


def test_another_run_is_not_overwritten_or_resumed(tmp_path):
    config = tiny(tmp_path, steps=1)
    with pytest.raises(FileNotFoundError, match=r"--resume: there is no state\.pt"):
        train(config, resume=True, progress=False)
    train(config, progress=False)
    with pytest.raises(FileExistsError, match="holds a run; pass --resume"):
        train(config, progress=False)
    with pytest.raises(ValueError, match=r"lr = 0\.001 then, 0\.5 now"):
        train(dataclasses.replace(config, lr=0.5), resume=True, progress=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accumulate": 3}, "accumulate: got 3, allowed is a divisor of batch_size = 8"),
        ({"schedule": "step"}, "schedule: got 'step', allowed is constant, cosine"),
        ({"amp": "fp8"}, "amp: got 'fp8', allowed is none, bf16, fp16"),
        ({"model": "DiT-M/2"}, "model: got 'DiT-M/2', allowed is custom, DiT-XL/2"),
        ({"ema": 1.0}, r"ema: got 1\.0"),
        ({"steps": 0}, "steps: got 0"),
        ({"objective": "gan"}, "objective: got 'gan', allowed is diffusion, flow"),
        ({"objective": "flow", "prediction": "x0"}, "prediction: got 'x0'"),
        ({"time_scale": 2.0}, r"time_scale: got 2\.0, allowed is 1\.0 with objective='diffusion'"),
    ],
)
def test_wrong_settings_are_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(tmp_path, **changes)


def test_the_command_trains_on_a_folder_and_takes_the_recipe_of_digits(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / name / "x.png")
    options = "--image-size 8 --depth 1 --hidden-size 24 --num-heads 2 --patch-size 4 --steps 2"
    argv = ["train", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run")]
    cli.main([*argv, *options.split(), "--batch-size", "4", "--no-flip"])
    assert "2 steps" in capsys.readouterr().out
    parser = cli.build_parser()
    recipe = train_command.config_from(
        parser.parse_args(["train", "--data", "digits", "--out", "x"])
    )
    assert {k: getattr(recipe, k) for k in train_command.DIGITS} == train_command.DIGITS
    given = ["train", "--data", "digits", "--out", "x", "--lr", "0.5", "--flip"]
    changed = train_command.config_from(parser.parse_args(given))
    assert (changed.lr, changed.flip) == (0.5, True)
    flow = train_command.config_from(parser.parse_args([*given, "--objective", "flow"]))
    assert flow.transport().config["time_scale"] == train_command.DIGITS_FLOW["time_scale"]


def test_the_shipped_digits_are_recognised():
    """A hundred guided samples in few steps; `python -m fastdit.digits` draws the full figure."""
    model = digits.load_digits_model()
    assert sum(p.numel() for p in model.parameters()) < 600_000
    assert digits.recognition(model, cfg_scale=2.0, count=100, steps=20) >= 0.95
    assert digits.recognition(model, cfg_scale=1.0, count=200, steps=20) >= 0.85


def test_the_shipped_flow_digits_are_recognised():
    """At 25 steps of Heun and at 50 calls of the model by Euler."""
    model = digits.load_digits_model(objective="flow")
    transport = load_transport(digits.weights_path("flow"))
    assert sum(p.numel() for p in model.parameters()) < 600_000
    recognised = functools.partial(digits.recognition, model, transport=transport)
    assert recognised(2.0, count=50, steps=25, solver="heun") >= 0.95
    assert recognised(2.0, count=50, steps=50, solver="euler") >= 0.95
    assert recognised(1.0, count=100, steps=12, solver="heun") >= 0.85


def test_the_reader_reads_real_digits_and_rejects_others():
    reader, data = digits.Reader(), digits.load_digits()
    assert reader.held_out > 0.98
    assert reader.accuracy(data.images, (data.labels + 1) % 10) < 0.01
