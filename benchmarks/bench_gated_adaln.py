"""gated_adaln and its backward: a branch's gated addition, LayerNorm, scale and shift.

    pytest benchmarks/bench_gated_adaln.py --benchmark-only
    python benchmarks/bench_gated_adaln.py [--threads 1] [--subset full] [--only backward]

The op between any two matrix products of a DiT, so it alone is also timed over batches and tokens.
"""

from __future__ import annotations

from harness.op_benchmark import OpBenchmark, Size, modulation, random
from harness.running import main, tests


def inputs(size, dtype, device):
    x, y = (random(*size.stream, dtype=dtype, device=device) for _ in range(2))
    return [x, y, *modulation(size, dtype, device, 3)]


def scaling(batches: tuple[int, ...], grids: tuple[int, ...]) -> tuple[Size, ...]:
    over_batch = [Size(f"XL/2, B{batch}", batch, 16, 1152, 16) for batch in batches]
    over_tokens = [Size(f"{grid**2} tokens of 1152, B2", 2, grid, 1152, 16) for grid in grids]
    return (*over_batch, *over_tokens)


BENCHMARK = OpBenchmark(
    "gated_adaln",
    inputs,
    sizes={
        ("cpu", "standard"): scaling((1, 4, 16), (4, 8, 32)),
        ("cuda", "standard"): scaling((1, 4, 128), (8, 32, 64)),
    },
)


def cases(device):
    """Scaling is the forward's alone."""
    found = BENCHMARK.cases(device)
    extra = {size.name for sizes in BENCHMARK.sizes.values() for size in sizes}
    return [c for c in found if c.size not in extra or c.what == "forward"]


test_gated_adaln = tests(cases)

if __name__ == "__main__":
    main(cases)
