"""Direct calls past the dispatcher: the same bits, and only where nobody could tell."""

from __future__ import annotations

import contextlib
import dataclasses
import threading

import pytest
import torch
from op_cases import random
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastdit
from fastdit import backends, native, ops, reference
from fastdit.ops import _library

B, N, D = 2, 5, 24


def plain(*shape: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    return random(*shape, dtype=dtype, seed=seed, grad=False)


def arguments(op: str, dtype=torch.float32) -> tuple:
    x, y = plain(B, N, D, dtype=dtype), plain(B, N, D, dtype=dtype, seed=1)
    shift, scale, gate = plain(B, 3 * D, dtype=dtype, seed=2).chunk(3, -1)
    weight, bias = plain(D, dtype=dtype, seed=3), plain(D, dtype=dtype, seed=4)
    return {
        "adaln": (x, shift, scale, weight, bias, 1e-5, "layer", False),
        "gated_adaln": (x, y, gate, None, scale, weight, None, 1e-6, "rms", True),
        "gated_residual": (x, y, gate),
        "bias_gelu": (x, bias),
        "glu": (x, None, bias, "silu", True),
    }[op]


OPS = ("adaln", "gated_adaln", "gated_residual", "bias_gelu", "glu")
every_op = pytest.mark.parametrize("op", OPS)


@pytest.fixture(scope="module", autouse=True)
def library():
    try:
        native.load()
    except native.NativeError as error:
        pytest.skip(f"no compiled library: {error}")
    backends.kernels_for("adaln", "cpu")
    if backends.direct_calls["adaln"] is backends._no_direct_call:
        pytest.skip("this PyTorch or this Python allows no direct call")


def outputs(result) -> tuple[torch.Tensor, ...]:
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


@every_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_direct_calls_compute_what_the_op_does(op, dtype):
    args = arguments(op, dtype)
    direct = outputs(backends.direct_calls[op](*args))
    through = outputs(getattr(torch.ops.fastdit_native, op)(*args))
    for got, want in zip(direct, through, strict=False):
        assert torch.equal(got, want)
        assert got.is_contiguous()
        assert not got.requires_grad


def test_a_large_call_lets_other_threads_run():
    x, bias = plain(1, 4000, 1000), plain(1000)
    want = torch.ops.fastdit_native.bias_gelu(x, bias)
    got = []
    others = [threading.Thread(target=lambda: got.append(ops.bias_gelu(x, bias))) for _ in range(3)]
    for thread in others:
        thread.start()
    for thread in others:
        thread.join()
    assert len(got) == 3
    assert all(torch.equal(g, want) for g in got)


class _Subclass(torch.Tensor):
    pass


def _negative(x):
    view = torch.complex(torch.zeros_like(x), x).conj().imag
    assert view.is_neg()
    return view


REPLACED = {
    "float64": lambda x: x.double(),
    "integers": lambda x: x.long(),
    "another device": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "a subclass": lambda x: x.as_subclass(_Subclass),
    "a lazily negated view": _negative,
    "differentiated": lambda x: x.requires_grad_(),
    "no tensor": lambda x: x.tolist(),
    "another shape": lambda x: x[..., :-1].clone(),
}


@every_op
@pytest.mark.parametrize("what", REPLACED)
def test_they_refuse_what_they_cannot_do(op, what):
    """Any tensor argument, replaced; the public function then raises or does it otherwise."""
    args = arguments(op)
    for position, value in enumerate(args):
        if isinstance(value, torch.Tensor):
            changed = list(args)
            changed[position] = REPLACED[what](value.clone())
            answer = NotImplemented if what == "differentiated" else None
            assert backends.direct_calls[op](*changed) is answer, position


@pytest.mark.parametrize(
    ("position", "value"),
    [(5, -1.0), (5, float("nan")), (5, "small"), (6, "batch"), (6, None), (7, 1), (7, None)],
)
def test_they_refuse_wrong_options(position, value):
    args = list(arguments("adaln"))
    args[position] = value
    assert backends.direct_calls["adaln"](*args) is None
    assert backends.direct_calls["adaln"](*args[:-1]) is None


def test_they_refuse_what_is_not_contiguous_or_empty():
    direct = backends.direct_calls["adaln"]
    rest = arguments("adaln")[1:]
    assert direct(plain(N, B, D).transpose(0, 1), *rest) is None
    assert direct(torch.zeros(B, 0, D), *rest) is None
    strided = plain(B, 2 * D)[:, ::2]
    assert torch.equal(
        direct(plain(B, N, D), strided, strided, *rest[2:]),
        torch.ops.fastdit_native.adaln(plain(B, N, D), strided, strided, *rest[2:])[0],
    )


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        seen.append(str(function))
        return function(*args, **(kwargs or {}))


class _Function(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        seen.append(str(function))
        return function(*args, **(kwargs or {}))


seen: list[str] = []


@every_op
@pytest.mark.parametrize("mode", [_Dispatch, _Function])
def test_a_mode_sees_the_op(op, mode):
    seen.clear()
    args = arguments(op)
    with mode():
        assert backends.direct_calls[op](*args) is None
        getattr(torch.ops.fastdit, op)(*args)
    assert any(op in name for name in seen)


def test_traces_and_profiles_see_the_op():
    x, bias = plain(3, D), plain(D)
    traced = torch.jit.trace(lambda x: ops.bias_gelu(x, bias), (x,))
    assert torch.equal(traced(2 * x), ops.bias_gelu(2 * x, bias))
    with torch.profiler.profile() as profile:
        ops.bias_gelu(x, bias)
    assert any("bias_gelu" in event.key for event in profile.key_averages())


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode, contextlib.nullcontext])
def test_gradients_are_not_lost(grad):
    """Parameters are differentiated where gradients are on, and run directly where not."""
    x, gate = torch.nn.Parameter(plain(B, N, D)), plain(B, D)
    with grad():
        out = ops.gated_residual(x, x, gate)
        left = backends.direct_calls["gated_residual"](x, x, gate) is NotImplemented
        assert left == torch.is_grad_enabled()
        assert out.requires_grad == torch.is_grad_enabled()
        assert type(out) is torch.Tensor


