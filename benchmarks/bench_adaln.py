"""LayerNorm and modulation: `F.layer_norm(x)·(1 + scale) + shift`, forward and backward.

pytest benchmarks/bench_adaln.py --benchmark-only [--threads 2] [--no-compile]
"""

from __future__ import annotations

import pytest
import timing
import torch

from fastdit import ops, reference

SHAPES = [(2, 16, 192), (2, 256, 384), (2, 256, 1152), (8, 256, 1152)]


def eager(x, shift, scale):
    return reference.adaln(x, shift, scale, None, None, 1e-6, "layer", True)


def inputs(shape, dtype=torch.float32, grad=False):
    batch, _tokens, width = shape
    x = torch.randn(shape, dtype=dtype).requires_grad_(grad)
    shift, scale, *_ = torch.randn(batch, 6 * width, dtype=dtype).chunk(6, -1)
    return x, shift.requires_grad_(grad), scale.requires_grad_(grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(benchmark, compiled, shape, dtype):
    x, *_ = args = inputs(shape, dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    title = f"adaln {shape} {dtype}"
    timing.forward(benchmark, compiled, title, ops.adaln, eager, args, (x, x), tolerance)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward(benchmark, shape):
    x, *_ = args = inputs(shape, grad=True)
    timing.backward(benchmark, f"adaln {shape}", ops.adaln, eager, args, (x, x, x))
