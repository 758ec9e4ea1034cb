"""gated_residual and its backward: x + gate·y.

pytest benchmarks/bench_gated_residual.py --benchmark-only
python benchmarks/bench_gated_residual.py [--threads 1] [--subset full] [--only backward]
"""

from __future__ import annotations

from harness.op_benchmark import OpBenchmark, modulation, random
from harness.running import main, tests


def inputs(size, dtype, device):
    x, y = (random(*size.stream, dtype=dtype, device=device) for _ in range(2))
    return [x, y, *modulation(size, dtype, device, 1)]


cases = OpBenchmark("gated_residual", inputs).cases
test_gated_residual = tests(cases)

if __name__ == "__main__":
    main(cases)
