"""The gated residual `x + gate·y`, forward and backward.

pytest benchmarks/bench_gated_residual.py --benchmark-only [--threads 2] [--no-compile]
"""

from __future__ import annotations

import pytest
import timing
import torch

from fastdit import ops, reference

SHAPES = [(2, 16, 192), (2, 256, 384), (2, 256, 1152), (8, 256, 1152)]


def inputs(shape, dtype=torch.float32, grad=False):
    batch, _tokens, width = shape
    x, y = (torch.randn(shape, dtype=dtype).requires_grad_(grad) for _ in range(2))
    gate = torch.randn(batch, 6 * width, dtype=dtype).chunk(6, -1)[2]
    return x, y, gate.requires_grad_(grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(benchmark, compiled, shape, dtype):
    x, *_ = args = inputs(shape, dtype)
    ours, eager = ops.gated_residual, reference.gated_residual
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    title = f"gated_residual {shape} {dtype}"
    timing.forward(benchmark, compiled, title, ours, eager, args, (x,) * 3, tolerance)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward(benchmark, shape):
    x, *_ = args = inputs(shape, grad=True)
    ours, eager = ops.gated_residual, reference.gated_residual
    timing.backward(benchmark, f"gated_residual {shape}", ours, eager, args, (x,) * 3)
