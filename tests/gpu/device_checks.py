"""What a native op must do on a device, for every case of `op_cases`: the checks themselves.

`test_device.py` runs them on a GPU; `test_rehearsal.py` runs those that a CPU can, on the same
kernels in the interpreter, so that the checks are known to work before a GPU sees them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from op_cases import cases
from torch import Tensor

import fastdit
from fastdit import backends
from fastdit.ops import _library


def moved(tensor: Tensor, device: str) -> Tensor:
    """A leaf with the same values and strides on `device`: a projection's chunks stay views."""
    elements = tensor.untyped_storage().nbytes() // tensor.element_size()
    storage = tensor.detach().as_strided((elements,), (1,), 0).to(device, copy=True)
    view = storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    return view.requires_grad_(tensor.requires_grad)


def case(index: int, dtype: torch.dtype, device: str) -> tuple[str, tuple]:
    """One call as schema arguments on `device`; floating-point inputs are leaves."""
    op, _special, args = list(cases(dtype))[index]
    return op, tuple(moved(a, device) if isinstance(a, Tensor) else a for a in args)


def why_not_native(op: str, args: tuple, device: str) -> str | None:
    """Why no kernel runs this call on this kind of device, or None."""
    kernels = backends.kernels_for(op, device)
    reasons = [f"{kernel.name}: {kernel.unsupported(*args)}" for kernel in kernels]
    if any(kernel.unsupported(*args) is None for kernel in kernels):
        return None
    return f"{op} on {device}: " + ("; ".join(reasons) or "no kernel is registered")


def results(op: str, args: tuple, run: Callable[..., Any] | None = None) -> list[Tensor]:
    """Outputs, then gradients of a fixed random functional of them for each leaf."""
    run = run or _library.OPS[op]
    out = run(*args)
    outputs = [out] if isinstance(out, Tensor) else list(out)
    generator = torch.Generator().manual_seed(11)
    cotangents = [torch.randn(o.shape, generator=generator).to(o) for o in outputs]
    leaves = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    return outputs + list(torch.autograd.grad(outputs, leaves, cotangents))


def exact(op: str, args: tuple) -> list[Tensor]:
    """`results` of the eager definition in float64, on the same device."""
    wide = tuple(
        a.detach().double().requires_grad_(a.requires_grad)
        if isinstance(a, Tensor) and a.is_floating_point()
        else a
        for a in args
    )
    with fastdit.backend("reference"):
        return results(op, wide)


def check_accuracy(index: int, dtype: torch.dtype, device: str) -> None:
    """Every output and gradient errs at most 1.25 times as much as eager PyTorch in the dtype, or
    4 units in the last place of the largest value, for the cases are small."""
    op, args = case(index, dtype, device)
    with fastdit.backend("native"):
        native = results(op, args)
    with fastdit.backend("reference"):
        eager = results(op, args)
    for got, plain, truth in zip(native, eager, exact(op, args), strict=True):
        assert (got.shape, got.dtype) == (plain.shape, plain.dtype)
        assert got.is_contiguous()
        unit = torch.finfo(got.dtype).eps * truth.abs().max().item()
        error, allowed = (got.double() - truth).abs().max(), (plain.double() - truth).abs().max()
        assert error <= max(1.25 * allowed, 4 * unit), f"{op}: {error:.3g} against {allowed:.3g}"


def check_determinism(index: int, dtype: torch.dtype, device: str) -> None:
    """The same bits in ten runs."""
    op, args = case(index, dtype, device)
    with fastdit.backend("native"):
        first = results(op, args)
        for _ in range(9 if device != "cpu" else 1):
            assert all(map(torch.equal, results(op, args), first))


def check_compile(index: int, dtype: torch.dtype, device: str, compiler: str) -> None:
    """torch.compile without a graph break computes the same."""
    op, args = case(index, dtype, device)
    torch.compiler.reset()
    compiled = torch.compile(
        lambda *arguments: _library.OPS[op](*arguments), fullgraph=True, backend=compiler
    )
    with fastdit.backend("native"):
        for got, want in zip(results(op, args, compiled), results(op, args), strict=True):
            torch.testing.assert_close(got, want)


def check_graph(index: int, dtype: torch.dtype) -> None:
    """Forward and backward captured in CUDA graphs, replayed on other values."""
    op, args = case(index, dtype, "cuda")
    places = [i for i, a in enumerate(args) if isinstance(a, Tensor)]

    def call(*tensors: Tensor) -> Any:
        filled = list(args)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        return _library.OPS[op](*filled)

    def fresh(scale: float) -> tuple[Tensor, ...]:
        return tuple(
            (
                args[i].detach() * scale if args[i].requires_grad else args[i].detach().clone()
            ).requires_grad_(args[i].requires_grad)
            for i in places
        )

    with fastdit.backend("native"):
        graphed = torch.cuda.make_graphed_callables(call, fresh(1.0))
        for scale in (0.5, -1.25):
            tensors = fresh(scale)
            for got, want in zip(
                results(op, tensors, graphed), results(op, tensors, call), strict=True
            ):
                assert torch.equal(got, want)
