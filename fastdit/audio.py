"""Signals as spectrograms that a DiT can denoise and that turn back into the signal exactly.

The modified discrete cosine transform (MDCT, Princen & Bradley 1986) of frames of 2N samples,
windowed by w and overlapping by half, has N real coefficients for N new samples:

    X[k] = √(2/N)·Σ_n w[n]·x[n]·cos(π/N·(n + ½ + N/2)·(k + ½))

With w[n] = sin(π·(n + ½)/2N) the transform is orthogonal: what a frame's inverse adds as an alias,
its neighbours take away, so that the signal comes back to rounding, and white noise stays white
noise: what diffusion assumes of its latents. Frequency is the image's height and time its width,
`(B, C, N, frames)`, cut into patches `(p_f, p_t)` by `DiT(input_size=(N, frames), patch_size=(p_f,
p_t))`. (Magnitudes of a short-time Fourier transform lose the phase, and are twice as many.)

    python -m fastdit.audio speech.wav --bins 64 --patch 8,4     # there and back; prints the error
"""

from __future__ import annotations

import argparse
import math
import sys
import wave
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdit import ops, reference
from fastdit.checkpoint_files import atomic_write


def _basis(bins: int, like: Tensor) -> Tensor:
    """The windowed cosines `(bins, 2·bins)`: orthonormal rows, computed in float64."""
    n = torch.arange(2 * bins, dtype=torch.float64)
    k = torch.arange(bins, dtype=torch.float64)
    window = torch.sin(math.pi / (2 * bins) * (n + 0.5))
    cosines = torch.cos(math.pi / bins * torch.outer(k + 0.5, n + 0.5 + bins / 2))
    return (math.sqrt(2 / bins) * cosines * window).to(like)


def _check(name: str, value: int) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: got {value!r}, allowed is a positive int")


