"""glu and its backward: a bias and SwiGLU, at two thirds of four times the width, twice.

Its forward without a bias, and with gate and up in two tensors, too.

pytest benchmarks/bench_glu.py --benchmark-only
python benchmarks/bench_glu.py [--threads 1] [--subset full] [--only backward]
"""

from __future__ import annotations

from dataclasses import replace

from harness.op_benchmark import OpBenchmark, random
from harness.problem import Case
from harness.running import main, tests


def inputs(size, dtype, device):
    width = 2 * int(2 / 3 * 4 * size.width)
    x = random(size.batch, size.tokens, width, dtype=dtype, device=device)
    return [x, None, random(width, dtype=dtype, device=device), "silu", True]


def without_bias(size, dtype, device):
    x, up, _bias, *options = inputs(size, dtype, device)
    return [x, up, None, *options]


def apart(size, dtype, device):
    x, _up, _bias, *options = inputs(size, dtype, device)
    gate, up = (half.contiguous() for half in x.chunk(2, -1))
    return [gate, up, None, *options]


def cases(device: str) -> list[Case]:
    found = OpBenchmark("glu", inputs).cases(device)
    for form, made in {"no bias": without_bias, "apart": apart}.items():
        for case in OpBenchmark("glu", made).cases(device):
            if case.what == "forward":
                found.append(replace(case, name=f"glu, {form}", subset="full"))
    return found


test_glu = tests(cases)

if __name__ == "__main__":
    main(cases)