@every_op
def test_autograd_calls_the_kernels_and_their_backward(op, monkeypatch):
    """Under "native" at any size, under "auto" where it is faster: gradients of the reference,
    once, by the kernel's own backward."""
    args = tuple(
        a.clone().requires_grad_() if isinstance(a, torch.Tensor) else a for a in arguments(op)
    )
    leaves = [a for a in args if isinstance(a, torch.Tensor)]
    backward = backends.kernels_for(f"{op}_backward", "cpu")[0]
    ran = []
    seeing = dataclasses.replace(backward, run=lambda *a: ran.append(op) or backward.run(*a))
    monkeypatch.setitem(backends._kernels, (f"{op}_backward", "cpu"), [seeing])
    with fastdit.backend("native"):
        out = outputs(_library.OPS[op](*args))
    eager = outputs(getattr(reference, op)(*args))
    dout = [plain(*e.shape, seed=8) for e in eager]
    got = torch.autograd.grad(out, leaves, dout, create_graph=True)
    assert ran == [op]
    for g, e in zip(got, torch.autograd.grad(eager, leaves, dout), strict=True):
        torch.testing.assert_close(g, e)
    with pytest.raises(RuntimeError, match=f"{op}_backward cannot be differentiated"):
        sum(g.sum() for g in got).backward()
    choice = backends._choice(op, "cpu", args)
    assert choice.runs == "reference"
    assert "eager PyTorch is faster below" in choice.rejected[0][1]


@every_op
def test_they_compile_without_graph_breaks(op):
    torch.compiler.reset()
    x, *rest = arguments(op)[:3]
    call = getattr(ops, op)
    compiled = torch.compile(lambda x: call(x, *rest), fullgraph=True, backend="aot_eager")
    for got, want in zip(outputs(compiled(x)), outputs(call(x, *rest)), strict=True):
        assert torch.equal(got, want)


def test_the_reference_is_kept_to():
    x, bias = plain(3, D), plain(D)
    with fastdit.backend("reference"):
        assert backends.direct_calls["bias_gelu"](x, bias) is None
        assert torch.equal(ops.bias_gelu(x, bias), reference.bias_gelu(x, bias))


# ---- transforms of torch.func, which kernels know nothing of -------------------------------------


@every_op
def test_transforms_run_the_reference(op):
    x, *rest = arguments(op)[:3]

    def last(x):
        return outputs(getattr(ops, op)(x, *rest))[-1]

    def eager(x):
        with fastdit.backend("reference"):
            return last(x)

    for transformed in (
        lambda f: torch.func.jvp(f, (x,), (x.cos(),))[1],
        lambda f: torch.func.vjp(f, x)[1](f(x).cos())[0],
        lambda f: torch.func.grad(lambda x: f(x).square().sum())(x),
        lambda f: torch.vmap(f)(torch.stack([x, x.sin()])),
    ):
        torch.testing.assert_close(transformed(last), transformed(eager))
