"""Several resolutions in one run: the order of the batches, where they come from, and training."""

from __future__ import annotations

import copy
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from fastdit import cli, training
from fastdit.buckets import BucketedData, load_files, parse_sizes
from fastdit.checkpoint import load_model
from fastdit.commands import train as train_command
from fastdit.data import ArrayData, batch_order, load_data
from fastdit.trainer import TrainConfig, Trainer


def arrays(count: int, *size: int, classes: int = 3) -> ArrayData:
    images = torch.arange(count).float().view(count, *[1] * (1 + len(size))).expand(count, 2, *size)
    return ArrayData(images.contiguous(), torch.arange(count) % classes, classes)


@pytest.fixture
def data():
    return BucketedData([arrays(10, 4, 4), arrays(7, 4, 6), arrays(5, 8, 2, classes=5)])


def test_every_batch_is_of_one_size_and_an_epoch_sees_each_image_at_most_once(data):
    assert (len(data), data.shape, data.num_classes) == (22, (2, 4, 4), 5)
    seen = Counter()
    shapes = []
    for i in range(5 + 3 + 2):
        indices = batch_order(data, 3, 2 * i, 2)
        x, y = data.batch(indices)
        shapes.append(tuple(x.shape[2:]))
        seen.update(indices.tolist())
        local = indices - data.starts[np.searchsorted(data.starts, indices, side="right") - 1]
        assert x[:, 0, 0, 0].tolist() == local.tolist()
        assert len(y) == 2
    assert Counter(shapes) == {(4, 4): 5, (4, 6): 3, (8, 2): 2}
    assert shapes != sorted(shapes)
    assert len(seen) == 20
    assert set(seen.values()) == {1}


def test_the_order_follows_from_seed_and_count(data):
    def run(seed, first, last):
        return [batch_order(data, seed, 2 * i, 2).tolist() for i in range(first, last)]

    assert run(0, 0, 30) == run(0, 0, 17) + run(0, 17, 30)
    assert run(0, 0, 10) != run(0, 10, 20)
    assert run(0, 0, 10) != run(1, 0, 10)


def test_mistakes_are_named(data):
    with pytest.raises(ValueError, match=r"batch_size: got batches of 6, allowed is at most 5"):
        data.order(0, 0, 6)
    with pytest.raises(ValueError, match="indices: got some of several buckets"):
        data.batch(np.array([0, 12]))
    with pytest.raises(ValueError, match=r"buckets: got \[\(2, 4, 4\), \(2, 6\)\]"):
        BucketedData([arrays(3, 4, 4), arrays(3, 6)])
    for text in ("4", "4x", "4x4x4", "", "0x4"):
        with pytest.raises(ValueError, match="buckets: got"):
            parse_sizes(text)


@pytest.fixture
def folder(tmp_path):
    """Pictures of three shapes in two classes, the width in every pixel."""
    for name, size in (("a", (40, 40)), ("b", (60, 40)), ("c", (30, 90)), ("d", (41, 40))):
        for label in ("cat", "dog"):
            (tmp_path / label).mkdir(exist_ok=True)
            Image.new("RGB", size, (size[0], 0, 0)).save(tmp_path / label / f"{name}.png")
    return tmp_path


def test_images_go_to_the_nearest_shape(folder):
    data = load_data(str(folder), 0, "16x16,16x24,24x8")
    assert data.shapes == [(3, 16, 16), (3, 16, 24), (3, 24, 8)]
    assert [len(part) for part in data.parts] == [4, 2, 2]
    x, y = data.batch(np.array([6, 7]))
    assert x.shape == (2, 3, 24, 8)
    assert y.tolist() == [0, 1]
    assert ((x[:, 0] + 1) * 127.5).round().unique().tolist() == [30]
    with pytest.raises(ValueError, match="buckets: got 4x400, to which no image is nearest"):
        load_data(str(folder), 0, "16x16,16x24,24x8,4x400")
    with pytest.raises(ValueError, match="buckets: got '4x4', allowed is ''"):
        load_data("digits", 8, "4x4")


def test_a_folder_of_arrays_is_buckets(tmp_path):
    for i, size in enumerate(((4, 4), (2, 6))):
        images = np.random.default_rng(i).standard_normal((5, 3, *size), dtype=np.float32)
        np.savez(tmp_path / f"{i}.npz", images=images, labels=np.arange(5))
    data = load_data(str(tmp_path), 0)
    assert data.shapes == [(3, 4, 4), (3, 2, 6)]
    assert load_files(sorted(tmp_path.glob("*.npz"))).num_classes == 5


def settings(tmp_path, **changes) -> TrainConfig:
    small = {"depth": 1, "hidden_size": 24, "num_heads": 2, "patch_size": 2, "steps": 3}
    small |= {"batch_size": 4, "accumulate": 2, "ema": 0.9, "lr": 1e-3, "out": "out"}
    return TrainConfig(data=str(tmp_path), **{**small, **changes})


def test_a_run_on_buckets_sees_every_size(folder, monkeypatch):
    trainer = Trainer(settings(folder, buckets="16x16,16x24,24x8"))
    seen = set()
    monkeypatch.setattr(
        trainer.model.x_embedder,
        "forward",
        lambda x, pos, _f=trainer.model.x_embedder.forward: (seen.add(x.shape[2:]), _f(x, pos))[1],
    )
    for _ in range(4):
        assert np.isfinite(trainer.step())
    assert seen == {(16, 16), (16, 24), (24, 8)}
    assert trainer.model.design.any_size
    state = copy.deepcopy(trainer.state())
    expected = trainer.step()
    again = Trainer(settings(folder, buckets="16x16,16x24,24x8"))
    again.restore(state)
    assert again.step() == expected
    with pytest.raises(ValueError, match=r"a size: got \(16, 24\), allowed is a multiple of"):
        Trainer(settings(folder, buckets="12x12,16x24", patch_size=12))


def test_signals_and_vectors_train_and_draw(tmp_path, monkeypatch):
    """Signals (N, C, L) whose labels are vectors; patches are as long as they are told."""
    random = np.random.default_rng(0)
    signals = random.standard_normal((8, 2, 12), dtype=np.float32)
    np.savez(tmp_path / "s.npz", images=signals, labels=random.standard_normal((8, 3)))
    config = settings(tmp_path / "s.npz", out=str(tmp_path / "out"), patch_size=(3,), steps=2)
    monkeypatch.setattr(training, "plot_losses", lambda losses, path: path.write_bytes(b""))
    trainer = training.train(config, progress=False)
    assert trainer.model.config["condition_dim"] == 3
    assert trainer.model.grid == (4,)
    training.save_samples(trainer, tmp_path / "samples.png")
    with Image.open(tmp_path / "samples.png") as picture:
        assert picture.size == (720, 960)
    assert load_model(tmp_path / "out" / "ema.safetensors").design.positions == "sincos_1d"
    for text, patch in (("2", 2), ("8,2", (8, 2)), ("3,", (3,))):
        argv = ["train", "--data", "x", "--out", "y", "--patch-size", text]
        args = cli.build_parser().parse_args(argv)
        assert train_command.config_from(args).patch_size == patch
