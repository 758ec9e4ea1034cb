"""The benchmark of one op: its cases from its inputs alone.

The eager column is the op's definition, `fastdit.reference.<op>`; torch.compile compiles the same.
Least traffic is every input once in and every output once out, saved statistics included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastdit
from fastdit import backends, ops
from fastdit.ops import _library
from fastdit.workloads import Workload
from harness import peers
from harness.problem import COPY, DTYPES, EAGER, OURS, Case, Column, Problem, tensors

TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}  # of the largest: eager rounds often
PASSES = ("forward", "backward", "both")


@dataclass(frozen=True)
class Size:
    """The tensors of an op in some model: `batch` samples of `grid` × `grid` tokens."""

    name: str
    batch: int
    grid: int
    width: int
    heads: int
    patch: int = 2
    channels: int = 4

    @property
    def tokens(self) -> int:
        return self.grid**2

    @property
    def stream(self) -> tuple[int, int, int]:
        """The shape of the residual stream."""
        return self.batch, self.tokens, self.width


TINY = Size("16 tokens of 192, B2", 2, 4, 192, 6)
SMALL = Size("S/2, B2", 2, 16, 384, 6)
XL = Size("XL/2, B2", 2, 16, 1152, 16)
XL8 = Size("XL/2, B8", 8, 16, 1152, 16)
XL32 = Size("XL/2, B32", 32, 16, 1152, 16)
SIZES = {
    ("cpu", "quick"): (TINY, XL),
    ("cpu", "standard"): (),
    ("cpu", "full"): (SMALL, XL8),
    ("cuda", "quick"): (XL32,),
    ("cuda", "standard"): (XL, Size("S/2, B32", 32, 16, 384, 6)),
    ("cuda", "full"): (XL8, Size("XL/2 at 512, B8", 8, 32, 1152, 16)),
}
COMPILED = ("XL/2, B2", "XL/2, B32")
"""Where torch.compile has a column: it takes seconds for each case."""


def modulation(size: Size, dtype: torch.dtype, device: str, count: int) -> list[Tensor]:
    """Strided views of one projection, as a model makes them."""
    rows = torch.randn(size.batch, 6 * size.width, device=device).to(dtype)
    return list(rows.chunk(6, -1)[:count])


def random(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


@dataclass(frozen=True)
class OpBenchmark:
    """The cases of one op.

    Attributes:
        name: of the op in `fastdit.ops`.
        inputs: makes the public function's arguments, of a size, a dtype and a device.
        fixed: positions of tensors among them that are not differentiated.
        flops: of a forward call; a backward one has 2.5 times as many.
        further: more columns for a forward pass, of its arguments and the device.
        sizes: that this op alone has, by subset.
    """

    name: str
    inputs: Callable[[Size, torch.dtype, str], Sequence[Any]]
    fixed: tuple[int, ...] = ()
    flops: Callable[[Size], int] | None = None
    further: Callable[[Sequence[Any], str], dict[str, Column]] | None = None
    sizes: dict[tuple[str, str], tuple[Size, ...]] = field(default_factory=dict)

    def cases(self, device: str) -> list[Case]:
        """Of all subsets; in 16 bits on GPUs, in float32 and, in full, bfloat16 on CPUs."""
        found = []
        for sizes in (SIZES, self.sizes):
            for (kind, subset), several in sizes.items():
                if kind == device:
                    found += [c for size in several for c in self._cases(size, device, subset)]
        return found

    def _cases(self, size: Size, device: str, subset: str) -> list[Case]:
        first, *others = ("fp32", "bf16") if device == "cpu" else ("bf16", "fp16")
        return [
            Case(
                "op",
                self.name,
                size.name,
                what,
                partial(self.problem, size, what, dtype, device),
                seconds=1.2,
                dtype=dtype,
                device=device,
                subset=self._subset(subset, what, dtype in others),
                tokens=size.tokens,
                batch=size.batch,
                width=size.width,
            )
            for dtype in (first, *others)
            for what in PASSES
        ]

    @staticmethod
    def _subset(subset: str, what: str, second_dtype: bool) -> str:
        if second_dtype:
            return "full"
        return "standard" if subset == "quick" and what != "forward" else subset

    def problem(self, size: Size, what: str, dtype: str, device: str) -> Problem:
        """One pass at one size, ready to be measured."""
        args = list(self.inputs(size, DTYPES[dtype], device))
        leaves = []
        if what != "forward":
            leaves = [
                a.requires_grad_()
                for i, a in enumerate(args)
                if isinstance(a, Tensor) and i not in self.fixed and a.is_floating_point()
            ]
        _, schema = _library.OPS[self.name].bind(*args)
        flops = self.flops(size) if self.flops else 0
        least = Workload(self.name, schema, flops).least_bytes()
        moved = {**least, "both": sum(least.values())}[what]
        work = {"forward": flops, "backward": 5 * flops // 2, "both": 7 * flops // 2}[what]
        definition = _library.OPS[self.name].reference
        functions: dict[str, Callable[[], Any]] = {
            EAGER: lambda: definition(*schema),
            OURS: lambda: getattr(ops, self.name)(*args),
        }
        if size.name in COMPILED:
            for name, column in peers.compile_columns(definition, *schema, device=device).items():
                functions[name] = column
        further = self.further(args, device) if self.further and what == "forward" else {}
        columns = {name: _pass(what, f, leaves) for name, f in functions.items()} | further
        columns[COPY] = copy(moved, device)
        return Problem(
            in_order(columns),
            TOLERANCE[dtype],
            bytes=moved,
            flops=work or None,
            differentiate={} if what == "forward" else functions,
            given=tuple(tensors(args)),
        )

    def runs(self, size: Size, dtype: str, device: str) -> str:
        """What `auto` chooses for the forward pass, and why."""
        args = self.inputs(size, DTYPES[dtype], device)
        return str(backends.explain(self.name, *args))


def in_order(columns: dict[str, Column]) -> dict[str, Column]:
    """Eager first, fastdit behind its peers, the copy last."""
    last = {OURS: 1, COPY: 2}
    return dict(sorted(columns.items(), key=lambda item: last.get(item[0], 0)))


def _pass(what: str, function: Callable[[], Any], leaves: list[Tensor]) -> Callable[[], Any]:
    """The forward alone, the backward alone of a graph that is kept, or both."""
    if what == "forward":  # no leaf asks for a gradient: no_grad around each call is 2 of 5 µs
        return function
    cotangents: list[Tensor] = []
    kept: list[Tensor] = []

    def forward() -> list[Tensor]:
        with torch.enable_grad(), fastdit.backend("auto"):
            result = function()
        outs = [result] if isinstance(result, Tensor) else list(result)
        if not cotangents:
            torch.manual_seed(1)
            cotangents.extend(torch.randn_like(out) for out in outs)
        return outs

    if what == "both":
        return lambda: torch.autograd.grad(forward(), leaves, cotangents)

    def backward() -> object:
        if not kept:
            kept.extend(forward())
        return torch.autograd.grad(kept, leaves, cotangents, retain_graph=True)

    return backward


def copy(moved: int, device: str) -> Callable[[], object]:
    """A copy that reads and writes as many bytes in all."""
    source, target = (torch.ones(moved // 2, dtype=torch.uint8, device=device) for _ in range(2))
    return lambda: target.copy_(source)