def frames_of(length: int, bins: int, multiple: int = 1) -> int:
    """Frames of a signal: one more than its blocks of `bins` samples, up to a multiple."""
    blocks = -(-length // bins) + 1
    return -(-blocks // multiple) * multiple


def mdct(signal: Tensor, bins: int, multiple: int = 1) -> Tensor:
    """A signal's MDCT.

    Args:
        signal: `(..., L)`, floating point, at least one sample.
        bins: coefficients of a frame, N; also the samples from one frame to the next.
        multiple: silence is appended until the frames are a multiple of it: a patch's width.

    Returns:
        `(..., bins, frames_of(L, bins, multiple))`, in the signal's dtype.

    Raises:
        ValueError: no samples, or an argument that is not positive.
    """
    _check("bins", bins)
    _check("multiple", multiple)
    if signal.dim() < 1 or signal.shape[-1] == 0 or not signal.is_floating_point():
        raise ValueError(
            f"signal: got {tuple(signal.shape)} {signal.dtype}, allowed is (..., L) floating point"
        )
    frames = frames_of(signal.shape[-1], bins, multiple)
    end = frames * bins - signal.shape[-1]
    padded = F.pad(signal, (bins, end))
    return _basis(bins, signal) @ padded.unfold(-1, 2 * bins, bins).mT


def imdct(coefficients: Tensor, length: int) -> Tensor:
    """The signal `(..., length)` whose `mdct` is `(..., bins, frames)`.

    Raises:
        ValueError: so many samples are not in these frames.
    """
    bins, frames = coefficients.shape[-2:]
    if not 0 < length <= (frames - 1) * bins:
        raise ValueError(
            f"length: got {length}, allowed is 1 to {(frames - 1) * bins} of {frames} frames of "
            f"{bins} bins"
        )
    pieces = (_basis(bins, coefficients).mT @ coefficients).mT
    first, second = pieces[..., :bins], pieces[..., bins:]
    blocks = second[..., :-1, :] + first[..., 1:, :]
    return blocks.flatten(-2)[..., :length]


def load_signal(path: Path | None) -> Tensor:
    """A WAV file's samples as `(channels, L)` float64 in [-1, 1]; without a path a recording that
    ships with matplotlib: ten seconds of four electrodes of an electroencephalogram.

    Raises:
        ValueError: the file holds no whole numbers of 8, 16, 24 or 32 bits.
        FileNotFoundError, ImportError: there is no file, or no matplotlib.
    """
    if path is None:
        from matplotlib import cbook

        with cbook.get_sample_data("eeg.dat") as file:
            samples = np.frombuffer(file.read(), dtype=np.float64).reshape(800, 4).T
        return torch.from_numpy(samples / np.abs(samples).max())
    try:
        with wave.open(str(path)) as file:
            channels, width = file.getnchannels(), file.getsampwidth()
            raw = file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        raise ValueError(f"{path}: not a WAV file of whole numbers ({error})") from error
    if width == 1:  # 8 bits are unsigned, as the format has it
        samples = (np.frombuffer(raw, np.uint8).astype(np.float64) - 128) / 128
    else:
        padded = np.zeros((len(raw) // width, 4), np.uint8)
        padded[:, 4 - width :] = np.frombuffer(raw, np.uint8).reshape(-1, width)
        samples = padded.view("<i4")[:, 0].astype(np.float64) / 2**31
    return torch.from_numpy(samples.reshape(-1, channels).T.copy())


def save_signal(path: Path, signal: Tensor, rate: int) -> None:
    """Write `(channels, L)` samples in [-1, 1] as a WAV file of 16 bits; values outside saturate.

    Raises:
        ValueError: the rate is not positive, or there are no channels or samples.
    """
    _check("rate", rate)
    if signal.dim() != 2 or not signal.numel():
        raise ValueError(f"signal: got {tuple(signal.shape)}, allowed is (channels, L)")
    whole = (signal.double().cpu() * 2**15).round().clamp(-(2**15), 2**15 - 1)
    samples = whole.numpy().astype("<i2").T

    def write(temporary: Path) -> None:
        with wave.open(str(temporary), "wb") as file:
            file.setnchannels(len(signal))
            file.setsampwidth(2)
            file.setframerate(rate)
            file.writeframes(np.ascontiguousarray(samples).tobytes())

    atomic_write(path, write)


def round_trip(signal: Tensor, bins: int, patch: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The signal `(C, L)` to rows of patches and back.

    Returns:
        The rows `(1, T, p_f·p_t·C)` in the order of a DiT's output, and the signal again.
    """
    image = mdct(signal, bins, patch[1]).unsqueeze(0)
    grid = (bins // patch[0], image.shape[-1] // patch[1])
    rows = reference.patchify(image, patch).unflatten(-1, (len(signal), -1)).mT.flatten(-2)
    again = ops.unpatchify(rows, patch, grid, len(signal))
    return rows, imdct(again[0], signal.shape[-1])


def main() -> None:
    """Print what a file becomes, and how far it is from itself when it comes back."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("wav", nargs="?", type=Path, help="default: a recording of matplotlib's")
    parser.add_argument("--bins", type=int, default=32, help="frequencies (default 32)")
    parser.add_argument("--patch", default="8,2", help="frequencies, frames (default 8,2)")
    args = parser.parse_args()
    patch = tuple(int(part) for part in args.patch.split(","))
    if len(patch) != 2 or min(patch) < 1 or args.bins % patch[0]:
        sys.exit(f"--patch: got {args.patch}, allowed is p_f,p_t with p_f a divisor of --bins")
    signal = load_signal(args.wav)
    rows, again = round_trip(signal, args.bins, patch)
    frames = frames_of(signal.shape[-1], args.bins, patch[1])
    size = f"input_size=({args.bins}, {frames}), patch_size={patch}, in_channels={len(signal)}"
    print(f"{len(signal)} channels of {signal.shape[-1]} samples: fastdit.DiT({size})")
    print(f"{rows.shape[1]} patches of {rows.shape[2]} numbers")
    print(f"largest error there and back: {(again - signal).abs().max():.1e} of float64 samples")
    single, again = signal.float(), round_trip(signal.float(), args.bins, patch)[1]
    print(f"and of float32 samples:       {(again - single).abs().max():.1e}")


if __name__ == "__main__":
    main()
