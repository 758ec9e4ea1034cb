"""adaln and its backward: LayerNorm, scale and shift.

    pytest benchmarks/bench_adaln.py --benchmark-group-by=param:case
    python benchmarks/bench_adaln.py [--threads 2] [--rounds 31] [--compile]

The second form prints a table. `copy` copies the bytes that the op must move.
"""

from __future__ import annotations

import torch
from rows import CASES, Benchmark, modulation

from fastdit import ops, reference


def eager(x, shift, scale):
    return reference.adaln(x, shift, scale, None, None, 1e-6, "layer", True)


def inputs(shape, dtype):
    return [torch.randn(shape).to(dtype), *modulation(shape, dtype, 2)]


BENCHMARK = Benchmark(ops.adaln, eager, inputs, (2, 3), CASES)
test_forward, test_backward = BENCHMARK.tests()

if __name__ == "__main__":
    BENCHMARK.main(__doc__.partition("\n")[0])
