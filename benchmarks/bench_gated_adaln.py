"""gated_adaln and its backward: gate, residual, LayerNorm, scale and shift.

    pytest benchmarks/bench_gated_adaln.py --benchmark-group-by=param:case
    python benchmarks/bench_gated_adaln.py [--threads 2] [--rounds 31] [--compile]

The second form prints a table. `copy` copies the bytes that the op must move.
"""

from __future__ import annotations

import torch
from rows import CASES, Benchmark, modulation

from fastdit import ops, reference


def eager(x, y, gate, shift, scale):
    return reference.gated_adaln(x, y, gate, shift, scale, None, None, 1e-6, "layer", True)


def inputs(shape, dtype):
    streams = [torch.randn(shape).to(dtype) for _ in range(2)]
    return [*streams, *modulation(shape, dtype, 3)]


BENCHMARK = Benchmark(ops.gated_adaln, eager, inputs, (4, 6), CASES)
test_forward, test_backward = BENCHMARK.tests()

if __name__ == "__main__":
    BENCHMARK.main(__doc__.partition("\n")[0])
