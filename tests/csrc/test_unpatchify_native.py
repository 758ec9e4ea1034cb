"""unpatchify of the compiled library moves every bit of every dtype, whatever the layout."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import random

from fastdit import backends, reference


@pytest.fixture(scope="module", autouse=True)
def library():
    if not any(k.name == "csrc" for k in backends.kernels_for("unpatchify", "cpu")):
        pytest.skip("the compiled library is not built")


def plain(*shape: int) -> torch.Tensor:
    return random(*shape, dtype=torch.float32, seed=0, grad=False)


def native(name: str, *args):
    return getattr(torch.ops.fastdit_native, name).default(*args)


BYTES = {1: torch.float8_e4m3fn, 2: torch.bfloat16, 4: torch.float32, 8: torch.float64}


def pattern(*shape: int, width: int) -> torch.Tensor:
    """Numbers of `width` bytes, every bit pattern allowed, as integers that compare."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[width]
    generator = torch.Generator().manual_seed(1)
    numbers = torch.randint(0, 256, (*shape[:-1], shape[-1] * width), generator=generator)
    return numbers.to(torch.uint8).view(integers)


@settings(max_examples=120, deadline=None)
@given(
    width=st.sampled_from([1, 2, 4, 8]),
    samples=st.integers(0, 3),
    grid=st.lists(st.integers(1, 9), min_size=1, max_size=2),
    patch=st.lists(st.integers(1, 5), min_size=2, max_size=2),
    channels=st.integers(1, 19),
    gap=st.integers(0, 2),
)
def test_unpatchify_moves_every_bit(width, samples, grid, patch, channels, gap):
    patch = patch[: len(grid)]
    tokens, numbers = 1, channels
    for g, p in zip(grid, patch, strict=True):
        tokens, numbers = tokens * g, numbers * p
    rows = pattern(samples, tokens + gap, numbers + gap, width=width)[:, gap:, gap:]
    image = reference.unpatchify(rows, patch, grid, channels)
    got = native("unpatchify", rows.view(BYTES[width]), patch, grid, channels)
    assert torch.equal(got.view(rows.dtype), image)
    padded = torch.zeros(*image.shape[:-1], image.shape[-1] + gap, dtype=image.dtype)
    padded[..., gap:] = image
    back = native(
        "unpatchify_backward", padded[..., gap:].view(BYTES[width]), patch, grid, channels
    )
    assert torch.equal(back.view(rows.dtype), rows)


def test_unpatchify_of_long_rows_and_of_any_strides():
    rows = plain(2, 1000, 6)
    for strided in (rows, plain(2, 6, 1000).mT, rows[:1].expand(2, 1000, 6), rows.flip(1)):
        image = reference.unpatchify(strided, [3], [1000], 2)
        assert torch.equal(native("unpatchify", strided, [3], [1000], 2), image)
        assert torch.equal(native("unpatchify_backward", image, [3], [1000], 2), strided)
    image = plain(3, 8, 12, 5).permute(0, 3, 1, 2)  # (3, 5, 8, 12), channels last
    want = reference.unpatchify_backward(image, [2, 3], [4, 4], 5)
    assert torch.equal(native("unpatchify_backward", image, [2, 3], [4, 4], 5), want)
