"""glu against diffusers' layers and PyTorch's functions, in every option, layout and precision."""

from __future__ import annotations

import pytest
import torch
from op_cases import random
from torch import nn

import fastdit
from fastdit import backends
from fastdit.ops import glu

ACTIVATIONS = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": nn.GELU(approximate="tanh"),
}
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)

X, APART = torch.ones(2, 3, 8), (torch.ones(2, 8), torch.ones(2, 8))


def plain(*shape, seed=0, dtype=torch.float32):
    return random(*shape, dtype=dtype, seed=seed, grad=False)


@every_activation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_equals_torchs_functions(activation, dtype, backend):
    x, bias = 3 * plain(2, 30, 16, seed=0), plain(16, seed=1)
    x, bias = x.to(dtype), bias.to(dtype)
    first, second = (x + bias).chunk(2, -1)
    act = ACTIVATIONS[activation]
    tolerance = {"rtol": 3 * torch.finfo(dtype).eps, "atol": 3 * torch.finfo(dtype).eps}
    with fastdit.backend(backend):
        for gate_first, wanted in ((True, act(first) * second), (False, act(second) * first)):
            out = glu(x, None, bias, activation, gate_first)
            torch.testing.assert_close(out, wanted, **tolerance)
        apart = glu(first, second, activation=activation)
        torch.testing.assert_close(apart, act(first) * second, **tolerance)
        if backend == "reference":
            assert torch.equal(glu(x, None, bias, activation), act(first) * second)


@pytest.mark.parametrize(("layer", "activation"), [("GEGLU", "gelu"), ("SwiGLU", "silu")])
def test_is_what_diffusers_computes(layer, activation):
    activations = pytest.importorskip("diffusers.models.activations")
    theirs = getattr(activations, layer)(6, 40)
    x = plain(2, 500, 6)
    h = nn.functional.linear(x, theirs.proj.weight)
    with fastdit.backend("native"), torch.no_grad():
        out = glu(h, None, theirs.proj.bias, activation, gate_first=False)
    torch.testing.assert_close(out, theirs(x))


@every_activation
def test_gradients_are_autograds(activation):
    """Of the packed projection and its bias, and of two tensors."""
    x, bias, dout = plain(4, 5, 12), plain(12, seed=1), plain(4, 5, 6, seed=2)
    gradients = []
    for backend in ("native", "reference"):
        leaves = [t.clone().requires_grad_() for t in (x, bias, *x.chunk(2, -1))]
        with fastdit.backend(backend):
            packed = glu(leaves[0], None, leaves[1], activation, gate_first=False)
            gradients.append(torch.autograd.grad(packed + glu(*leaves[2:], None), leaves, dout))
    for ours, eagers in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, eagers)


@every_activation
def test_over_all_magnitudes(activation):
    """Every 997th float32 that is finite, against float64."""
    z = torch.arange(0, 2**32, 997, dtype=torch.int64).to(torch.uint32).view(torch.float32)
    z = z[z.isfinite()]
    out, exact = (
        glu(z, torch.ones_like(z), activation=activation),
        ACTIVATIONS[activation](z.double()),
    )
    error = (out - exact).abs()
    assert (error <= 3e-7 * exact.abs() + 4e-7 * (z.abs() < 16) + 1e-35).all()


def test_any_layout_is_read_as_its_dense_copy():
    wide, bias = plain(3, 4, 50), plain(40, seed=1)[::2]
    slices = [wide[..., 7:27], wide[:, ::2, 7:27], wide.transpose(0, 1)[..., 7:27]]
    for x in [*slices, wide[..., ::2][..., :20], wide[:1, :1, :20].expand(3, 4, 20)]:
        dense = x.contiguous()
        with fastdit.backend("native"):
            out = glu(x, None, bias, gate_first=False)
            assert torch.equal(out, glu(dense, None, bias.contiguous(), gate_first=False))
            assert out.is_contiguous()
            assert torch.equal(glu(x[..., :10], x[..., 10:]), glu(dense))


