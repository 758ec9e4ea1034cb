"""adaln and its backward: LayerNorm, scale and shift.

pytest benchmarks/bench_adaln.py --benchmark-only
python benchmarks/bench_adaln.py [--threads 1] [--subset full] [--only backward]
"""

from __future__ import annotations

from harness.op_benchmark import OpBenchmark, modulation, random
from harness.running import main, tests


def inputs(size, dtype, device):
    x = random(*size.stream, dtype=dtype, device=device)
    return [x, *modulation(size, dtype, device, 2)]


cases = OpBenchmark("adaln", inputs).cases
test_adaln = tests(cases)

if __name__ == "__main__":
    main(cases)
