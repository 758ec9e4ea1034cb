"""Training data: folders of images, `.npz` arrays, and scikit-learn's handwritten digits.

All are `(C, H, W)` float32 with an integer label. A run reads an endless stream, made of one
permutation after another: sample k is number k mod n of permutation ⌊k/n⌋, which (seed, ⌊k/n⌋)
alone determines, and so does whether it is mirrored. Batch i is samples i·B to (i+1)·B − 1, so a
run resumes at any batch without replaying those before it, and no sample is ever left out.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


class Data(Protocol):
    """Samples with labels, by number.

    Attributes:
        shape: `(C, H, W)` of each sample.
        num_classes: labels are 0 to num_classes − 1.
        mirrors: a mirrored sample is as good as the sample: photographs, not digits or latents.
    """

    shape: tuple[int, int, int]
    num_classes: int
    mirrors: bool

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, int]: ...


class ArrayData:
    """Samples in memory.

    Args:
        images: uint8 `(N, H, W, C)` images, or floating `(N, C, H, W)` that are used as they are.
        labels: integers `(N,)`; None is one class, 0.
        mirrors: see `Data`; None is true for uint8 images alone.

    Raises:
        ValueError: another layout, no samples, labels that do not match, NaN or infinity.
    """

    def __init__(
        self, images: np.ndarray, labels: np.ndarray | None = None, mirrors: bool | None = None
    ) -> None:
        self._pixels = images.dtype == np.uint8
        floating = np.issubdtype(images.dtype, np.floating)
        if images.ndim != 4 or images.size == 0 or not (self._pixels or floating):
            raise ValueError(
                f"images: got {images.dtype} {images.shape}, allowed is uint8 (N, H, W, C) images "
                "or floating-point (N, C, H, W) latents, at least one"
            )
        if floating and not np.isfinite(images).all():
            raise ValueError("images: got NaN or infinity, allowed are finite values")
        labels = np.zeros(len(images), np.int64) if labels is None else np.asarray(labels)
        whole = np.issubdtype(labels.dtype, np.integer)
        if labels.shape != (len(images),) or not whole or labels.min() < 0:
            raise ValueError(
                f"labels: got {labels.dtype} {labels.shape}, allowed are integers >= 0 of shape "
                f"({len(images)},)"
            )
        self._images, self._labels = images, labels
        height, width, channels = images.shape[1:] if self._pixels else np.roll(images.shape[1:], 2)
        self.shape = (int(channels), int(height), int(width))
        self.num_classes = int(labels.max()) + 1
        self.mirrors = self._pixels if mirrors is None else mirrors

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self._images[index]
        if self._pixels:
            return pixels_to_tensor(image), int(self._labels[index])
        return torch.from_numpy(image.astype(np.float32)), int(self._labels[index])


class ImageFolder:
    """Images in one sub-folder for each class; classes are numbered in the names' order.

    Args:
        root: the folder of the classes' folders, which may hold further folders.
        size: images are centre-cropped to size × size.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no class folders, a class without images; later, an unreadable image.
    """

    mirrors = True

    def __init__(self, root: str | Path, size: int) -> None:
        root = Path(root)
        if not root.is_dir():
            raise FileNotFoundError(f"data: got {str(root)!r}, which is not a folder")
        if size < 1:
            raise ValueError(f"image_size: got {size}, allowed is a positive int")
        self.classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
        if not self.classes:
            raise ValueError(
                f"data: {str(root)!r} has no sub-folders; put each class's images in one of its own"
            )
        self._files: list[tuple[Path, int]] = []
        for label, name in enumerate(self.classes):
            files = sorted(
                path for path in (root / name).rglob("*") if path.suffix.lower() in EXTENSIONS
            )
            if not files:
                raise ValueError(
                    f"data: the class folder {str(root / name)!r} has no images; allowed are "
                    f"{', '.join(EXTENSIONS)}"
                )
            self._files += [(path, label) for path in files]
        self.shape = (3, size, size)
        self.num_classes = len(self.classes)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self._files[index]
        try:
            with Image.open(path) as image:
                pixels = center_crop(image.convert("RGB"), self.shape[1])
        except (UnidentifiedImageError, OSError, SyntaxError) as error:
            raise ValueError(f"data: cannot read the image {str(path)!r} ({error})") from error
        return pixels_to_tensor(np.asarray(pixels)), label


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The middle square of an image at size × size, as ADM prepares ImageNet.

    Halved by box averaging while the shorter side is at least twice `size`, then scaled bicubically
    so that it is `size` (Dhariwal & Nichol 2021).
    """
    while min(image.size) >= 2 * size:
        halved = (image.width // 2, image.height // 2)
        image = image.resize(halved, Image.Resampling.BOX)
    scale = size / min(image.size)
    scaled = (round(image.width * scale), round(image.height * scale))
    image = image.resize(scaled, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def pixels_to_tensor(pixels: np.ndarray) -> Tensor:
    """`(H, W, C)` uint8 as `(C, H, W)` float32 in [−1, 1]."""
    return torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1.0).permute(2, 0, 1).contiguous()


def load_npz(path: str | Path) -> ArrayData:
    """Images `images` or `arr_0`, and labels `labels` or `arr_1` if there are any, of an `.npz`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an `.npz`, or without images.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"data: no such file: {str(path)!r}")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files if name in _NPZ_NAMES}
    except (ValueError, OSError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"data: {str(path)!r} is not an .npz of plain arrays ({error})") from error
    images = found.get("images", found.get("arr_0"))
    if images is None:
        raise ValueError(f"data: {str(path)!r} has no array named images or arr_0")
    labels = found.get("labels", found.get("arr_1"))
    try:
        return ArrayData(images, labels)
    except ValueError as error:
        raise ValueError(f"data: {str(path)!r}: {error}") from error


_NPZ_NAMES = ("images", "arr_0", "labels", "arr_1")


def load_data(data: str | Path, image_size: int) -> Data:
    """The samples that `data` names: `digits`, an `.npz` file, or a folder of images.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: it holds something else.
        ImportError: `digits` without scikit-learn.
    """
    if str(data) == "digits":
        from fastdit import digits

        return ArrayData(*digits.load(), mirrors=False)
    path = Path(data).expanduser()
    if path.suffix == ".npz":
        return load_npz(path)
    if path.is_file():
        raise ValueError(f"data: got the file {str(data)!r}, allowed is 'digits', .npz or a folder")
    return ImageFolder(path, image_size)


class Stream:
    """The endless stream of a data set's samples, by position.

    Args:
        data: the samples.
        seed: of the order and the mirroring, >= 0.
        mirror: mirror each sample with probability ½.
    """

    def __init__(self, data: Data, seed: int, mirror: bool) -> None:
        self._data, self._seed, self._mirror = data, seed, mirror
        self._epoch = -1

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        epoch, place = divmod(position, len(self._data))
        if epoch != self._epoch:
            random = np.random.default_rng((self._seed, epoch))
            self._order = random.permutation(len(self._data))
            self._mirrored = random.random(len(self._data)) < 0.5
            self._epoch = epoch
        image, label = self._data[int(self._order[place])]
        return image.flip(-1) if self._mirror and self._mirrored[place] else image, label


def batches(
    stream: Stream, batch_size: int, first: int = 0, workers: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches `first`, `first` + 1, ... without end: `(B, C, H, W)` float32, `(B,)` int64.

    Args:
        stream: the samples in their order.
        batch_size: B.
        first: the batch to begin with.
        workers: processes that read ahead; 0 reads in this one. The batches are the same.
    """
    loader = DataLoader(
        stream,
        batch_sampler=_Positions(batch_size, first),
        num_workers=workers,
        # Its own generator: the loader would draw a seed from the global one, once for each resume.
        generator=torch.Generator(),
    )
    yield from loader


class _Positions:
    """The positions of each batch, from `first` on."""

    def __init__(self, batch_size: int, first: int) -> None:
        self._batch_size, self._first = batch_size, first

    def __iter__(self) -> Iterator[range]:
        batch = self._first
        while True:
            yield range(batch * self._batch_size, (batch + 1) * self._batch_size)
            batch += 1
