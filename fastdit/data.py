"""Training data: folders of images, arrays in an `.npz`, or scikit-learn's handwritten digits.

A data set gives images in [-1, 1] with labels by index; `order` says which indices come when. The
order depends only on the seed and the count of samples seen, so that a resumed run sees what an
uninterrupted one would.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


class Dataset(Protocol):
    """Labelled images: `shape` (C, H, W), `num_classes`, a length, and batches by index."""

    shape: tuple[int, int, int]
    num_classes: int

    def __len__(self) -> int: ...

    def batch(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """`(B, C, H, W)` float32 images in [-1, 1] (latents as they are) and int64 labels."""
        ...


def order(length: int, seed: int, start: int, count: int) -> np.ndarray:
    """The indices of samples `start` to `start + count` of an endless run.

    Every epoch is a permutation of its own, drawn from (seed, epoch); a batch may end one and
    begin the next.
    """
    positions = np.arange(start, start + count)
    out = np.empty(count, dtype=np.int64)
    for epoch in np.unique(positions // length):
        permutation = np.random.default_rng([seed, int(epoch)]).permutation(length)
        inside = positions // length == epoch
        out[inside] = permutation[positions[inside] % length]
    return out


@dataclass(frozen=True)
class ArrayData:
    """Images that fit in memory: `(N, C, H, W)` float32, or uint8 which is scaled when read."""

    images: Tensor
    labels: Tensor
    num_classes: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return tuple(self.images.shape[1:])

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        chosen = torch.from_numpy(indices)
        images = self.images[chosen]
        if images.dtype == torch.uint8:
            images = images.float() / 127.5 - 1
        return images, self.labels[chosen]


class FolderData:
    """A folder with one sub-folder of images for each class, in the order of their names.

    Images are halved while twice the size fits, resized so that the short side does, and cropped
    at the centre, as in ADM (Dhariwal & Nichol 2021).
    """

    def __init__(self, folder: Path, size: int) -> None:
        classes = sorted(p for p in folder.iterdir() if p.is_dir())
        found = [
            (path, label)
            for label, sub in enumerate(classes)
            for path in sorted(sub.rglob("*"))
            if path.suffix.lower() in SUFFIXES
        ]
        if not found:
            raise ValueError(
                f"--data: got {str(folder)!r} without images, allowed is a folder with one "
                f"sub-folder of {', '.join(sorted(SUFFIXES))} files for each class"
            )
        self.files = found
        self.shape = (3, size, size)
        self.num_classes = len(classes)

    def __len__(self) -> int:
        return len(self.files)

    def batch(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        chosen = [self.files[i] for i in indices]
        size = self.shape[1]
        pixels = np.stack([center_crop(path, size) for path, _label in chosen])
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        return images.contiguous(), torch.tensor([label for _path, label in chosen])


def center_crop(path: Path, size: int) -> np.ndarray:
    """The file as `(size, size, 3)` uint8."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    factor = size / min(image.size)
    image = image.resize(
        (max(size, round(image.width * factor)), max(size, round(image.height * factor))),
        Image.Resampling.BICUBIC,
    )
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def load_npz(path: Path) -> ArrayData:
    """Images `arr_0` (or `images`) and labels `arr_1` (or `labels`).

    uint8 images are `(N, H, W, C)`, as the ADM evaluator's; floating-point ones are latents or
    images already in [-1, 1], `(N, C, H, W)`. Without labels there is one class.

    Raises:
        ValueError: the arrays are missing or have other shapes.
    """
    with np.load(path, allow_pickle=False) as file:
        named = {"arr_0": "images", "arr_1": "labels"}
        arrays = {named.get(k, k): file[k] for k in file.files}
    images = arrays.get("images")
    if images is None or images.ndim != 4 or len(images) == 0:
        got = "no arr_0" if images is None else images.shape
        raise ValueError(
            f"--data: got {got} in {str(path)!r}, allowed is arr_0 with four axes: "
            "(N, H, W, C) uint8 or (N, C, H, W) floats"
        )
    tensor = torch.from_numpy(images)
    tensor = tensor.permute(0, 3, 1, 2) if tensor.dtype == torch.uint8 else tensor.float()
    labels = arrays.get("labels", np.zeros(len(images), np.int64)).astype(np.int64)
    if labels.shape != (len(images),) or labels.min() < 0:
        raise ValueError(
            f"--data: got labels {labels.shape} in {str(path)!r}, allowed is "
            f"({len(images)},) integers >= 0"
        )
    return ArrayData(tensor.contiguous(), torch.from_numpy(labels), int(labels.max()) + 1)


def load_digits() -> ArrayData:
    """Scikit-learn's 1,797 handwritten digits, 8x8, one channel, sixteen greys (UCI, Alpaydin)."""
    try:
        from sklearn import datasets
    except ImportError:
        raise ImportError(
            "--data digits needs scikit-learn: pip install 'fastdit[train]'"
        ) from None
    digits = datasets.load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 8 - 1
    return ArrayData(images, torch.from_numpy(digits.target).long(), 10)


def load_data(source: str, size: int) -> Dataset:
    """`"digits"`, an `.npz` file, or a folder of images cropped to `size` pixels.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: it holds no data.
    """
    if source == "digits":
        return load_digits()
    path = Path(source)
    if path.is_dir():
        return FolderData(path, size)
    if path.suffix == ".npz" and path.exists():
        return load_npz(path)
    raise FileNotFoundError(
        f"--data: got {source!r}, allowed is 'digits', an .npz file or a folder of images"
    )
