"""glu against diffusers' layers and PyTorch's functions, in every option, layout and precision."""

from __future__ import annotations

import pytest
import torch
from op_cases import random
from torch import nn

import fastdit
from fastdit.ops import glu

ACTIVATIONS = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": nn.GELU(approximate="tanh"),
}
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


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


X, APART = torch.ones(2, 3, 8), (torch.ones(2, 8), torch.ones(2, 8))
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
