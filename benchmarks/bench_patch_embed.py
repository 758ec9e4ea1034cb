"""Patch embedding: convolution, flatten, transpose and position, forward and backward.

pytest benchmarks/bench_patch_embed.py --benchmark-only [--threads 2] [--no-compile]
"""

from __future__ import annotations

import pytest
import timing
import torch

from fastdit import ops, reference

# batch, channels, size, patch, width: DiT/2 of three sizes, /4 and /8
SHAPES = [(2, 4, 8, 2, 192), (2, 4, 32, 2, 384), (2, 4, 32, 2, 1152), (2, 4, 32, 4, 1152)]
SHAPES += [(2, 4, 32, 8, 1152)]


def inputs(shape, grad=False):
    batch, channels, size, patch, width = shape
    x, pos = torch.randn(batch, channels, size, size), torch.randn(1, (size // patch) ** 2, width)
    weight, bias = torch.randn(width, channels, patch, patch) / 8, torch.randn(width)
    return x, *(t.requires_grad_(grad) for t in (weight, bias)), pos


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(benchmark, compiled, shape):
    args = inputs(shape)
    tokens = reference.patch_embed(*args)
    moved = (args[0], tokens)
    ours, eager = ops.patch_embed, reference.patch_embed
    timing.forward(benchmark, compiled, f"patch_embed {shape}", ours, eager, args, moved)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward(benchmark, shape):
    """A convolution's gradient against matrix products on gathered patches, both PyTorch's."""
    args = inputs(shape, grad=True)
    tokens = reference.patch_embed(*args)
    ours, eager = ops.patch_embed, reference.patch_embed
    moved = (args[0], tokens)
    timing.backward(benchmark, f"patch_embed {shape}", ours, eager, args, moved, 1e-3)