def test_accepts_autocasts_mixture_and_nothing_at_all():
    mixed = glu(plain(2, 3, 8).bfloat16(), None, plain(8, seed=1))
    assert (mixed.shape, mixed.dtype) == ((2, 3, 4), torch.bfloat16)
    for backend in ("native", "reference"):
        with fastdit.backend(backend):
            assert glu(torch.zeros(0, 8), None, torch.ones(8)).shape == (0, 4)
            assert glu(torch.zeros(3, 0)).shape == (3, 0)
            x, bias = torch.zeros(0, 8, requires_grad=True), torch.ones(8, requires_grad=True)
            glu(x, None, bias).sum().backward()
            assert torch.equal(bias.grad, torch.zeros(8))


def test_small_calls_that_are_differentiated_are_eagers():
    """An autograd node in Python costs more than they take; `explain` tells it."""
    small, large, bias = plain(2, 8), plain(200, 200), plain(8)
    assert fastdit.explain("glu", small)[0].runs != "reference"
    assert "eager PyTorch is faster" in str(fastdit.explain("glu", small.requires_grad_()))
    assert "eager PyTorch is faster" in str(fastdit.explain("glu", small, None, bias))
    assert fastdit.explain("glu", large.requires_grad_())[0].runs != "reference"


@pytest.mark.parametrize("rows", [1, 30, 300])
@pytest.mark.parametrize("biased", [False, True])
def test_a_differentiated_call_runs_what_explain_tells(rows, biased):
    """A bias is worth the kernel from fewer elements on than none is."""
    x, bias = plain(rows, 160).requires_grad_(), plain(160) if biased else None
    out = glu(x, None, bias)
    kernel = type(out.grad_fn).__name__ == "gluBackward"
    assert kernel == (fastdit.explain("glu", x, None, bias)[0].runs == "csrc")
    assert kernel == (x.numel() >= (2048 if biased else 32768))
    with fastdit.backend("native"):
        assert type(glu(x, None, bias).grad_fn).__name__ == "gluBackward"


# ---- direct calls, past the dispatcher -----------------------------------------------------------


@pytest.fixture(scope="module")
def direct():
    kernels = backends.kernels_for("glu", "cpu")
    if not kernels or not kernels[0].direct:
        pytest.skip("no compiled library, or this PyTorch or this Python allows no direct call")
    return kernels[0].direct


@every_activation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gate_first", [True, False])
def test_direct_calls_have_the_ops_bits(direct, activation, dtype, gate_first):
    """Packed and apart, any bias, in every layout whose rows are one stride apart."""
    wide, options = plain(3, 4, 50, dtype=dtype), (activation, gate_first)
    biases = [None, plain(40, seed=1)[::2], plain(20, seed=1, dtype=torch.float16)]
    for x in (wide[..., 7:27], wide[:1, :1, 7:27].expand(3, 4, 20), wide[0, 0, 7:27], wide[:, :1]):
        fitting = [b for b in biases if b is None or x.shape[-1] == 20]
        calls = [(x, None, bias) for bias in fitting]
        calls += [(*x.chunk(2, -1), None), (x, x.flip(-1), None)] if gate_first else []
        for args in calls:
            want = torch.ops.fastdit_native.glu(*args, *options)
            given = torch.full_like(want, torch.nan)
            got = direct(*args, *options)
            assert got.is_contiguous()
            assert torch.equal(got, want)
            assert direct(*args, *options, given) is given
            assert torch.equal(given, want)


