"""Gate, residual, LayerNorm and modulation in one pass, forward and backward.

pytest benchmarks/bench_gated_adaln.py --benchmark-only [--threads 2] [--no-compile]
"""

from __future__ import annotations

import pytest
import timing
import torch

from fastdit import ops, reference

SHAPES = [(2, 16, 192), (2, 256, 384), (2, 256, 1152), (8, 256, 1152)]


def eager(x, y, gate, shift, scale):
    return reference.gated_adaln(x, y, gate, shift, scale, None, None, 1e-6, "layer", True)


def inputs(shape, dtype=torch.float32, grad=False):
    batch, _tokens, width = shape
    x, y = (torch.randn(shape, dtype=dtype).requires_grad_(grad) for _ in range(2))
    modulation = torch.randn(batch, 6 * width, dtype=dtype).chunk(6, -1)[:3]
    return x, y, *(m.requires_grad_(grad) for m in modulation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(benchmark, compiled, shape, dtype):
    x, *_ = args = inputs(shape, dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 0.2
    title = f"gated_adaln {shape} {dtype}"
    timing.forward(benchmark, compiled, title, ops.gated_adaln, eager, args, (x,) * 4, tolerance)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward(benchmark, shape):
    x, *_ = args = inputs(shape, grad=True)
    timing.backward(benchmark, f"gated_adaln {shape}", ops.gated_adaln, eager, args, (x,) * 6)
