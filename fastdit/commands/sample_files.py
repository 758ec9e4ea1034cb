"""The files that `fastdit sample` writes: pictures, plots of signals, arrays, and WAV.

| `--out` | images | latents | signals |
|---|---|---|---|
| `.png` | a grid | a grid of their first channels | a grid of plots |
| `.npz` | the ADM evaluator's, uint8 | the same, floats `(N, H, W, C)` | floats `(N, C, L)` |
| `.npy` | the samples as they are | the same | the same |
| `.wav` | of MDCT coefficients, the sound | | 16 bits, a file each |

An `.npz` has the labels or vectors in `arr_1`; `fastdit train` reads those of images and signals.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastdit import audio, images
from fastdit.checkpoint_files import atomic_write

SUFFIXES = (".png", ".npz", ".npy", ".wav")


def write(out: Path, samples: Tensor, conditions: Tensor, columns: int, rate: int) -> list[Path]:
    """Write samples to `out`, whole or not at all; the files written.

    Args:
        out: with one of the suffixes.
        samples: `(N, C, H, W)` or `(N, C, L)`.
        conditions: `(N,)` labels or `(N, K)` vectors.
        columns: of a grid.
        rate: samples a second of a `.wav`.
    """
    samples = samples.float().cpu()
    if out.suffix == ".wav":
        return write_sounds(out, samples, rate)
    if out.suffix == ".png":
        signals = samples.dim() == 3
        picture = plots(samples, columns) if signals else grid(samples, columns)
        images.save(picture, out)
    elif out.suffix == ".npy":
        atomic_write(out, lambda path: _to_file(path, np.save, samples.numpy()))
    else:
        arrays = {"arr_0": evaluators(samples), "arr_1": conditions.cpu().numpy()}
        atomic_write(out, lambda path: _to_file(path, np.savez, **arrays))
    return [out]


def _to_file(path: Path, save, *args, **arrays) -> None:
    with open(path, "wb") as file:  # numpy appends its suffix to a name
        save(file, *args, **arrays)


def evaluators(samples: Tensor) -> np.ndarray:
    """Images as the ADM evaluator wants them, latents as floats in that order, signals as they
    are."""
    if samples.dim() == 3:
        return samples.numpy()
    if samples.shape[1] in (1, 3):
        return images.to_uint8(samples)
    return samples.permute(0, 2, 3, 1).numpy()


def grid(samples: Tensor, columns: int):
    """Images, or the first channels of latents, as one picture."""
    if samples.shape[1] not in (1, 3):
        samples = samples[:, :3] / samples[:, :3].abs().amax().clamp(min=1e-6)
    side = max(1, 128 // samples.shape[-1])
    return images.grid(images.to_uint8(samples), columns, scale=side)


def plots(samples: Tensor, columns: int):
    """Signals as a grid of plots on one scale, a line for each channel."""
    try:
        import matplotlib
    except ImportError:
        raise ImportError(
            "--out: plots need matplotlib: pip install 'fastdit[train]', or write .npy"
        ) from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image

    rows = -(-len(samples) // columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(3 * columns, 1.6 * rows),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    for i, axis in enumerate(axes.flat):
        if i < len(samples):
            axis.plot(samples[i].mT.numpy(), lw=1)
        else:
            axis.set_axis_off()
    figure.canvas.draw()
    picture = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
    plt.close(figure)
    return picture


def write_sounds(out: Path, samples: Tensor, rate: int) -> list[Path]:
    """Each sample to a file of its own, `name-0.wav` and so on where they are several. Images are
    taken for MDCT coefficients, bins by frames (`fastdit.audio`)."""
    if samples.dim() == 4:
        bins, frames = samples.shape[2:]
        if frames < 2:
            raise ValueError(f"--out: got a .wav of {frames} frame, allowed is 2 or more")
        samples = torch.stack([audio.imdct(s, (frames - 1) * bins) for s in samples])
    many = len(samples) > 1
    files = [out.with_stem(f"{out.stem}-{i}") if many else out for i in range(len(samples))]
    for path, signal in zip(files, samples, strict=True):
        audio.save_signal(path, signal, rate)
    return files
