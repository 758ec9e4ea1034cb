"""The published sample.py and train.py, recreated call by call, run on fastdit unchanged."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

import golden
import pytest
import torch

import fastdit
from fastdit import published

sys.path.insert(0, str(Path(__file__).parent / "patching"))
import research

SCRIPTS = Path(__file__).parent / "published_scripts"
SMALL = ["--model", "DiT-S/8", "--image-size", "64", "--num-classes", "10"]


@pytest.fixture(scope="module", autouse=True)
def _shallow():
    """A DiT-S/8 of two blocks, to save time."""
    with pytest.MonkeyPatch.context() as patch:
        shallow = functools.partial(
            fastdit.DiT, hidden_size=384, depth=2, num_heads=6, patch_size=8
        )
        patch.setitem(fastdit.DiT_models, "DiT-S/8", shallow)
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """What train.py leaves, and its losses."""
    path = tmp_path_factory.mktemp("train") / "0000002.pt"
    found = published.run(SCRIPTS / "train.py", [*SMALL, "--out", str(path)])
    return path, found["losses"]


def guided(model):
    """The published forward_with_cfg, around any model."""

    def forward(x, t, y, cfg_scale):
        half = x[: len(x) // 2]
        out = model(torch.cat([half, half]), t, y)
        cond, null = out[:, :3].chunk(2)
        mixed = null + cfg_scale * (cond - null)
        return torch.cat([torch.cat([mixed, mixed]), out[:, 3:]], 1)

    return forward


def test_train(checkpoint):
    path, losses = checkpoint
    assert len(losses) == 2
    assert all(0.9 < loss < 1.5 for loss in losses)  # the noise's variance, to a zero model
    saved = torch.load(path, weights_only=False)
    assert set(saved) == {"model", "ema", "opt", "args"}
    assert saved["model"].keys() == fastdit.DiT_models["DiT-S/8"](input_size=8).state_dict().keys()


def test_sample(checkpoint, tmp_path):
    out = tmp_path / "samples.pt"
    steps = ["--num-sampling-steps", "5", "--ckpt", str(checkpoint[0]), "--out", str(out)]
    published.run(SCRIPTS / "sample.py", SMALL + steps)
    model = research.DiT(8, 8, 4, 384, 2, 6).eval()
    torch.manual_seed(0)
    fastdit.DiT_models["DiT-S/8"](input_size=8, num_classes=10)  # draws its weights, as the script
    z = torch.randn(2, 4, 8, 8).repeat(2, 1, 1, 1)
    model.load_state_dict(torch.load(checkpoint[0], weights_only=False)["ema"])
    y = torch.tensor([2, 3, 10, 10])
    with fastdit.patched(model), torch.no_grad():
        expected = fastdit.create_diffusion("5").p_sample_loop(
            guided(model), z.shape, z, False, model_kwargs={"y": y, "cfg_scale": 4.0}
        )
    assert golden.relative_error(torch.load(out) * 0.18215, expected[:2].numpy()) < 1e-4


def test_names_are_given_back():
    before = {name: sys.modules.get(name) for name in ("models", "diffusion", "download")}
    with published.published_names():
        assert sys.modules["models"].DiT_models is fastdit.DiT_models
    assert {name: sys.modules.get(name) for name in before} == before


def test_the_command_says_how_to_use_it():
    command = [sys.executable, "-m", "fastdit.published"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "usage: python -m fastdit.published SCRIPT" in done.stderr
