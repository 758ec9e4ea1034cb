"""gated_residual and its backward: x + gate·y.

    pytest benchmarks/bench_gated_residual.py --benchmark-group-by=param:case
    python benchmarks/bench_gated_residual.py [--threads 2] [--rounds 31] [--compile]

The second form prints a table. `copy` copies the bytes that the op must move.
"""

from __future__ import annotations

import torch
from rows import CASES, Benchmark, modulation

from fastdit import ops, reference


def inputs(shape, dtype):
    streams = [torch.randn(shape).to(dtype) for _ in range(2)]
    return [*streams, *modulation(shape, dtype, 1)]


BENCHMARK = Benchmark(ops.gated_residual, reference.gated_residual, inputs, (3, 3), CASES)
test_forward, test_backward = BENCHMARK.tests()

if __name__ == "__main__":
    BENCHMARK.main(__doc__.partition("\n")[0])
