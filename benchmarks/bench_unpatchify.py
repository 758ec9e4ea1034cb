"""Token rows back to an image.

pytest benchmarks/bench_unpatchify.py --benchmark-only [--threads 2] [--no-compile]
"""

from __future__ import annotations

import pytest
import timing
import torch

from fastdit import ops, reference

# batch, grid, patch, channels
SHAPES = [(2, 4, 2, 8), (2, 16, 2, 8), (32, 16, 2, 8), (2, 8, 4, 8)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(benchmark, compiled, shape):
    batch, grid, patch, channels = shape
    tokens = torch.randn(batch, grid**2, patch**2 * channels)
    args = (tokens, [patch] * 2, [grid] * 2, channels)
    ours, eager = ops.unpatchify, reference.unpatchify
    moved = (tokens, tokens)
    timing.forward(benchmark, compiled, f"unpatchify {shape}", ours, eager, args, moved)
