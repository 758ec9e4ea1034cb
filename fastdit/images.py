"""Samples as pictures: pixels from [-1, 1], and labelled grids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastdit.checkpoint_files import atomic_write

_LABEL_WIDTH, _LABEL_HEIGHT = 34, 20
_GAP = 2


def to_uint8(images: Tensor) -> np.ndarray:
    """`(B, C, H, W)` in [-1, 1] as `(B, H, W, 3)` uint8, rounded as the published sampler does.

    One channel is grey. Values outside [-1, 1] saturate.
    """
    images = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
    pixels = (127.5 * images.float() + 128).clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def grid(
    pixels: np.ndarray,
    columns: int,
    *,
    scale: int = 1,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
) -> Image.Image:
    """`(B, H, W, 3)` uint8 as one picture, row by row, each pixel `scale` wide.

    Raises:
        ValueError: no images, or `columns` or `scale` below 1.
    """
    if len(pixels) == 0 or columns < 1 or scale < 1:
        raise ValueError(
            f"grid: got {len(pixels)} images, columns {columns}, scale {scale}, "
            "allowed are at least 1 of each"
        )
    height, width = (scale * n for n in pixels.shape[1:3])
    rows = -(-len(pixels) // columns)
    font = ImageFont.load_default(min(20, max(9, height // 2)))
    wide = max((font.getlength(label) for label in row_labels), default=0)
    left = max(_LABEL_WIDTH, round(wide) + 10) if row_labels else 0
    top = _LABEL_HEIGHT if column_labels else 0
    size = (left + columns * (width + _GAP) + _GAP, top + rows * (height + _GAP) + _GAP)
    canvas = Image.new("RGB", size, "white")
    for i, image in enumerate(pixels):
        row, column = divmod(i, columns)
        tile = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
        x, y = _GAP + column * (width + _GAP), _GAP + row * (height + _GAP)
        canvas.paste(tile, (left + x, top + y))
    draw = ImageDraw.Draw(canvas)
    for row, label in enumerate(row_labels):
        middle = (left // 2, top + _GAP + row * (height + _GAP) + height // 2)
        draw.text(middle, label, fill="black", font=font, anchor="mm")
    small = ImageFont.load_default(min(13, max(8, width // 4)))
    for column, label in enumerate(column_labels):
        middle = (left + _GAP + column * (width + _GAP) + width // 2, top // 2)
        draw.text(middle, label, fill="black", font=small, anchor="mm")
    return canvas


def save(picture: Image.Image, path: str | Path) -> None:
    """A picture as a file, whole or not at all; a PNG unless the name says otherwise."""
    kind = Image.registered_extensions().get(Path(path).suffix.lower(), "PNG")
    atomic_write(path, lambda temporary: picture.save(temporary, format=kind))
