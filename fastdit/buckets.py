"""Several resolutions in one run: data sets of one size each, and batches of one of them each.

Images of different sizes make no batch. They are sorted into buckets, of which each batch takes
one, in an order that mixes the buckets as their sizes weigh:

    an epoch is ⌊n_b / batch⌋ batches of every bucket b, shuffled; each bucket's images are shuffled
    anew in each epoch, and those that fill no batch wait for the next

The order follows from the seed and the count of samples alone, so a resumed run goes on exactly.
The model needs `any_size=True` (`fastdit.positions` has its positions on other grids).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from fastdit.data import Dataset, FolderData, image_files, load_npz
from fastdit.sizes import Size


class BucketedData:
    """Data sets of one size each, the first of which gives the model its `input_size`.

    Args:
        parts: the buckets; of the same channels.

    Raises:
        ValueError: there are none, or their channels differ.
    """

    def __init__(self, parts: Sequence[Dataset]) -> None:
        channels = {part.shape[0] for part in parts}
        dims = {len(part.shape) for part in parts}
        if len(channels) != 1 or len(dims) != 1:
            shapes = [part.shape for part in parts]
            raise ValueError(f"buckets: got {shapes}, allowed are some, of the same channels")
        self.parts = list(parts)
        self.shape = parts[0].shape
        self.shapes = [part.shape for part in parts]
        self.num_classes = max(part.num_classes for part in parts)
        self.condition_dim = parts[0].condition_dim
        self.starts = np.cumsum([0, *(len(part) for part in parts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def batch(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Images and labels of one bucket's indices.

        Raises:
            ValueError: the indices are of several buckets.
        """
        bucket = int(np.searchsorted(self.starts, indices[0], side="right")) - 1
        local = indices - self.starts[bucket]
        if local.min() < 0 or local.max() >= len(self.parts[bucket]):
            raise ValueError("indices: got some of several buckets, allowed are one's")
        return self.parts[bucket].batch(local)

    def order(self, seed: int, start: int, count: int) -> np.ndarray:
        """The indices of the batch of `count` samples that begins at sample `start`, a multiple of
        `count`.

        Raises:
            ValueError: a bucket is smaller than the batch.
        """
        sizes = [len(part) for part in self.parts]
        if min(sizes) < count:
            raise ValueError(
                f"batch_size: got batches of {count}, allowed is at most {min(sizes)}, the images "
                f"of the smallest bucket {self.shapes[int(np.argmin(sizes))]}"
            )
        slots = np.repeat(np.arange(len(sizes)), [size // count for size in sizes])
        epoch, position = divmod(start // count, len(slots))
        slots = np.random.default_rng([seed, epoch]).permutation(slots)
        bucket = int(slots[position])
        earlier = int((slots[:position] == bucket).sum()) * count
        shuffled = np.random.default_rng([seed, epoch, bucket]).permutation(sizes[bucket])
        return self.starts[bucket] + shuffled[earlier : earlier + count]


def parse_sizes(text: str) -> list[Size]:
    """`"256x256,192x320"` as sizes (height, width).

    Raises:
        ValueError: it is no list of them.
    """
    try:
        sizes = [tuple(int(side) for side in part.split("x")) for part in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or any(len(size) != 2 or min(size) < 1 for size in sizes):
        raise ValueError(f"buckets: got {text!r}, allowed is HxW,HxW, such as 256x256,192x320")
    return sizes


def load_folder(folder: Path, sizes: Sequence[Size]) -> BucketedData:
    """A folder of images, each in the bucket of the nearest aspect ratio, resized and cropped.

    Raises:
        ValueError: the folder holds no images, or none for one of the sizes.
    """
    files = image_files(folder)
    aspects = np.log([width / height for height, width in sizes])
    nearest = [int(np.abs(aspects - np.log(_aspect(path))).argmin()) for path, _label in files]
    parts = []
    for bucket, size in enumerate(sizes):
        own = [file for file, at in zip(files, nearest, strict=True) if at == bucket]
        if not own:
            raise ValueError(f"buckets: got {size[0]}x{size[1]}, to which no image is nearest")
        parts.append(FolderData(folder, size, own))
    return BucketedData(parts)


def _aspect(path: Path) -> float:
    with Image.open(path) as image:  # reads the header alone
        return image.width / image.height


def load_files(paths: Sequence[Path]) -> BucketedData:
    """`.npz` files as buckets: latents of several resolutions."""
    return BucketedData([load_npz(path) for path in paths])
