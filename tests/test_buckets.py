"""Several resolutions in one run: the order of the batches, where they come from, and training."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from fastdit.buckets import BucketedData, load_files, parse_sizes
from fastdit.data import ArrayData, batch_order, load_data


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
