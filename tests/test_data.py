"""Where the images come from, and in which order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from fastdit import data


def test_each_epoch_is_a_permutation_of_its_own():
    whole = data.order(7, seed=1, start=0, count=21)
    epochs = whole.reshape(3, 7)
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3
    assert not np.array_equal(whole, data.order(7, seed=2, start=0, count=21))


def test_order_does_not_depend_on_how_it_is_read():
    whole = data.order(5, seed=3, start=0, count=17)
    parts = [data.order(5, 3, start, count) for start, count in [(0, 4), (4, 9), (13, 4)]]
    assert np.array_equal(whole, np.concatenate(parts))


def test_digits_are_the_real_ones():
    digits = data.load_data("digits", 0)
    assert (len(digits), digits.shape, digits.num_classes) == (1797, (1, 8, 8), 10)
    x, y = digits.batch(np.array([0, 1796]))
    assert y.tolist() == [0, 8]
    assert (x.amin(), x.amax()) == (-1.0, 1.0)
    assert x[0, 0, 0, 2] == 5 / 8 - 1  # the first digit's first inked pixel has grey 5 of 16


@pytest.fixture
def folder(tmp_path):
    """Two classes: `a` red and wide, `b` blue and tall, each brighter in its middle half."""
    for name, channel, (width, height) in [("a", 0, (80, 20)), ("b", 2, (24, 70))]:
        (tmp_path / name).mkdir()
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[..., channel] = 100
        middle = (slice(None), slice(width // 4, -(width // 4)))
        middle = middle if width > height else (slice(height // 4, -(height // 4)), slice(None))
        pixels[(*middle, channel)] = 200
        Image.fromarray(pixels).save(tmp_path / name / "x.png")
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    return tmp_path


def test_folders_are_classes_and_images_are_cropped_at_the_centre(folder):
    images = data.load_data(str(folder), 8)
    assert (len(images), images.shape, images.num_classes) == (2, (3, 8, 8), 2)
    x, y = images.batch(np.array([1, 0]))
    assert y.tolist() == [1, 0]
    assert x.is_contiguous()
    bright = 200 / 127.5 - 1
    torch.testing.assert_close(x[0, 2], torch.full((8, 8), bright))
    torch.testing.assert_close(x[1, 0], torch.full((8, 8), bright))
    assert (x[0, :2] == -1).all()


def test_npz_of_pixels_and_of_latents(tmp_path):
    pixels = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    np.savez(tmp_path / "p.npz", arr_0=pixels, arr_1=np.array([3, 1]))
    loaded = data.load_data(str(tmp_path / "p.npz"), 0)
    assert (loaded.shape, loaded.num_classes) == ((3, 4, 4), 4)
    x, y = loaded.batch(np.array([1]))
    assert x[0, 2, 3, 1].item() == pytest.approx(int(pixels[1, 3, 1, 2]) / 127.5 - 1)
    assert y.tolist() == [1]
    latents = np.random.default_rng(0).standard_normal((3, 4, 2, 2)).astype(np.float32)
    np.savez(tmp_path / "l.npz", images=latents)
    loaded = data.load_data(str(tmp_path / "l.npz"), 0)
    assert loaded.num_classes == 1
    assert np.array_equal(loaded.batch(np.array([2]))[0][0].numpy(), latents[2])


def test_wrong_sources_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="--data: got 'nowhere'"):
        data.load_data("nowhere", 8)
    with pytest.raises(ValueError, match="without images"):
        data.load_data(str(tmp_path), 8)
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"got \(2, 3\)"):
        data.load_data(str(tmp_path / "a.npz"), 8)
    np.savez(tmp_path / "b.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8), arr_1=np.zeros(3))
    with pytest.raises(ValueError, match=r"labels \(3,\)"):
        data.load_data(str(tmp_path / "b.npz"), 8)
    np.savez(tmp_path / "c.npz", arr_0=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle"):
        data.load_data(str(tmp_path / "c.npz"), 8)
