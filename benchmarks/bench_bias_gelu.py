"""bias_gelu and its backward: a bias and the tanh form of GELU, at four times the width.

    pytest benchmarks/bench_bias_gelu.py --benchmark-group-by=param:case
    python benchmarks/bench_bias_gelu.py [--threads 2] [--rounds 31] [--compile]

The second form prints a table. `copy` copies the bytes that the op must move.
"""

from __future__ import annotations

import torch
from rows import CASES, Benchmark

from fastdit import ops, reference


def inputs(shape, dtype):
    wide = (*shape[:-1], 4 * shape[-1])
    return [torch.randn(wide).to(dtype), torch.randn(wide[-1]).to(dtype)]


BENCHMARK = Benchmark(ops.bias_gelu, reference.bias_gelu, inputs, (2, 3), CASES)
test_forward, test_backward = BENCHMARK.tests()

if __name__ == "__main__":
    BENCHMARK.main(__doc__.partition("\n")[0])
