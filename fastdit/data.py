"""Training data: folders of images, arrays in an `.npz`, or scikit-learn's handwritten digits.

A data set gives images in [-1, 1] with labels by index; `order` says which indices come when. The
order depends only on the seed and the count of samples seen, so that a resumed run sees what an
uninterrupted one would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


class Dataset(Protocol):
    """Labelled images or signals: `shape` (C, H, W) or (C, L), `num_classes`, a length, and batches
    by index. Where labels are vectors they have `condition_dim` numbers, and there are no classes.
    """

    shape: tuple[int, ...]
    num_classes: int
    condition_dim: int

    def __len__(self) -> int: ...

    def batch(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """`(B, C, H, W)` float32 images in [-1, 1] (latents as they are), and int64 labels or
        float32 vectors."""
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


def batch_order(data: Dataset, seed: int, start: int, count: int) -> np.ndarray:
    """The indices of the batch of `count` samples that begins at sample `start` of a run: in the
    data's own `order` if it has one."""
    own = getattr(data, "order", None)
    return order(len(data), seed, start, count) if own is None else own(seed, start, count)


@dataclass(frozen=True)
class ArrayData:
    """Images or signals that fit in memory: `(N, C, H, W)` or `(N, C, L)` float32, or uint8 images,
    which are scaled when read. Labels are int64 `(N,)`, or float32 vectors `(N, K)`."""

    images: Tensor
    labels: Tensor
    num_classes: int

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.images.shape[1:])

    @property
    def condition_dim(self) -> int:
        return self.labels.shape[1] if self.labels.dim() == 2 else 0

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        chosen = torch.from_numpy(indices)
        images = self.images[chosen]
        if images.dtype == torch.uint8:
            images = images.float() / 127.5 - 1
        return images, self.labels[chosen]


def image_files(folder: Path) -> list[tuple[Path, int]]:
    """The images of a folder with one sub-folder for each class, and their labels, in the order of
    the names.

    Raises:
        ValueError: there are none.
    """
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
    return found


class FolderData:
    """A folder with one sub-folder of images for each class, in the order of their names.

    Images are halved while twice the size fits, resized until they cover it, and cropped at the
    centre, as in ADM (Dhariwal & Nichol 2021).

    Args:
        folder: the folder.
        size: of the images, height and width; an int is a square.
        files: those of its images to take, as `image_files` gives them; all if not given.
    """

    condition_dim = 0

    def __init__(
        self,
        folder: Path,
        size: int | tuple[int, int],
        files: Sequence[tuple[Path, int]] | None = None,
    ) -> None:
        self.files = image_files(folder) if files is None else list(files)
        self.size = (size, size) if isinstance(size, int) else size
        self.shape = (3, *self.size)
        self.num_classes = sum(p.is_dir() for p in folder.iterdir())

    def __len__(self) -> int:
        return len(self.files)

    def batch(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        chosen = [self.files[i] for i in indices]
        pixels = np.stack([center_crop(path, self.size) for path, _label in chosen])
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        return images.contiguous(), torch.tensor([label for _path, label in chosen])


def center_crop(path: Path, size: int | tuple[int, int]) -> np.ndarray:
    """The file as `(height, width, 3)` uint8."""
    high, wide = (size, size) if isinstance(size, int) else size
    with Image.open(path) as file:
        image = file.convert("RGB")
    while image.width >= 2 * wide and image.height >= 2 * high:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    factor = max(wide / image.width, high / image.height)
    image = image.resize(
        (max(wide, round(image.width * factor)), max(high, round(image.height * factor))),
        Image.Resampling.BICUBIC,
    )
    left, top = (image.width - wide) // 2, (image.height - high) // 2
    return np.asarray(image.crop((left, top, left + wide, top + high)))


def load_npz(path: Path) -> ArrayData:
    """Images `arr_0` (or `images`) and labels `arr_1` (or `labels`).

    uint8 images are `(N, H, W, C)`, as the ADM evaluator's; floating-point ones are latents or
    images already in [-1, 1], `(N, C, H, W)`, or signals `(N, C, L)`. Labels are integers `(N,)`,
    or floating-point vectors `(N, K)`. Without labels there is one class.

    Raises:
        ValueError: the arrays are missing or have other shapes.
    """
    with np.load(path, allow_pickle=False) as file:
        named = {"arr_0": "images", "arr_1": "labels"}
        arrays = {named.get(k, k): file[k] for k in file.files}
    images = arrays.get("images")
    dims = (4,) if images is None or images.dtype == np.uint8 else (3, 4)
    if images is None or images.ndim not in dims or len(images) == 0:
        got = "no arr_0" if images is None else f"{images.shape} {images.dtype}"
        raise ValueError(
            f"--data: got {got} in {str(path)!r}, allowed is arr_0 with four axes: "
            "(N, H, W, C) uint8 or (N, C, H, W) floats; or three: (N, C, L) floats"
        )
    tensor = torch.from_numpy(images)
    tensor = tensor.permute(0, 3, 1, 2) if tensor.dtype == torch.uint8 else tensor.float()
    labels = arrays.get("labels", np.zeros(len(images), np.int64))
    if labels.ndim == 2 and len(labels) == len(images) and labels.dtype.kind == "f":
        vectors = torch.from_numpy(labels).float()
        return ArrayData(tensor.contiguous(), vectors, 0)
    labels = labels.astype(np.int64)
    if labels.shape != (len(images),) or labels.min() < 0:
        raise ValueError(
            f"--data: got labels {labels.shape} in {str(path)!r}, allowed is "
            f"({len(images)},) integers >= 0, or ({len(images)}, K) floats"
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


def load_data(source: str, size: int, buckets: str = "") -> Dataset:
    """`"digits"`, an `.npz` file, a folder of these, or a folder of images.

    Args:
        source: one of them; a folder's `.npz` files are buckets (`fastdit.buckets`).
        size: side of the square that images are cropped to.
        buckets: instead, sizes `"HxW,HxW"` of which each image gets the one of nearest shape.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: it holds no data, or `buckets` are given for other data.
    """
    from fastdit import buckets as bucketed

    path = Path(source)
    if buckets:
        if not path.is_dir():
            raise ValueError(f"buckets: got {buckets!r}, allowed is '' but for a folder of images")
        return bucketed.load_folder(path, bucketed.parse_sizes(buckets))
    if source == "digits":
        return load_digits()
    if path.is_dir():
        files = sorted(path.glob("*.npz"))
        return bucketed.load_files(files) if files else FolderData(path, size)
    if path.suffix == ".npz" and path.exists():
        return load_npz(path)
    raise FileNotFoundError(
        f"--data: got {source!r}, allowed is 'digits', an .npz file or a folder of images"
    )
