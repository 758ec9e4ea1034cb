"""patch_embed and its backward: patches to tokens, with fixed positions.

    pytest benchmarks/bench_patch_embed.py --benchmark-only
    python benchmarks/bench_patch_embed.py [--threads 1] [--subset full] [--only backward]

The backward makes the gradients of weight and bias, as in training; the latents need none.
"""

from __future__ import annotations

from harness.op_benchmark import OpBenchmark, Size, random
from harness.running import main, tests


def inputs(size, dtype, device):
    side, p = size.grid * size.patch, size.patch
    x = random(size.batch, size.channels, side, side, dtype=dtype, device=device)
    weight = random(size.width, size.channels, p, p, dtype=dtype, device=device)
    bias = random(size.width, dtype=dtype, device=device)
    return [x, weight, bias, random(1, size.tokens, size.width, dtype=dtype, device=device)]


LARGE_PATCHES = tuple(Size(f"XL/{p}, B2", 2, 16, 1152, 16, patch=p) for p in (4, 8))
cases = OpBenchmark(
    "patch_embed",
    inputs,
    fixed=(0, 3),
    sizes={("cpu", "full"): LARGE_PATCHES, ("cuda", "full"): LARGE_PATCHES},
).cases
test_patch_embed = tests(cases)

if __name__ == "__main__":
    main(cases)
