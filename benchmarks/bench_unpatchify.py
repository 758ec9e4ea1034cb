"""unpatchify and its backward: rows of pixels to images, a permutation.

pytest benchmarks/bench_unpatchify.py --benchmark-only
python benchmarks/bench_unpatchify.py [--threads 1] [--subset full] [--only backward]
"""

from __future__ import annotations

from harness.op_benchmark import OpBenchmark, Size, random
from harness.running import main, tests


def inputs(size, dtype, device):
    channels = 2 * size.channels
    row = size.patch**2 * channels
    x = random(size.batch, size.tokens, row, dtype=dtype, device=device)
    return [x, size.patch, (size.grid, size.grid), channels]


PIXELS = (Size("3 channels, patch 4, B2", 2, 16, 1152, 16, patch=4, channels=3),)
cases = OpBenchmark(
    "unpatchify", inputs, sizes={("cpu", "full"): PIXELS, ("cuda", "full"): PIXELS}
).cases
test_unpatchify = tests(cases)

if __name__ == "__main__":
    main(cases)
