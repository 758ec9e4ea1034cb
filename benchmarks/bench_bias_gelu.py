"""Bias and the tanh form of GELU, forward and backward.

pytest benchmarks/bench_bias_gelu.py --benchmark-only [--threads 2] [--no-compile]
"""

from __future__ import annotations

import pytest
import timing
import torch

from fastdit import ops, reference

SHAPES = [(2, 16, 768), (2, 256, 1536), (2, 256, 4608)]


def inputs(shape, dtype=torch.float32, grad=False):
    x = torch.randn(shape, dtype=dtype).requires_grad_(grad)
    return x, torch.randn(shape[-1], dtype=dtype).requires_grad_(grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(benchmark, compiled, shape, dtype):
    x, *_ = args = inputs(shape, dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    title = f"bias_gelu {shape} {dtype}"
    ours, eager = ops.bias_gelu, reference.bias_gelu
    timing.forward(benchmark, compiled, title, ours, eager, args, (x, x), tolerance)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward(benchmark, shape):
    x, *_ = args = inputs(shape, grad=True)
    ours, eager = ops.bias_gelu, reference.bias_gelu
    timing.backward(benchmark, f"bias_gelu {shape}", ours, eager, args, (x,) * 3)
