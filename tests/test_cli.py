"""The commands as a user runs them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from published_checkpoint import published_weights

from fastdit import cli, images
from fastdit.digits import weights_path


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A small DiT in the published format, written by torch alone."""
    path = tmp_path_factory.mktemp("published") / "DiT.pt"
    torch.save(published_weights(1, 384, size=8), path)
    return str(path)


def test_demo_draws_the_labelled_grid_and_times_both_paths(tmp_path, capsys):
    out = tmp_path / "demo.png"
    timing = tmp_path / "demo.json"
    options = ["--steps", "4", "--rounds", "1", "--json", str(timing)]
    cli.main(["demo", *options, "--out", str(out)])
    rates = json.loads(timing.read_text())
    auto, eager = (rates["images_per_second"][name] for name in ("auto", "reference"))
    assert rates["ratio"]["median"] == auto["median"] / eager["median"]
    assert auto["least"] == auto["most"] > 0
    assert Image.open(out).size == (34 + 10 * 50 + 2, 10 * 50 + 2)
    printed = capsys.readouterr().out
    assert "eager PyTorch" in printed
    assert "images/s" in printed


def test_the_flow_digits_in_demo_and_sample(tmp_path, capsys):
    out = tmp_path / "demo.png"
    cli.main(["demo", "--objective", "flow", "--steps", "4", "--rounds", "1", "--out", str(out)])
    assert Image.open(out).size == (34 + 10 * 50 + 2, 10 * 50 + 2)
    options = ["--classes", "1,2", "--steps", "3", "--guidance-interval", "0.2", "0.9"]
    for ckpt in ("digits-flow", str(weights_path("flow"))):
        cli.main(["sample", "--ckpt", ckpt, *options, "--out", str(tmp_path / "s.npz")])
        assert "2 images, heun 3 steps on cpu" in capsys.readouterr().out
        with np.load(tmp_path / "s.npz") as file:
            assert np.ptp(file["arr_0"]) > 100


def test_a_published_flow_is_named_one(published, tmp_path, capsys):
    """SiT's files have DiT's keys and do not say what they are."""
    options = ["--classes", "5", "--steps", "2", "--vae", "none", "--solver", "euler"]
    argv = ["sample", "--ckpt", published, *options, "--out", str(tmp_path / "s.npz")]
    cli.main([*argv, "--objective", "flow"])
    assert "1 latents, euler 2 steps on cpu" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="solver: got 'euler', allowed is 'ddpm'"):
        cli.main(argv)


def test_sample_latents_in_the_evaluators_layout(published, tmp_path, capsys):
    out = tmp_path / "s.npz"
    options = ["--classes", "207,360", "--per-class", "2", "--steps", "2", "--vae", "none"]
    cli.main(["sample", "--ckpt", published, *options, "--out", str(out)])
    with np.load(out) as file:
        assert file["arr_0"].shape == (4, 8, 8, 4)
        assert file["arr_0"].dtype == np.float32
        assert file["arr_1"].tolist() == [207, 207, 360, 360]
    assert "4 latents, ddpm 2 steps on cpu" in capsys.readouterr().out


def test_sample_pixels_are_the_evaluators_bytes(tmp_path):
    out = tmp_path / "s.npz"
    options = ["--classes", "1,2,3", "--steps", "3", "--solver", "dpm++", "--batch-size", "2"]
    cli.main(["sample", "--ckpt", "digits", *options, "--out", str(out)])
    with np.load(out) as file:
        assert file["arr_0"].shape == (3, 8, 8, 3)
        assert file["arr_0"].dtype == np.uint8
        assert np.ptp(file["arr_0"]) > 100


def test_sample_decodes_latents_with_a_local_vae(published, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    vae.save_pretrained(tmp_path / "vae")
    out = tmp_path / "s.npz"
    options = ["--classes", "5", "--steps", "2", "--vae", str(tmp_path / "vae")]
    cli.main(["sample", "--ckpt", published, *options, "--out", str(out)])
    with np.load(out) as file:
        assert file["arr_0"].shape == (1, 16, 16, 3)
        assert file["arr_0"].dtype == np.uint8


def test_doctor_tells_versions_and_what_would_run(capsys):
    cli.main(["doctor"])
    printed = capsys.readouterr().out
    assert torch.__version__.partition("+")[0] in printed
    assert all(word in printed for word in ("nvcc", "c++", "cpu", "gated_adaln", "diffusion_step"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["sample", "--ckpt", "nowhere.pt", "--classes", "1"], "nowhere.pt"),
        (["sample", "--ckpt", "digits", "--classes", "10"], "classes: got .10., allowed is 0 to 9"),
        (["sample", "--ckpt", "digits", "--classes", "1", "--out", "x.gif"], "--out: got 'x.gif'"),
    ],
)
def test_mistakes_are_one_line(argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        cli.main(argv)


def test_wrong_words_show_the_usage(capsys):
    with pytest.raises(SystemExit):
        cli.main(["sample", "--ckpt", "digits", "--classes", "1;2"])
    assert "allowed are labels separated by commas" in capsys.readouterr().err


def test_pixels():
    values = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).view(1, 1, 1, 5)
    pixels = images.to_uint8(values)
    assert pixels.shape == (1, 1, 5, 3)
    assert pixels[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]
    assert (pixels[..., 0] == pixels[..., 2]).all()


def test_grid_places_row_by_row():
    pixels = np.zeros((3, 2, 2, 3), np.uint8)
    pixels[1], pixels[2] = 100, 200
    picture = np.asarray(images.grid(pixels, 2, scale=3))
    assert picture.shape == (2 * 8 + 2, 2 * 8 + 2, 3)
    assert picture[4, 4, 0] == 0
    assert picture[4, 12, 0] == 100
    assert picture[12, 4, 0] == 200
    assert picture[12, 12, 0] == 255
    with pytest.raises(ValueError, match="grid: got 0 images"):
        images.grid(pixels[:0], 2)
