"""patch_embed and its backward: eager PyTorch, torch.compile and the compiled kernel.

    pytest benchmarks/bench_patch_embed.py --benchmark-group-by=param:case
    python benchmarks/bench_patch_embed.py [--threads 2] [--rounds 31] [--compile]

The second form prints a table. `copy` copies the tokens, the bytes that the forward must write.
The backward is timed as autograd runs it: `parameters` are the gradients of weight and bias, as in
training, `all` that of x too.
"""

from __future__ import annotations

import pytest
import torch
from timing import Candidates, options, print_table

import fastdit
from fastdit import ops, reference

CASES = {  # (samples, grid, patch, width, dtype)
    "XL/2, B2": (2, 16, 2, 1152, torch.float32),
    "XL/2, B2, bf16": (2, 16, 2, 1152, torch.bfloat16),
    "XL/4, B2": (2, 16, 4, 1152, torch.float32),
    "XL/4, B2, bf16": (2, 16, 4, 1152, torch.bfloat16),
    "XL/8, B2": (2, 16, 8, 1152, torch.float32),
    "S/2, B8": (8, 16, 2, 384, torch.float32),
    "4x4 tokens, width 192": (2, 4, 2, 192, torch.float32),
}


def arguments(case: str):
    samples, grid, p, width, dtype = CASES[case]
    x = torch.randn(samples, 4, grid * p, grid * p)
    weight, bias = torch.randn(width, 4, p, p), torch.randn(width)
    pos = torch.randn(1, grid * grid, width)  # fixed, as in DiT: no gradient
    return x.to(dtype), weight.to(dtype), bias.to(dtype), pos


def agree(found: dict[str, list[torch.Tensor]], dtype: torch.dtype) -> None:
    unit = 1e-5 if dtype == torch.float32 else 2e-2  # eager rounds bfloat16 tokens twice
    for name, tensors in found.items():
        for got, want in zip(tensors, found["eager"], strict=True):
            error = (got.double() - want.double()).abs().max()
            assert error <= unit * want.abs().max(), name


def forward(case: str, compiled: bool = False) -> Candidates:
    """Functions of no arguments by name, once all of them agree."""
    args = arguments(case)
    found: Candidates = {"eager": lambda: reference.patch_embed(*args)}
    if compiled:
        torch.compiler.reset()  # each case is compiled for itself
        fused = torch.compile(reference.patch_embed, fullgraph=True, dynamic=False)
        found["torch.compile"] = lambda: fused(*args)
    found["fastdit.ops"] = lambda: ops.patch_embed(*args)
    agree({name: [function()] for name, function in found.items()}, args[0].dtype)
    tokens = found["eager"]()
    return found | {"copy": lambda: tokens.clone()}


def backward(case: str, with_x: bool, compiled: bool = False) -> Candidates:
    """The same for the backward pass alone, of a graph that is kept."""
    x, weight, bias, pos = arguments(case)
    leaves = [t.requires_grad_() for t in ((x, weight, bias) if with_x else (weight, bias))]
    functions = {"eager": reference.patch_embed}
    if compiled:
        torch.compiler.reset()  # each case is compiled for itself
        functions["torch.compile"] = torch.compile(reference.patch_embed, dynamic=False)
    functions["fastdit.ops"] = ops.patch_embed
    found: Candidates = {}
    for name, function in functions.items():
        with torch.enable_grad(), fastdit.backend("auto"):
            tokens = function(x, weight, bias, pos)
        torch.manual_seed(1)
        dtokens = torch.randn_like(tokens)
        found[name] = lambda tokens=tokens, dtokens=dtokens: torch.autograd.grad(
            tokens, leaves, dtokens, retain_graph=True
        )
    agree({name: function() for name, function in found.items()}, x.dtype)
    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("candidate", ["eager", "fastdit.ops", "copy"])
def test_forward(benchmark, candidate, case):
    with torch.no_grad():
        benchmark(forward(case)[candidate])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("candidate", ["eager", "fastdit.ops"])
def test_backward(benchmark, candidate, case):
    benchmark(backward(case, with_x=False)[candidate])


def main() -> None:
    chosen = options(__doc__.partition("\n")[0])
    with torch.no_grad():
        for case in CASES:
            print_table(f"{case}, forward", forward(case, chosen.compile), chosen.rounds)
            for what, with_x in (("parameters", False), ("all", True)):
                found = backward(case, with_x, chosen.compile)
                print_table(f"{case}, backward, {what}", found, chosen.rounds)


if __name__ == "__main__":
    main()
