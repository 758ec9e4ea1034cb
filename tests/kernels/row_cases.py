"""Calls of adaln, gated_residual and gated_adaln, and the Triton kernels to run them on the CPU."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

from fastdit import backends, reference
from fastdit.kernels import slot_sums

OPS = {"adaln": 1, "gated_residual": 1, "gated_adaln": 2}  # and their differentiable outputs
WIDTHS = {"S": 384, "B": 768, "L": 1024, "XL": 1152}
BATCH, TOKENS = 2, 5  # two samples, each of three slots of unequal length, summed two at a time
SMALL_SLOTS = slot_sums.SlotTable(least_rows=2)
SMALL_FINISH = slot_sums.FinishTable(slots=2)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@contextlib.contextmanager
def on_the_cpu() -> Iterator[None]:
    """Inside, the three ops' Triton kernels are those of CPU tensors, for use in a VirtualGPU, and
    few tokens fill many slots: an interpreted program takes milliseconds."""
    with contextlib.ExitStack() as stack:
        for op in OPS:
            for kernel in importlib.import_module(f"fastdit.kernels.{op}").KERNELS:
                own = dataclasses.replace(kernel, device="cpu")
                stack.enter_context(backends.replaced(kernel.op, "cpu", [own]))
        stack.enter_context(mock.patch.object(slot_sums, "SLOTS", SMALL_SLOTS))
        stack.enter_context(mock.patch.object(slot_sums, "FINISH", SMALL_FINISH))
        yield


@dataclass(frozen=True)
class Case:
    """One way to call an op; `modulation` is `"sample"`, `"token"` or None for each of gate, shift
    and scale; `layout` how it lies in memory."""

    name: str
    width: int = 72
    tokens: int = TOKENS
    gate: str = "sample"
    shift: str | None = "sample"
    scale: str | None = "sample"
    affine: str = ""  # "", "weight" or "weight, bias"
    norm: str = "layer"
    plus_one: bool = True
    mean: float = 0.5
    layout: str = "chunks"
    mixed: bool = False  # autocast's mixture: x in float32, everything else in the dtype

    def modulation(self, kind: str | None, index: int, dtype: torch.dtype) -> Tensor | None:
        if kind is None:
            return None
        lead = (BATCH,) if kind == "sample" else (BATCH, self.tokens)
        if self.layout == "chunks":
            return _random(*lead, 3 * self.width, dtype=dtype, seed=8).chunk(3, -1)[index]
        if self.layout == "columns":  # the column stride is the largest
            return _random(self.width, *lead, dtype=dtype, seed=index).movedim(0, -1)
        assert self.layout == "expanded"  # strides of 0 repeat one row
        return _random(self.width, dtype=dtype, seed=index).expand(*lead, self.width)

    def arguments(self, op: str, dtype: torch.dtype) -> list:
        """The schema's arguments; every floating-point tensor requires its gradient."""
        stream = torch.float32 if self.mixed else dtype
        lies = (self.tokens, BATCH) if self.layout == "columns" else (BATCH, self.tokens)
        x = _random(*lies, self.width, dtype=torch.float64, seed=20).add(self.mean).to(stream)
        y = _random(*lies, self.width, dtype=dtype, seed=21)
        x, y = (t.transpose(0, 1) if self.layout == "columns" else t for t in (x, y))
        gate = self.modulation(self.gate, 2, dtype)
        shift, scale = self.modulation(self.shift, 0, dtype), self.modulation(self.scale, 1, dtype)
        weight, bias = (
            _random(self.width, dtype=stream, seed=seed) if name in self.affine else None
            for seed, name in ((5, "weight"), (6, "bias"))
        )
        options = [1e-5 if self.affine else 1e-6, self.norm, self.plus_one]
        tensors = {
            "adaln": [x, shift, scale, weight, bias],
            "gated_residual": [x, y, gate],
            "gated_adaln": [x, y, gate, shift, scale, weight, bias],
        }[op]
        leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
        return leaves if op == "gated_residual" else [*leaves, *options]


CASES = [
    Case("per sample"),
    Case("per token", width=264, gate="token", shift="token", scale="token"),
    Case("padded", width=37),
    Case("split and padded", width=600),
    Case("one column", width=1, tokens=1),
    Case("large mean", mean=100.0),
    Case("bare", shift=None, scale=None),
    Case("shift alone, by columns", scale=None, layout="columns"),
    Case("scale per token, shift per sample", width=264, scale="token", affine="weight, bias"),
    Case("affine", width=264, affine="weight, bias", plus_one=False),
    Case("affine, unmodulated", affine="weight, bias", shift=None, scale=None),
    Case("rms", norm="rms", affine="weight", shift=None),
    Case("rms per token", gate="token", shift="token", scale="token", norm="rms", layout="columns"),
    Case("expanded", gate="token", scale="token", layout="expanded"),
    Case("autocast", mixed=True),
]


def _random(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def overload(op: str):
    return getattr(torch.ops.fastdit, op).default


def exact(arguments: list) -> list:
    """The same call in float64."""
    return [a.detach().double().requires_grad_() if isinstance(a, Tensor) else a for a in arguments]


def run(function, arguments: list, count: int) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """The first `count` outputs, and the gradients of a random functional of them, one for each
    tensor among the arguments."""
    out = function(*arguments)
    out = (out,) if isinstance(out, Tensor) else tuple(out)[:count]
    generator = torch.Generator().manual_seed(30)
    # Drawn in the coarsest dtype, so that every precision is given the same numbers.
    weights = [torch.randn(o.shape, generator=generator).bfloat16().to(o.dtype) for o in out]
    leaves = [a for a in arguments if isinstance(a, Tensor)]
    gradients = torch.autograd.grad(out, leaves, weights)
    return tuple(o.detach() for o in out), list(gradients)


def gated_adaln_at(stored: Tensor):
    """`gated_adaln` in float64 that normalises h as a kernel stored it, rounded."""

    def at(x, y, gate, *rest):
        h = reference.gated_residual(x, y, gate)
        return h, reference.adaln(h + (stored.double() - h).detach(), *rest)

    return at


def error(got: Tensor, truth: Tensor) -> float:
    return float((got.double() - truth).abs().max())
