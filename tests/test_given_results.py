"""`out=`: results written into tensors that the caller gives, by every implementation alike."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import re

import pytest
import torch
from given_cases import (
    DTYPES,
    OPS,
    TAKEN,
    arguments,
    as_out,
    call,
    copied,
    empty,
    every_op,
    named,
    plain,
    results,
    returned,
    tensors,
)
from op_cases import D, N
from torch import Tensor

import fastdit
from fastdit import backends, ops


@every_op
@pytest.mark.parametrize("backend", backends.BACKENDS)
@pytest.mark.parametrize("stream", DTYPES, ids=str)
@pytest.mark.parametrize("other", DTYPES, ids=str)
def test_the_given_tensors_get_the_ops_own_bits(op, backend, stream, other):
    args = arguments(op, stream, other)
    if backend == "native" and torch.float64 in (stream, other):
        pytest.skip("no kernel computes in float64")
    with fastdit.backend(backend):
        want, got = tensors(call(op, **args)), returned(op, args)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


PLACES = [
    (op, names) for op in OPS for names in itertools.product(*[(*TAKEN[op], None)] * results(op))
]
PLACES = [
    (op, names)
    for op, names in PLACES
    if len(set(names) - {None}) == len(names) - names.count(None)
]


@pytest.mark.parametrize(("op", "names"), PLACES, ids=str)
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("per_token", [False, True], ids=["sample", "token"])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_a_result_may_replace_what_it_is_made_of(op, names, backend, per_token, dtype):
    args = arguments(op, dtype, per_token=per_token)
    with fastdit.backend(backend):
        want = tensors(call(op, **args))
        for seed in range(2):  # the second is given other numbers in the same memory
            own = copied(args)
            outs = tuple(
                own[n] if n else new for n, new in zip(names, empty(op, args), strict=True)
            )
            got = tensors(call(op, **own, out=as_out(outs)))
            for g, w, out in zip(got, want, outs, strict=True):
                assert g is out, seed
                assert torch.equal(g, w)


@pytest.mark.parametrize("op", [op for op in OPS if op not in ("glu, packed", "diffusion_step")])
def test_large_calls_on_many_threads_work_in_place(op):
    """Rows are shared among threads, and let other threads run."""
    x, y = plain(3, 400, 96), plain(3, 400, 96, seed=1)
    args = arguments(op) | {"x": x} | {k: y for k in ("y", "up") if k in arguments(op)}
    for name, value in args.items():
        if value.dim() == 2 or value.dim() == 1:
            lead = (3,) if value.dim() == 2 else ()
            args[name] = plain(*lead, 96, seed=len(name))
    want = tensors(call(op, **args))
    own = copied(args)
    names = TAKEN[op][: results(op)]
    got = tensors(call(op, **own, out=as_out(tuple(own[name] for name in names))))
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_x0_may_be_left_out():
    args = arguments("diffusion_step")
    want, x0 = ops.diffusion_step(**args)
    for backend in ("auto", "reference"):
        with fastdit.backend(backend):
            want, _x0 = ops.diffusion_step(**args)
            got, left_out = ops.diffusion_step(**args, need_x0=False)
            assert left_out is None
            assert torch.equal(got, want)
            out = torch.empty_like(x0)
            again = ops.diffusion_step(**args, need_x0=False, out=(out, None))
            assert again[0] is out
            assert again[1] is None
            assert torch.equal(out, want)
    x = args["x"].clone().requires_grad_()
    ops.diffusion_step(**args | {"x": x}, need_x0=False)[0].sum().backward()
    assert x.grad is not None


def refuses(message: str, error=ValueError):
    return pytest.raises(error, match=re.escape(message))


@every_op
@pytest.mark.parametrize("position", [0, 1])
def test_wrong_tensors_are_named(op, position):
    args = arguments(op)
    if position >= results(op):
        pytest.skip("one result")
    x = empty(op, args)[0]
    name = "out" if results(op) == 1 else f"out[{position}]"
    allowed = f"allowed is {tuple(x.shape)} float32 on cpu"
    for wrong, got in {
        "shape": (torch.empty(x.shape[:-1]), f"{tuple(x.shape[:-1])} float32 on cpu"),
        "dtype": (x.double(), f"{tuple(x.shape)} float64 on cpu"),
        "device": (x.to("meta"), f"{tuple(x.shape)} float32 on meta"),
        "layout": (torch.empty(*x.shape, 2)[..., 0], "with strides"),
    }.values():
        outs = list(empty(op, args))
        outs[position] = wrong
        with pytest.raises(
            ValueError, match=f"^{re.escape(name)}: got .*{re.escape(got)}"
        ) as raised:
            call(op, **args, out=as_out(tuple(outs)))
        assert allowed in str(raised.value) or "a contiguous tensor" in str(raised.value)
    outs = list(empty(op, args))
    outs[position] = 3
    with refuses(f"{name}: got int, allowed is a tensor", TypeError):
        call(op, **args, out=as_out(tuple(outs)))


@pytest.mark.parametrize("op", ["gated_adaln", "diffusion_step"])
def test_two_results_are_two_tensors(op):
    args = arguments(op)
    one = torch.empty_like(args["x"])
    with refuses("out: got Tensor, allowed is a tuple (", TypeError):
        call(op, **args, out=torch.stack([one, one]))
    with refuses("out: got 1 of them, allowed is a tuple (", TypeError):
        call(op, **args, out=(one,))
    with refuses("out[1]: got a tensor that overlaps out[0]"):
        call(op, **args, out=(one, one))
    second = [torch.empty_like(one), one]
    assert all(g is o for g, o in zip(call(op, **args, out=second), second, strict=True))


def test_x0_is_given_where_it_is_wanted():
    args = arguments("diffusion_step")
    one, two = (torch.empty_like(args["x"]) for _ in range(2))
    with refuses("out[1]: got NoneType, allowed is a tensor", TypeError):
        ops.diffusion_step(**args, out=(one, None))
    with refuses("out[1]: got Tensor, allowed is None where x0 is not wanted", TypeError):
        ops.diffusion_step(**args, out=(one, two), need_x0=False)
    with refuses("need_x0: got 1, allowed is True or False"):
        ops.diffusion_step(**args, need_x0=1)


@every_op
def test_no_other_overlap_is_taken(op):
    """Shifted by one element, by a permutation, into another input: all are refused, untouched."""
    args = arguments(op)
    x, like = args["x"], empty(op, args)[0]
    allowed = " or ".join(f"all of a contiguous {name}" for name in TAKEN[op])
    allowed += ", or no input's memory" if allowed else "no input's memory"
    name = "out" if results(op) == 1 else "out[0]"

    def refused(own: dict, out: Tensor, source: str) -> None:
        before = {k: v.clone() for k, v in own.items() if isinstance(v, Tensor)}
        outs = (out, *[torch.empty_like(x) for _ in range(results(op) - 1)])
        with refuses(f"{name}: got a tensor that overlaps {source}, allowed is {allowed}"):
            call(op, **own, out=as_out(outs))
        assert all(torch.equal(own[k], v) for k, v in before.items())

    room = torch.cat([x.flatten(), x.flatten()[:1]])
    shifted = room[1:][: like.numel()].view(like.shape)
    refused(args | {"x": room[:-1].view(x.shape)}, shifted, "x")
    for source, value in args.items():
        if isinstance(value, Tensor) and source not in TAKEN[op] and value.is_floating_point():
            memory = torch.zeros(like.numel() + value.numel())
            own = args | {source: memory[: value.numel()].view(value.shape).copy_(value)}
            start = value.numel() - 1
            refused(own, memory[start : start + like.numel()].view(like.shape), source)
    if op in ("gated_residual", "gated_adaln"):
        square = plain(N, N, D)
        turned = args | {"x": square.clone(), "y": square.transpose(0, 1)}
        turned |= {
            k: v[:1].expand(N, D) for k, v in args.items() if k in ("gate", "shift", "scale")
        }
        outs = (square, *[torch.empty_like(square) for _ in range(results(op) - 1)])
        with refuses(f"{name}: got a tensor that overlaps y"):
            call(op, **turned, out=as_out(outs))


@every_op
@pytest.mark.parametrize("which", ["argument", "out"])
def test_gradients_are_refused_in_pytorchs_words(op, which):
    args = arguments(op)
    outs = empty(op, args)
    if which == "argument":
        last = [k for k, v in args.items() if isinstance(v, Tensor) and v.is_floating_point()][-1]
        args[last] = args[last].clone().requires_grad_()
    else:
        outs[-1].requires_grad_()
    message = (
        f"{named(op)}(): functions with out=... arguments don't support automatic differentiation"
    )
    for backend in ("auto", "reference"):
        with fastdit.backend(backend), refuses(message, RuntimeError):
            call(op, **args, out=as_out(outs))
    with torch.no_grad():
        call(op, **args, out=as_out(outs))
    assert not any(out.isnan().any() for out in outs)


@every_op
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_backward_notices_that_its_tensor_was_replaced(op, backend):
    args = arguments(op)
    saved = args["x"] if "x" in TAKEN[op] else empty(op, args)[0]
    leaf = plain(*saved.shape, seed=9).requires_grad_()
    product = (leaf * saved).sum()
    rest = [torch.empty_like(saved) for _ in range(results(op) - 1)]
    with torch.no_grad(), fastdit.backend(backend):
        call(op, **args, out=as_out((saved, *rest)))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@every_op
def test_inference_mode_has_tensors_of_its_own(op):
    args = arguments(op)
    want = tensors(call(op, **args))
    with torch.inference_mode():
        outs = tuple(torch.empty_like(w) for w in want)
        call(op, **args, out=as_out(outs))
    assert all(torch.equal(g, w) for g, w in zip(outs, want, strict=True))


@every_op
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_they_compile_in_place(op, backend):
    torch.compiler.reset()
    args = arguments(op)
    x = args.pop("x")
    first = 0 if "x" in TAKEN[op] else 1  # of x and another tensor the one that is written to

    def step(x: Tensor, other: Tensor):
        outs = (x, other)[first:][: results(op)]
        return call(op, x=x, **args, out=as_out(outs))

    with fastdit.backend(backend):
        want = tensors(call(op, x=x, **args))
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        own, other = x.clone(), torch.empty_like(want[-1])
        got = tensors(compiled(own, other))
    for g, w, out in zip(got, want, (own, other)[first:], strict=False):
        assert torch.equal(g, w)
        assert torch.equal(out, w)


@every_op
def test_fake_and_meta_tensors_and_vmap(op):
    args = arguments(op)
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in args.items()}
        returned(op, fakes)
    metas = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in args.items()}
    returned(op, metas)

    def mapped(x: Tensor, *outs: Tensor):
        return call(op, **args | {"x": x}, out=as_out(outs))

    xs = torch.stack([args["x"], args["x"].sin()])
    outs = tuple(torch.stack([out, out]) for out in empty(op, args))
    got = tensors(torch.vmap(mapped)(xs, *outs))
    for index, x in enumerate(xs):
        for g, out, want in zip(got, outs, tensors(call(op, **args | {"x": x})), strict=True):
            torch.testing.assert_close(g[index], want)
            torch.testing.assert_close(out[index], want)


@every_op
def test_empty_batches(op):
    args = arguments(op)
    batch = len(args["x"])
    short = {}
    for name, value in args.items():
        if isinstance(value, Tensor) and value.dim() and len(value) in (batch, 2 * batch):
            value = value[:0]
        short[name] = value
    returned(op, short)


@every_op
def test_a_kernel_that_takes_out_is_given_it(op):
    """As the Triton kernels do: no copy is made where it writes there, one where it does not."""
    args = arguments(op)
    want = tensors(call(op, **args))
    (own, *_rest) = backends.kernels_for(named(op), "cpu") or [None]
    if own is None:
        pytest.skip("no compiled library")
    asked = []

    def run(*schema_args, out=None):
        made = tensors(own.run(*schema_args))
        asked.append(out)
        return made if results(op) > 1 or op == "adaln" else made[0]

    kernel = dataclasses.replace(own, run=run, direct=None, takes_out=True)
    outs = empty(op, args)
    with backends.replaced(named(op), "cpu", [kernel]):
        got = tensors(call(op, **args, out=as_out(outs)))
    assert asked == [as_out(outs)]
    assert all(g is o and torch.equal(g, w) for g, o, w in zip(got, outs, want, strict=True))


@every_op
def test_a_backward_notices_a_kernel_that_pytorch_does_not_see(op):
    """A Triton kernel writes to an address: the version counter is told, or nobody would be."""
    args = arguments(op)
    (own, *_rest) = backends.kernels_for(named(op), "cpu") or [None]
    if own is None:
        pytest.skip("no compiled library")

    def run(*schema_args, out=None):
        made = tensors(own.run(*schema_args))
        for to, value in zip(tensors(out), made, strict=False):
            to.data.copy_(value)
        return (out, *made[1:]) if op == "adaln" else out

    kernel = dataclasses.replace(own, run=run, direct=None, takes_out=True)
    outs = empty(op, args)
    before = [out._version for out in outs]
    with backends.replaced(named(op), "cpu", [kernel]):
        call(op, **args, out=as_out(outs))
    assert all(out._version > old for out, old in zip(outs, before, strict=True))


@every_op
def test_explain_takes_it(op):
    args = arguments(op)
    (choice,) = fastdit.explain(named(op), **args, out=as_out(empty(op, args)))
    assert choice.op == named(op)
    assert "out" in inspect.signature(getattr(ops, named(op))).parameters
