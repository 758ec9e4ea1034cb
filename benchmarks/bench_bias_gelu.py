"""bias_gelu and its backward: a bias and the tanh form of GELU, at four times the width.

pytest benchmarks/bench_bias_gelu.py --benchmark-only
python benchmarks/bench_bias_gelu.py [--threads 1] [--subset full] [--only backward]
"""

from __future__ import annotations

from harness.op_benchmark import OpBenchmark, random
from harness.running import main, tests


def inputs(size, dtype, device):
    width = 4 * size.width
    x = random(size.batch, size.tokens, width, dtype=dtype, device=device)
    return [x, random(width, dtype=dtype, device=device)]


cases = OpBenchmark("bias_gelu", inputs).cases
test_bias_gelu = tests(cases)

if __name__ == "__main__":
    main(cases)
