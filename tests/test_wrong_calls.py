"""What a user may get wrong: the error names the argument, what it was, and what is allowed."""

from __future__ import annotations

import re

import pytest
import torch

import fastdit
from fastdit import cli
from fastdit.trainer import TrainConfig

SIZES = {"input_size": 8, "depth": 1, "hidden_size": 48, "num_heads": 4, "num_classes": 10}


def dit(**options):
    return fastdit.DiT(**{**SIZES, **options}).eval()


@pytest.fixture(scope="module")
def model():
    return dit()


WRONG_MODELS = {
    "depth": -1,
    "hidden_size": 0,
    "in_channels": 2.0,
    "input_size": 8.0,
    "learn_sigma": "no",
    "mlp_ratio": float("nan"),
    "num_classes": -1,
    "num_heads": 5,
    "patch_size": 3,
    "class_dropout_prob": 2,
    "conditioning": "adaln-zero",
}


@pytest.mark.parametrize("name", WRONG_MODELS)
def test_a_model_refuses(name):
    got = re.escape(repr(WRONG_MODELS[name]))
    with pytest.raises(ValueError, match=rf"^{name}: got {got}.*, allowed is "):
        dit(**{name: WRONG_MODELS[name]})


@pytest.mark.parametrize("ratio", [0, -1, 1 / 49, float("inf"), "4"])
def test_an_mlp_has_a_channel(ratio):
    with pytest.raises(ValueError, match=r"^mlp_ratio: got .*allowed is a number from 1/hidden"):
        dit(mlp_ratio=ratio)


@pytest.mark.parametrize(("names", "known"), [("DiT_models", "DiT-XL/2"), ("presets", "literal")])
def test_names_are_told(names, known):
    with pytest.raises(KeyError, match=f"{names}: got 'x', allowed is .*'{known}'"):
        getattr(fastdit, names)["x"]


X, T, Y = torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), torch.tensor([3, 4])
WRONG_CALLS = {
    "x is an array": (TypeError, "x: got ndarray, allowed is a tensor", (X.numpy(), T, Y)),
    "t is a number": (TypeError, "t: got int, allowed is a tensor", (X, 5, Y)),
    "y is a list": (TypeError, "y: got list, allowed is a tensor", (X, T, [1, 2])),
    "x in float64": (ValueError, "x: got .*float64.*allowed is float32 on cpu", (X.double(), T, Y)),
    "x elsewhere": (ValueError, "t: got .*cpu, allowed is on meta, as x is", (X.to("meta"), T, Y)),
    "t elsewhere": (ValueError, "t: got .*meta, allowed is on cpu", (X, T.to("meta"), Y)),
    "y in floats": (ValueError, "y: got .*float32.*allowed is int64", (X, T, Y.float())),
    "y too large": (IndexError, r"y: got \[3, 11\], allowed is 0 to 10", (X, T, Y + Y // 4 * 7)),
    "y below 0": (IndexError, r"y: got \[-1, 0\], allowed is 0 to 10", (X, T, Y - 4)),
    "one drop": (ValueError, r"force_drop_ids: got \(1,\), allowed is \(2,\)", (X, T, Y, T[:1])),
}


@pytest.mark.parametrize("case", WRONG_CALLS)
def test_a_forward_refuses(model, case):
    error, message, args = WRONG_CALLS[case]
    with pytest.raises(error, match=f"^{message}"):
        model(*args)


def test_autocast_takes_other_dtypes(model):
    with torch.autocast("cpu", torch.bfloat16):
        assert model(X.half(), T, Y).isfinite().all()


def test_no_null_condition():
    for options in ({"class_dropout_prob": 0}, {"num_classes": 0}):
        with pytest.raises(ValueError, match="null_condition: got a model with"):
            dit(**options).null_condition(2)


WRONG_RUNS = {
    "lr": -1.0,
    "weight_decay": float("nan"),
    "warmup_steps": -1,
    "sample_every": -1,
    "clip_grad": 0.0,
    "ema": 1.0,
    "steps": 0,
    "schedule": "linear",
}


@pytest.mark.parametrize("name", WRONG_RUNS)
def test_a_run_refuses(name):
    with pytest.raises(ValueError, match=rf"^{name}: got .*, allowed is "):
        TrainConfig(data="digits", out="x", **{name: WRONG_RUNS[name]})


@pytest.mark.parametrize("device", ["gpu", "xla", 3.5])
def test_devices_that_are_not_there(model, tmp_path, device):
    fastdit.save_model(model, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"^device: got '{device}', allowed is cpu"):
        fastdit.load_model(tmp_path / "model.safetensors", device=device)


def test_a_command_says_what_is_wrong_in_one_line(tmp_path):
    (tmp_path / "state.pt").touch()
    train = ["train", "--data", "digits", "--steps", "1", "--out"]
    drawn = ["sample", "--ckpt", "digits", "--classes", "1"]
    for argv, message in (
        ([*train, str(tmp_path)], "fastdit train: --out: .* holds a run; pass --resume"),
        ([*train, str(tmp_path / "new"), "--device", "gpu"], "fastdit train: device: got 'gpu'"),
        ([*drawn, "--device", "gpu"], "fastdit sample: device: got 'gpu'"),
    ):
        with pytest.raises(SystemExit, match=message):
            cli.main(argv)
    assert not (tmp_path / "new").exists()


def test_an_error_of_a_write_names_the_file(model, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=re.escape(str(tmp_path / "file"))):
        fastdit.save_model(model, tmp_path / "file" / "model.safetensors")
    long = tmp_path / ("x" * 300)
    with pytest.raises(OSError, match=f"'{re.escape(str(long))}'"):
        fastdit.save_model(model, long)


@pytest.mark.parametrize("run", [fastdit.sample, fastdit.Sampler], ids=["sample", "Sampler"])
@pytest.mark.parametrize("wrong", ["model.pt", torch.nn.Linear(2, 2)], ids=["path", "Linear"])
def test_samplers_ask_for_a_model(run, wrong):
    with pytest.raises(TypeError, match=f"^model: got {type(wrong).__name__}, .*load_model"):
        run(wrong, classes=[1]) if run is fastdit.sample else run(wrong)


@pytest.mark.parametrize(
    ("classes", "options", "message"),
    [
        ([1.5], {}, r"^classes: got \[1.5\], allowed is integer labels"),
        (torch.tensor([True]), {}, "^classes: got .*, allowed is integer labels"),
        (["cat"], {}, r"^classes: got \['cat'\], allowed is a list of labels"),
        ([1], {"cfg_scale": float("nan")}, "^cfg_scale: got nan, allowed is a finite number"),
        ([1], {"cfg_scale": "4"}, "^cfg_scale: got '4', allowed is a finite number"),
        ([1], {"seed": 1.5}, "^seed: got 1.5, allowed is None or an int"),
        ([1], {"seed": [1]}, r"^seed: got \[1\], allowed is None or an int"),
    ],
)
def test_what_cannot_be_sampled(model, classes, options, message):
    for more in ({}, {"transport": fastdit.create_transport(), "solver": "dopri5"}):
        with pytest.raises(ValueError, match=message):
            fastdit.sample(model, classes, **options, **more)


@pytest.mark.parametrize("option", ["--batch-size", "--count", "--per-class"])
def test_counts_of_the_command_line(option, capsys):
    with pytest.raises(SystemExit):
        cli.main(["sample", "--ckpt", "digits", option, "-1"])
    assert f"{option}: got '-1', allowed is an int >= 1" in capsys.readouterr().err
