"""glu and its backward: a bias and SwiGLU, at two thirds of four times the width, twice.

pytest benchmarks/bench_glu.py --benchmark-only
python benchmarks/bench_glu.py [--threads 1] [--subset full] [--only backward]
"""

from __future__ import annotations

from harness.op_benchmark import OpBenchmark, random
from harness.running import main, tests


def inputs(size, dtype, device):
    width = 2 * int(2 / 3 * 4 * size.width)
    x = random(size.batch, size.tokens, width, dtype=dtype, device=device)
    return [x, None, random(width, dtype=dtype, device=device), "silu", True]


cases = OpBenchmark("glu", inputs).cases
test_glu = tests(cases)

if __name__ == "__main__":
    main(cases)