def test_direct_calls_replace_gate_or_up_where_they_are_two(direct):
    x, up = plain(3, 4, 10), plain(3, 4, 10, seed=1)
    want = glu(x, up)
    for which in range(2):
        own = [x.clone(), up.clone()]
        assert direct(*own, None, "silu", True, own[which]) is own[which]
        assert torch.equal(own[which], want)
    square = x * torch.nn.functional.silu(x)
    torch.testing.assert_close(direct(x, x, None, "silu", True, x), square)
    strided = plain(3, 20)[:, :10]
    packed = plain(3, 20)
    for args, out in (
        ((strided, strided.clone()), strided),  # no dense result
        ((packed[:, :10], packed[:, 10:]), packed[:, :10]),
        ((packed, None), packed.view(-1)[:30].view(3, 10)),
        ((packed, None), packed),
        ((packed, None), torch.empty(3, 10).double()),
        ((packed, None), torch.empty(3, 10, requires_grad=True)),
    ):
        before = [a.clone() for a in args if a is not None]
        answer = direct(*args, None, "silu", True, out)
        assert answer is (NotImplemented if out.requires_grad else None)
        assert all(map(torch.equal, before, (a for a in args if a is not None)))


def test_an_activation_is_known_by_its_letters(direct):
    spelled = "".join(["gelu", "_", "tanh"])
    assert torch.equal(direct(X, None, None, spelled, True), glu(X, activation="gelu_tanh"))


class Comparing:
    def __eq__(self, other):
        raise RuntimeError("no comparison")

    __hash__ = None


@pytest.mark.parametrize(
    "args",
    [
        (X[..., :7], None, None, "silu", True),  # an odd width
        (X.transpose(0, 1), None, None, "silu", True),  # rows of two strides
        (X[..., ::2], None, None, "silu", True),  # rows that are not dense
        (X.double(), None, None, "silu", True),
        (X[:0], None, None, "silu", True),
        (torch.ones([1] * 8 + [2]), None, None, "silu", True),
        (torch.tensor(1.0), None, None, "silu", True),
        (X, None, torch.ones(4), "silu", True),
        (X, None, torch.ones(1, 8), "silu", True),
        (X, X[:1], None, "silu", True),
        (X, X.bfloat16(), None, "silu", True),
        (X, X, torch.ones(8), "silu", True),
        (X, X, None, "silu", False),
        (X, None, None, "relu", True),
        (X, None, None, None, True),
        (X, None, None, Comparing(), True),
        (X, None, None, "silu", 1),
        (X, None, None, "silu"),
        (X, None, None, "silu", True, None, None),
        (X, None, None, "silu", True, X),
        (X, None, None, "silu", True, "out"),
    ],
)
def test_direct_calls_refuse_what_they_cannot_do(direct, args):
    assert direct(*args) is None
    assert direct(X, None, None, "silu", True) is not None  # no error was left behind


WRONG = [
    ((torch.ones(2, 7),), r"x: got \(2, 7\).*allowed is an even last axis"),
    ((torch.ones(2, 8, dtype=torch.int32),), "x: got .*int32.*allowed is a floating-point tensor"),
    ((X, torch.ones(2, 3, 7)), r"up: got \(2, 3, 7\).*allowed is \(2, 3, 8\) float32"),
    ((X, X.double()), "up: got .*float64.*allowed is .*float32"),
    ((X, None, torch.ones(4)), r"bias: got \(4,\).*allowed is \(8,\)"),
    ((X, None, torch.ones(8, dtype=torch.long)), "bias: got .*int64"),
    ((*APART, torch.ones(8)), "bias: got .*allowed is None where up is a tensor of its own"),
    ((*APART, None, "silu", False), "gate_first: got False, allowed is True where up is"),
    ((X, None, None, "relu"), "activation: got 'relu', allowed is 'silu', 'gelu', 'gelu_tanh'"),
    ((X, None, None, "silu", 1), "gate_first: got 1, allowed is True or False"),
]


@pytest.mark.parametrize(("args", "message"), WRONG)
def test_wrong_arguments_are_named(args, message):
    with pytest.raises(ValueError, match=message):
        glu(*args)
    with pytest.raises(TypeError, match="x: got list, allowed is a tensor"):
        glu([1.0])
