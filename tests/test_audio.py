"""The MDCT against SciPy's cosine transform, and real signals there and back."""

from __future__ import annotations

import sys
import wave

import numpy as np
import pytest
import torch

import fastdit
from fastdit import audio


@pytest.fixture(scope="module")
def recording():
    pytest.importorskip("matplotlib")
    return audio.load_signal(None)


def test_equals_the_folded_cosine_transform():
    """MDCT(a, b, c, d) = DCT-IV(−c_r − d, a − b_r) of the windowed quarters, r for reversed."""
    fft = pytest.importorskip("scipy.fft")
    x = torch.randn(3, 64, dtype=torch.float64)
    found = audio.mdct(x, 16)
    window = np.sin(np.pi / 32 * (np.arange(32) + 0.5))
    padded = np.pad(x.numpy(), ((0, 0), (16, 16)))
    for frame in range(found.shape[-1]):
        a, b, c, d = np.split(padded[:, 16 * frame : 16 * frame + 32] * window, 4, axis=1)
        folded = np.concatenate([-c[:, ::-1] - d, a - b[:, ::-1]], 1)
        expected = fft.dct(folded, type=4, norm="ortho", axis=1)
        np.testing.assert_allclose(found[..., frame], expected, atol=1e-12)


@pytest.mark.parametrize(
    ("bins", "patch"), [(32, (8, 2)), (20, (4, 3)), (7, (7, 1)), (1024, (8, 4))]
)
def test_a_real_signal_comes_back(recording, bins, patch):
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 2e-6)):
        signal = recording.to(dtype)
        rows, again = audio.round_trip(signal, bins, patch)
        assert rows.shape[-1] == 4 * patch[0] * patch[1]
        assert rows.dtype == dtype
        assert (again - signal).abs().max() < tolerance
    energy = audio.mdct(recording, bins).square().sum()
    assert energy.item() == pytest.approx(recording.square().sum().item(), rel=1e-9)


def test_a_model_denoises_patches_of_a_spectrogram(recording):
    """Its own rows are the ones that `round_trip` makes; the sizes fit."""
    image = audio.mdct(recording.float(), 32, 2).unsqueeze(0)
    size = tuple(image.shape[2:])
    model = fastdit.DiT(size, (8, 2), 4, 24, 1, 2, num_classes=0, learn_sigma=False)
    rows, _again = audio.round_trip(recording.float(), 32, (8, 2))
    assert rows.shape[1] == model.grid[0] * model.grid[1]
    assert torch.equal(model.unpatchify(rows), image)
    assert model(image, torch.tensor([10])).shape == image.shape


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_files(tmp_path, width, monkeypatch, capsys):
    values = np.linspace(-0.9, 0.9, 500)
    whole = np.round(values * 2 ** (8 * width - 1)).astype(np.int64)
    unsigned = whole + 128 if width == 1 else whole
    raw = b"".join(int(v).to_bytes(width, "little", signed=width > 1) for v in unsigned)
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(width)
        file.setframerate(8000)
        file.writeframes(raw)
    signal = audio.load_signal(tmp_path / "a.wav")
    assert signal.shape == (2, 250)
    np.testing.assert_allclose(signal.T.flatten(), whole / 2 ** (8 * width - 1), atol=1e-9)
    monkeypatch.setattr(sys, "argv", ["audio", str(tmp_path / "a.wav"), "--bins", "16"])
    audio.main()
    out = capsys.readouterr().out
    assert "input_size=(16, 18), patch_size=(8, 2), in_channels=2" in out


def test_wrong_arguments_are_named(tmp_path):
    with pytest.raises(ValueError, match="bins: got 0"):
        audio.mdct(torch.randn(8), 0)
    with pytest.raises(ValueError, match=r"signal: got \(0,\)"):
        audio.mdct(torch.randn(0), 4)
    with pytest.raises(ValueError, match="length: got 9, allowed is 1 to 8 of 3 frames of 4 bins"):
        audio.imdct(torch.randn(4, 3), 9)
    (tmp_path / "b.wav").write_bytes(b"no wave")
    with pytest.raises(ValueError, match=r"b\.wav: not a WAV file"):
        audio.load_signal(tmp_path / "b.wav")
