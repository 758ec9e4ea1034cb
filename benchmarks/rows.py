"""What the benchmarks of the row-wise ops share: candidates that agree, and the two ways to run.

Each benchmark names its cases, its inputs, and the op; `passes` counts the passes over a tensor
like x that the op must make, forward and backward, and `copy` copies as many bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from timing import Candidates, options, print_table
from torch import Tensor

import fastdit
from fastdit import backends

SHAPES = {
    "2x16x192": (2, 16, 192),
    "S, B2": (2, 256, 384),
    "XL, B2": (2, 256, 1152),
    "XL, B8": (8, 256, 1152),
}
CASES = {
    f"{name}{', bf16' * (dtype == torch.bfloat16)}": (shape, dtype)
    for name, shape in SHAPES.items()
    for dtype in (torch.float32, torch.bfloat16)
}


def modulation(shape: tuple[int, ...], dtype: torch.dtype, count: int) -> list[Tensor]:
    """Strided views of one projection, as a model makes them."""
    return list(torch.randn(shape[0], 6 * shape[-1]).to(dtype).chunk(6, -1)[:count])


@dataclass(frozen=True)
class Benchmark:
    op: Callable[..., object]
    eager: Callable[..., object]
    inputs: Callable[[tuple[int, ...], torch.dtype], list[Tensor]]
    passes: tuple[int, int]
    cases: dict[str, tuple[tuple[int, ...], torch.dtype]]

    def functions(self, compiled: bool) -> dict[str, Callable[..., object]]:
        fused = {"torch.compile": torch.compile(self.eager, fullgraph=True, dynamic=False)}
        return {"eager": self.eager} | (fused if compiled else {}) | {"fastdit.ops": self.op}

    def forward(self, case: str, compiled: bool = False) -> Candidates:
        """Functions of no arguments by name, once all of them agree."""
        args = self.inputs(*self.cases[case])
        functions = self.functions(compiled)
        found: Candidates = {name: lambda f=f: f(*args) for name, f in functions.items()}
        agree(found, args[0].dtype)
        return found | {"copy": copy(args[0], self.passes[0])}

    def backward(self, case: str, compiled: bool = False) -> Candidates:
        """The same for the gradients of all inputs, of a graph that is kept."""
        args = [t.requires_grad_() for t in self.inputs(*self.cases[case])]
        found: Candidates = {}
        for name, function in self.functions(compiled).items():
            with torch.enable_grad(), fastdit.backend("auto"):
                result = function(*args)
            outs = [result] if isinstance(result, Tensor) else list(result)
            torch.manual_seed(1)
            dout = [torch.randn_like(out) for out in outs]
            found[name] = lambda outs=outs, dout=dout: torch.autograd.grad(
                outs, args, dout, retain_graph=True
            )
        agree(found, args[0].dtype)
        return found | {"copy": copy(args[0].detach(), self.passes[1])}

    def tests(self) -> tuple[Callable[..., None], Callable[..., None]]:
        """For pytest-benchmark: the forward and the backward, a candidate at a time."""

        def test_forward(benchmark, candidate, case):
            with torch.no_grad():
                benchmark(self.forward(case)[candidate])

        def test_backward(benchmark, candidate, case):
            benchmark(self.backward(case)[candidate])

        for mark in (
            pytest.mark.parametrize("candidate", ["eager", "fastdit.ops", "copy"]),
            pytest.mark.parametrize("case", self.cases),
        ):
            test_forward, test_backward = mark(test_forward), mark(test_backward)
        return test_forward, test_backward

    def main(self, description: str) -> None:
        chosen = options(description)
        for case in self.cases:
            with torch.no_grad():
                print_table(f"{case}, forward", self.forward(case, chosen.compile), chosen.rounds)
            print_table(f"{case}, backward", self.backward(case), chosen.rounds)


def agree(found: Candidates, dtype: torch.dtype) -> None:
    backends.kernels_for("adaln", "cpu")
    want, *others = (_tensors(function()) for function in found.values())
    unit = 1e-4 if dtype == torch.float32 else 5e-2  # of the largest: eager rounds often
    for results in others:
        for got, exact in zip(results, want, strict=True):
            error = (got.double() - exact.double()).abs().max()
            assert error <= unit * exact.abs().max()


def _tensors(result: object) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def copy(like: Tensor, passes: int) -> Callable[[], object]:
    """A copy that reads and writes as many bytes as `passes` tensors like that have."""
    count = passes * like.numel() * like.element_size() // 2
    source, target = (torch.ones(count, dtype=torch.uint8) for _ in range(2))
    return lambda: target.copy_(source)
