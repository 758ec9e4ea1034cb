"""What every op promises: a schema PyTorch accepts, true fakes, its reference's gradients."""

from __future__ import annotations

import pytest
import torch
from op_cases import case_ids, cases
from torch import Tensor

import fastdit
from fastdit import backends, reference
from fastdit.ops import _library

FORWARD = range(len(case_ids()))
every_case = pytest.mark.parametrize("index", FORWARD, ids=case_ids())


def case(index: int, dtype: torch.dtype = torch.float32) -> tuple[str, tuple]:
    op, _special, args = list(cases(dtype))[index]
    return op, args


def overload(op: str):
    return getattr(torch.ops.fastdit, op).default


def outputs(result) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def differentiable(args: tuple) -> list[Tensor]:
    return [a for a in args if isinstance(a, Tensor) and a.requires_grad]


def gradients(function, args: tuple, seed: int = 11) -> list[Tensor]:
    """Gradients of a random linear functional of all differentiable outputs."""
    result = [out for out in outputs(function(*args)) if out.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(r.shape, generator=generator).to(r) for r in result]
    return torch.autograd.grad(result, differentiable(args), cotangents)


def test_every_op_has_cases_a_reference_and_a_public_function():
    covered = {op for op, _special, _args in cases()}
    assert covered == set(backends.OPS) == set(fastdit.ops.__all__) == set(_library.OPS)
    assert all(callable(getattr(reference, op)) for op in covered)


@every_case
def test_opcheck(index):
    op, args = case(index)
    report = torch.library.opcheck(overload(op), args)
    assert set(report.values()) == {"SUCCESS"}


def in_float64(args: tuple) -> tuple:
    floating = [isinstance(a, Tensor) and a.is_floating_point() for a in args]
    return tuple(a.detach().double() if f else a for a, f in zip(args, floating, strict=True))


@every_case
def test_the_op_computes_its_reference_and_the_fake_tells_its_layout(index):
    op, args = case(index)
    with fastdit.backend("reference"):
        got, want = outputs(overload(op)(*args)), outputs(getattr(reference, op)(*args))
    with torch._subclasses.FakeTensorMode() as mode:
        fake_args = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args]
        fakes = outputs(overload(op)(*fake_args))
    for g, w in zip(got, want, strict=False):
        torch.testing.assert_close(g, w, rtol=0, atol=0)
        assert w.is_contiguous()
    for outs in (got, outputs(overload(op)(*args))):
        for g, f in zip(outs, fakes, strict=True):
            assert (f.shape, f.stride(), f.dtype) == (g.shape, g.stride(), g.dtype)
            assert g.is_contiguous()


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_kernel_is_no_less_exact_than_eager(index, dtype):
    """Its error against float64 is at most 1.25 times eager's, the largest of a few hundred
    elements in each, and half a unit in float32's last place."""
    op, args = case(index, dtype)
    if backends.select(op, "cpu", args) is None:
        pytest.skip("no kernel is registered for this call")
    definition = getattr(reference, op)
    truth = outputs(definition(*in_float64(args)))
    for g, e, t in zip(
        outputs(overload(op)(*args)), outputs(definition(*args)), truth, strict=False
    ):
        floor = torch.finfo(torch.float32).eps / 2 * t.abs().max()
        assert (g.double() - t).abs().max() <= 1.25 * (e.double() - t).abs().max() + floor


@every_case
def test_written_gradients_are_those_of_the_reference(index):
    op, args = case(index, torch.float64)
    written = gradients(overload(op), args)
    automatic = gradients(getattr(reference, op), args)
    for w, a in zip(written, automatic, strict=True):
        torch.testing.assert_close(w, a, rtol=1e-10, atol=1e-10)


@every_case
def test_gradcheck(index):
    op, args = case(index, torch.float64)
    assert torch.autograd.gradcheck(overload(op), args, fast_mode=True)


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_low_precision_gradients_keep_dtype_and_accuracy(index, dtype):
    """The written backward rounds once, at its end: its error is that of one rounding."""
    op, args = case(index, dtype)
    exact_args = [
        a.detach().double().requires_grad_(a.requires_grad)
        if isinstance(a, Tensor) and a.dtype == dtype
        else a
        for a in args
    ]
    low = gradients(overload(op), args)
    exact = gradients(overload(op), tuple(exact_args))
    for gradient, truth, leaf in zip(low, exact, differentiable(args), strict=True):
        assert gradient.dtype == leaf.dtype == dtype
        unit = torch.finfo(dtype).eps
        error = (gradient.double() - truth).abs().max()
        # gated_adaln normalises h as it was stored, rounded: a second rounding, amplified by rstd.
        assert error <= 4 * unit * truth.abs().max() + 1e-6


@every_case
def test_compiles_without_graph_breaks_for_any_batch(index):
    torch.compiler.reset()
    op, args = case(index)
    compiled = torch.compile(overload(op), fullgraph=True, backend="aot_eager", dynamic=True)
    for g, w in zip(outputs(compiled(*args)), outputs(overload(op)(*args)), strict=True):
        torch.testing.assert_close(g, w)
    for g, w in zip(gradients(compiled, args), gradients(overload(op), args), strict=True):
        torch.testing.assert_close(g, w)
