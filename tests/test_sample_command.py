"""`fastdit sample` of models of every kind: what is asked for, and the files that come out."""

from __future__ import annotations

import wave

import numpy as np
import pytest
import torch
from PIL import Image

import fastdit
from fastdit import audio, cli
from fastdit.flow import SDE, create_transport, transport_metadata

SIZES = {"input_size": 8, "hidden_size": 16, "depth": 1, "num_heads": 2, "in_channels": 1}
MODELS = {
    "none": {"num_classes": 0},
    "classes": {"num_classes": 2},
    "vectors": {"num_classes": 0, "condition_dim": 3},
    "signal": {"input_size": (12,), "num_classes": 2, "in_channels": 2},
    "signal_vectors": {"input_size": (12,), "num_classes": 0, "condition_dim": 3},
    "spectrogram": {"input_size": (8, 6), "patch_size": (4, 2), "num_classes": 0},
    "flow": {"num_classes": 2, "learn_sigma": False},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder, found = tmp_path_factory.mktemp("models"), {}
    for seed, (name, options) in enumerate(MODELS.items()):
        torch.manual_seed(seed)
        model = fastdit.DiT(**{**SIZES, **options})
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        found[name] = str(folder / f"{name}.safetensors")
        transport = create_transport(time_scale=1000.0) if name == "flow" else None
        fastdit.save_model(model, found[name], metadata=transport_metadata(transport))
    return found


@pytest.fixture
def sample(files, tmp_path, capsys):
    def run(name, *options, out="s.npz"):
        path = tmp_path / out
        cli.main(["sample", "--ckpt", files[name], "--steps", "2", "--out", str(path), *options])
        return path, " ".join(capsys.readouterr().out.split())

    return run


def arrays(path):
    with np.load(path) as file:
        return file["arr_0"], file["arr_1"]


def test_samples_of_a_model_without_condition_are_counted(sample):
    path, printed = sample("none", "--count", "3", "--batch-size", "2")
    assert "3 images" in printed
    assert arrays(path)[0].shape == (3, 8, 8, 3)


def test_vectors_from_the_command_line_and_from_files(sample, files, tmp_path):
    given = np.array([[0.5, -1, 2], [0, 1, 0]], np.float32)
    np.save(tmp_path / "v.npy", given)
    np.savez(tmp_path / "v.npz", arr_0=np.zeros(5), arr_1=given)
    found = []
    for source in ("0.5,-1,2;0,1,0", str(tmp_path / "v.npy"), str(tmp_path / "v.npz")):
        path, printed = sample("vectors", "--vectors", source, "--solver", "ddim", out="out.npy")
        assert "2 images" in printed
        found.append(np.load(path))
    model = fastdit.load_model(files["vectors"])
    options = {"steps": 2, "solver": "ddim", "seed": 0, "clip_denoised": True}
    expected = fastdit.sample(model, torch.from_numpy(given), **options)
    for samples in found:
        assert np.array_equal(samples, expected.numpy())
    path, _ = sample("vectors", "--vectors", "0.5,-1,2;0,1,0", "--per-class", "2")
    images, vectors = arrays(path)
    assert images.shape == (4, 8, 8, 3)
    assert np.array_equal(vectors, given[[0, 0, 1, 1]])


def test_signals_as_arrays_plots_and_sounds(sample, files, tmp_path):
    options = ["--classes", "0,1", "--solver", "ddim"]
    path, printed = sample("signal", *options)
    assert "2 signals, ddim 2 steps" in printed
    signals, labels = arrays(path)
    assert signals.shape == (2, 2, 12)
    assert labels.tolist() == [0, 1]
    model = fastdit.load_model(files["signal"])
    expected = fastdit.sample(model, [0, 1], steps=2, solver="ddim", seed=0)
    assert np.array_equal(signals, expected.numpy())  # a signal's range is its own: not clamped
    assert fastdit.data.load_npz(path).shape == (2, 12)
    path, _ = sample("signal", *options, out="s.png")
    assert Image.open(path).size == (600, 160)
    _, printed = sample("signal", *options, "--rate", "8000", out="s.wav")
    assert "s-0.wav to s-1.wav" in printed
    with wave.open(str(tmp_path / "s-1.wav")) as file:
        assert (file.getframerate(), file.getnchannels(), file.getnframes()) == (8000, 2, 12)
    read = audio.load_signal(tmp_path / "s-1.wav")
    assert np.abs(read.numpy() - signals[1].clip(-1, 1 - 2**-15)).max() <= 2**-16 + 1e-7
    path, _ = sample("signal_vectors", "--vectors", "1,2,3", out="one.wav")
    assert audio.load_signal(path).shape == (1, 12)


def test_a_spectrogram_is_a_sound(sample, tmp_path):
    path, _ = sample("spectrogram", "--solver", "ddim", out="s.npy")
    coefficients = torch.from_numpy(np.load(path))
    path, printed = sample("spectrogram", "--solver", "ddim", out="s.wav")
    assert "1 images" in printed
    expected = audio.imdct(coefficients[0], 40).clamp(-1, 1)
    assert (audio.load_signal(path) - expected).abs().max() <= 2**-15


def test_options_of_a_flows_sde(sample, files):
    given = ["--classes", "1", "--solver", "sde_heun", "--diffusion-form", "linear"]
    path, printed = sample("flow", *given, "--last-step", "none", out="s.npy")
    assert "sde_heun 2 steps" in printed
    solver = SDE("Heun", "linear", last_step=None, last_step_size=None)
    model, transport = fastdit.load_model(files["flow"]), create_transport(time_scale=1000.0)
    options = {"steps": 2, "seed": 0, "transport": transport, "solver": solver}
    assert np.array_equal(np.load(path), fastdit.sample(model, [1], **options).numpy())


def test_the_profile_is_printed_and_traced(sample, tmp_path):
    trace = tmp_path / "trace.json"
    _, printed = sample("classes", "--classes", "1", "--profile", str(trace))
    assert "spent on" in printed
    assert "GFLOP/s" in printed
    assert trace.stat().st_size > 1000


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("none", ["--classes", "1"], "the model has none; --count"),
        ("none", ["--vectors", "1,2"], "--vectors: the model takes none"),
        ("classes", [], "--classes: got none, allowed are labels 0 to 1"),
        ("classes", ["--count", "2"], "--count: the model has classes"),
        ("vectors", [], "--vectors: got none, allowed are vectors of 3 numbers"),
        (
            "vectors",
            ["--vectors", "1,2"],
            "--vectors: got vectors of 2 numbers, allowed are v",
        ),
        ("vectors", ["--classes", "1"], "the model takes vectors; say --vectors"),
        ("signal", [], "--classes: got none"),
        ("classes", ["--classes", "1", "--last-step", "Mean"], "--last-step: allowed with --sol"),
        ("flow", ["--classes", "1", "--rate", "0"], "rate: got 0, allowed is a positive int"),
    ],
)
def test_what_does_not_fit_says_what_does(sample, name, options, message):
    with pytest.raises(SystemExit, match=message):
        sample(name, *options, out="s.wav" if "--rate" in options else "s.npz")


@pytest.mark.parametrize("text", ["1,a", "1,2;3", "nowhere.npy", ""])
def test_wrong_vectors_show_the_usage(sample, text, capsys):
    with pytest.raises(SystemExit):
        sample("vectors", "--vectors", text)
    assert "allowed are vectors such as 0.1,0.2;0.3,0.4" in " ".join(
        capsys.readouterr().err.split()
    )


def test_nothing_is_left_of_a_file_that_fails(sample, tmp_path, monkeypatch):
    path, _ = sample("none")
    before = path.read_bytes()
    monkeypatch.setattr(np, "savez", lambda file, **_arrays: file.write(b"half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sample("none")
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["s.npz"]
