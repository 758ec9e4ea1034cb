"""unpatchify and its backward: eager PyTorch, torch.compile, the compiled kernel, a plain copy.

    pytest benchmarks/bench_unpatchify.py --benchmark-group-by=param:case
    python benchmarks/bench_unpatchify.py [--threads 2] [--rounds 31] [--compile]

The second form prints a table. The copy of the same bytes is the bound. `fastdit.ops` is the public
function, checks and choice of the kernel included; `kernel` is the library's op alone.
"""

from __future__ import annotations

import pytest
import torch
from timing import Candidates, options, print_table

from fastdit import backends, ops, reference

CASES = {  # (samples, grid, patch, channels, dtype)
    "XL/2, B2": (2, (16, 16), 2, 8, torch.float32),
    "XL/2, B2, bf16": (2, (16, 16), 2, 8, torch.bfloat16),
    "XL/2, B32": (32, (16, 16), 2, 8, torch.float32),
    "XL/2 at 512, B2": (2, (32, 32), 2, 8, torch.float32),
    "3 channels, patch 4": (2, (16, 16), 4, 3, torch.float32),
}


def candidates(case: str, compiled: bool = False, backward: bool = False) -> Candidates:
    """Functions of no arguments by name, once all of them agree."""
    samples, grid, p, channels, dtype = CASES[case]
    backends.kernels_for("unpatchify", "cpu")
    native, patch = torch.ops.fastdit_native, [p, p]
    if backward:
        x = torch.randn(samples, channels, grid[0] * p, grid[1] * p).to(dtype)
        eager, kernel = reference.unpatchify_backward, native.unpatchify_backward.default
    else:
        x = torch.randn(samples, grid[0] * grid[1], p * p * channels).to(dtype)
        eager, kernel = reference.unpatchify, native.unpatchify.default
    found: Candidates = {"eager": lambda: eager(x, patch, grid, channels)}
    if compiled:
        torch.compiler.reset()  # each case is compiled for itself
        fused = torch.compile(eager, fullgraph=True, dynamic=False)
        found["torch.compile"] = lambda: fused(x, patch, grid, channels)
    if not backward:
        found["fastdit.ops"] = lambda: ops.unpatchify(x, patch, grid, channels)
    found["kernel"] = lambda: kernel(x, patch, list(grid), channels)
    want = found["eager"]()
    assert all(torch.equal(function(), want) for function in found.values())
    return found | {"copy": lambda: x.clone()}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("candidate", ["eager", "fastdit.ops", "kernel", "copy"])
def test_unpatchify(benchmark, candidate, case):
    with torch.no_grad():
        benchmark(candidates(case)[candidate])


def main() -> None:
    chosen = options(__doc__.partition("\n")[0])
    with torch.no_grad():
        for case in CASES:
            for backward in (False, True):
                title = f"{case}, {'backward' if backward else 'forward'}"
                print_table(title, candidates(case, chosen.compile, backward), chosen.rounds)


if __name__ == "__main__":
    main()
