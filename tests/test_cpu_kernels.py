"""The compiled CPU kernels of the row-wise ops, on every instruction set here."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from op_cases import random
from torch import Tensor

from fastdit import backends, native, ops, reference

B, N = 2, 7
WIDTHS = (5, 24, 193)  # less than a vector, whole vectors of 8, a tail after many
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module", autouse=True)
def library():
    try:
        native.load()
    except native.NativeError as error:
        pytest.skip(f"no compiled library: {error}")
    backends.kernels_for("adaln", "cpu")


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def isa(request):
    library = torch.ops.fastdit_native
    try:
        library.set_cpu_isa(request.param)
    except RuntimeError as error:
        pytest.skip(str(error).splitlines()[0])
    yield request.param
    library.set_cpu_isa("")


def plain(*shape: int, dtype=torch.float32, seed: int = 0) -> Tensor:
    return random(*shape, dtype=dtype, seed=seed, grad=False)


def outputs(result) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def in_float64(args: tuple) -> tuple:
    return tuple(a.double() if isinstance(a, Tensor) else a for a in args)


def no_less_exact(got, eager, truth, eager_truth=None) -> None:
    """In root mean square, the error is at most eager's or that of one rounding; and a unit of
    float32 in one element, where there are only a few."""
    for g, e, t, te in zip(got, eager, truth, eager_truth or truth, strict=True):
        assert g.shape == e.shape
        assert g.is_contiguous()
        if t.numel():
            assert g.dtype == e.dtype
            rounding = (t.to(g.dtype).double() - t).norm()
            one = torch.finfo(torch.float32).eps * t.abs().max()
            allowed = 1.02 * torch.maximum((e.double() - te).norm(), rounding) + one
            assert (g.double() - t).norm() <= allowed


def check(op: str, *args) -> None:
    definition, kernel = getattr(reference, op), getattr(torch.ops.fastdit_native, op)
    truth = outputs(definition(*in_float64(args)))
    no_less_exact(outputs(kernel(*args)), outputs(definition(*args)), truth)


def check_forward(x, y, gate, *rest) -> tuple[Tensor, Tensor]:
    """adaln and gated_adaln with their statistics. The latter normalises the h that it stored."""
    saving, library = reference.adaln_saving, torch.ops.fastdit_native
    exact = saving(*in_float64((x, *rest)))
    got = library.adaln(x, *rest)
    no_less_exact(got, saving(x, *rest), exact)
    pair = library.gated_adaln(x, y, gate, *rest), reference.gated_adaln_saving(x, y, gate, *rest)
    h = reference.gated_residual(*in_float64((x, y, gate)))
    truths = ([h, *saving(*in_float64((outs[0], *rest)))] for outs in pair)
    no_less_exact(*pair, *truths)
    return got[1], got[2]


def layouts(width: int, dtype: torch.dtype):
    """Modulation shift, scale, gate: absent, strided per sample and per token, in mixtures."""
    sample = plain(B, 6 * width, dtype=dtype, seed=2).chunk(6, -1)
    token = plain(B, N, 6 * width, dtype=dtype, seed=3).chunk(6, -1)
    sparse = plain(B, 2 * width, dtype=dtype, seed=4)[:, ::2]
    yield sample[0], sample[3], sample[5]
    yield token[0], token[3], token[5]
    yield sample[0], token[3], sample[5]
    yield token[0], sample[3], token[5]
    yield None, sparse, sparse
    yield sparse, None, sample[5]


def options(width: int, dtype: torch.dtype):
    weight, bias = plain(width, dtype=dtype, seed=5), plain(width, dtype=dtype, seed=6)
    yield None, None, "layer", True
    yield weight, bias, "layer", False
    yield weight, None, "rms", True


def gated_units(width: int, dtype: torch.dtype, bias_dtype: torch.dtype):
    """glu's arguments: packed in either order, in rows far apart, with sparse biases; and apart."""
    wide = 2 * plain(B, N, 3 * width, dtype=dtype, seed=10)
    bias = plain(2 * width, 2, dtype=bias_dtype, seed=11)[:, 0]
    yield wide[..., : 2 * width], None, bias, "silu", True
    yield wide[..., width:], None, bias.contiguous(), "gelu", False
    yield wide[..., width:].contiguous(), None, None, "gelu_tanh", True
    yield wide[..., :width], wide[..., -width:], None, "silu", True
    transposed = wide.transpose(0, 1).contiguous().transpose(0, 1)
    yield transposed[..., :width], wide[..., -width:], None, "gelu", True


@pytest.mark.parametrize("low", DTYPES[1:], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_option_in_every_mixture_of_dtypes(isa, width, low):
    """x, and y with the modulation, in float32 or less: what the ops allow under autocast."""
    for stream, other in ((torch.float32, low), (low, torch.float32), (low, low)):
        x, y = plain(B, N, width, dtype=stream), plain(B, N, width, dtype=other, seed=1)
        x, y = x + 2 * x[:, :, :1], y.transpose(0, 1).contiguous().transpose(0, 1)
        dout, dh = (plain(B, N, width, dtype=stream, seed=seed) for seed in (7, 8))
        for (shift, scale, gate), (weight, bias, norm, plus_one) in itertools.product(
            layouts(width, other), options(width, stream)
        ):
            rest = (shift, scale, weight, bias)
            check("gated_residual", x, y, gate)
            check("gated_residual_backward", dout, y, gate)
            mean, rstd = check_forward(x, y, gate, *rest, 1e-6, norm, plus_one)
            check("adaln_backward", dout, x, mean, rstd, *rest, norm, plus_one)
            gated = (dh, dout, x, mean, rstd, y, gate, *rest, norm, plus_one)
            check("gated_adaln_backward", *gated)
        bias = plain(width, dtype=other, seed=9)
        check("bias_gelu", x, bias)
        check("bias_gelu_backward", dout, x, bias)
        for args in gated_units(width, stream, other):
            check("glu", *args)
            check("glu_backward", dout, *args)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_every_16_bit_number_is_read_and_rounded_as_torch_does(isa, dtype):
    """To nearest even, with ties, subnormal numbers, infinities and NaN; 0 + 1·y is y."""
    library, one = torch.ops.fastdit_native, torch.ones(1, 2**16)
    halves = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)[None, None]
    read = library.gated_residual(torch.zeros_like(halves, dtype=torch.float32), halves, one)
    torch.testing.assert_close(read, halves.float(), rtol=0, atol=0, equal_nan=True)
    above = halves.float().nextafter(torch.tensor(torch.inf))
    finite = torch.where(halves.isfinite(), halves, 1)
    halfway = (finite.double() + torch.roll(finite, -1).double()).div(2).float()
    for value in (halves.float(), above, halfway, halfway.nextafter(one), torch.randn(1, 1, 2**16)):
        stored = library.gated_residual(torch.zeros_like(halves), value, one)
        torch.testing.assert_close(stored, value.to(dtype), rtol=0, atol=0, equal_nan=True)


# ---- GELU ---------------------------------------------------------------------------------------


def gelu_in_float64(z: np.ndarray) -> np.ndarray:
    t = 2 * np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)
    return z / (1 + np.exp(-t))


def test_gelu_is_within_two_ulp_of_every_magnitude(isa):
    """Floats of every exponent and sign, evenly spaced ones, and the tail down to nothing."""
    rng = np.random.default_rng(0)
    anything = rng.integers(0, 2**32, 2**18, dtype=np.uint32).view(np.float32)
    anything = anything[np.isfinite(anything)]
    near = rng.uniform(-12, 12, 2**18).astype(np.float32)
    edges = np.float32([0, -0.0, 1e-45, -1e-45, 2e38, -2e38, -9.5, -11.5, -10.4])
    z = np.concatenate([anything, near, np.linspace(-11.5, -8, 2**16, dtype=np.float32), edges])
    z = np.append(z, np.nextafter(z, np.float32(0)))
    out = torch.ops.fastdit_native.bias_gelu(torch.from_numpy(z), torch.zeros(len(z))).numpy()
    with np.errstate(over="ignore"):
        exact = gelu_in_float64(z.astype(np.float64))
    error = np.abs(out - exact) / np.maximum(np.abs(exact), 2.0**-126)
    assert error.max() <= 2 * 2.0**-23


def test_gelu_of_nan_and_infinity_is_eagers(isa):
    z = torch.tensor([[float("nan"), float("inf"), float("-inf"), 1.0, -1e30]])
    zero, one = torch.zeros(5), torch.ones(1, 5)
    library = torch.ops.fastdit_native
    want = torch.nn.functional.gelu(z.double(), approximate="tanh").float()
    torch.testing.assert_close(library.bias_gelu(z, zero), want, equal_nan=True)
    got = library.bias_gelu_backward(one, z, zero)[0]
    want = reference.bias_gelu_backward(*(t.double() for t in (one, z, zero)))[0].float()
    torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_glu_is_no_less_exact_than_eager(isa, activation):
    """On enough numbers that the luck of a few does not matter, with no further allowance."""
    x, dout = plain(40, 2000, seed=1), plain(40, 1000, seed=2)
    for op, args in (("glu", ()), ("glu_backward", (dout,))):
        args = (*args, x, None, None, activation, True)
        got = outputs(getattr(torch.ops.fastdit_native, op)(*args))[0]
        eager, truth = (outputs(getattr(reference, op)(*a))[0] for a in (args, in_float64(args)))
        assert (got - truth).norm() <= (eager - truth).norm()


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_glu_of_nan_and_infinity_is_eagers(isa, activation):
    z = torch.tensor([float("nan"), float("inf"), float("-inf"), 1.0, -1e30, 1e30, -14.5, 100])
    one, options = torch.ones(8), (None, activation, True)
    library = torch.ops.fastdit_native
    want = reference.glu(z.double(), one.double(), *options).float()
    torch.testing.assert_close(library.glu(z, one, *options), want, equal_nan=True)
    dgate, dup, _ = library.glu_backward(one, z, one, *options)
    torch.testing.assert_close(dup, want, equal_nan=True)
    assert dgate[0].isnan()
    torch.testing.assert_close(dgate[4:], torch.tensor([0.0, 1.0, 0.0, 1.0]), rtol=0, atol=1e-5)


# ---- reductions, threads, rows -------------------------------------------------------------------


def calls(tokens: int = 100, width: int = 400) -> dict[str, tuple]:
    """A call of each kernel that is large enough for two threads."""
    x, y, dout, dh = (plain(B, tokens, width, seed=seed) for seed in range(4))
    shift, scale, gate = plain(B, 3 * width, seed=4).chunk(3, -1)
    weight, bias = plain(width, seed=5), plain(width, seed=6)
    rest = (shift, scale, weight, bias)
    _out, mean, rstd = reference.adaln_saving(x, *rest, 1e-6, "layer", True)
    return {
        "adaln": (x, *rest, 1e-6, "layer", True),
        "gated_adaln": (x, y, gate, *rest, 1e-6, "layer", True),
        "gated_residual": (x, y, gate),
        "bias_gelu": (x, bias),
        "glu": (x, None, bias, "silu", True),
        "adaln_backward": (dout, x, mean, rstd, *rest, "layer", True),
        "gated_adaln_backward": (dh, dout, x, mean, rstd, y, gate, *rest, "layer", True),
        "gated_residual_backward": (dout, y, gate),
        "bias_gelu_backward": (dout, x, bias),
        "glu_backward": (dout[..., ::2], x, None, bias, "gelu", False),
    }


@pytest.mark.parametrize("op", [op for op in calls(1, 1) if op.endswith("backward")])
def test_sums_over_many_chunks_of_rows(op):
    check(op, *calls(tokens=101, width=40)[op])


@pytest.mark.parametrize("op", calls(1, 1))
def test_the_number_of_threads_changes_no_bit(op):
    args, kernel, threads = (
        calls()[op],
        getattr(torch.ops.fastdit_native, op),
        torch.get_num_threads(),
    )
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(outputs(kernel(*args)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("op", calls(1, 1))
def test_fakes_and_schema(op):
    kernel = getattr(torch.ops.fastdit_native, op).default
    report = torch.library.opcheck(kernel, calls(3, 8)[op])
    assert set(report.values()) == {"SUCCESS"}
    assert str(kernel._schema).replace("fastdit_native", "fastdit") == str(
        getattr(torch.ops.fastdit, op).default._schema
    )


def test_a_row_far_from_zero_keeps_its_statistics(isa):
    """Mean a thousand times the standard deviation: the second pass about the mean."""
    x = plain(1, 4, 300) + torch.tensor([0, 1, 1e3, -1e5])[:, None]
    exact = torch.nn.functional.layer_norm(x.double(), (300,), eps=1e-6)
    out, mean, _rstd = torch.ops.fastdit_native.adaln(
        x, None, None, None, None, 1e-6, "layer", True
    )
    assert (out - exact).abs().max() <= 1e-6
    torch.testing.assert_close(mean, x.double().mean(-1).float(), rtol=1e-7, atol=1e-7)


def test_nan_and_infinity_stay_in_their_row(isa):
    x, dout = plain(B, N, 40), plain(B, N, 40, seed=1)
    x[0, 2, 39], x[1, 5, 0] = float("nan"), float("inf")
    rest = (plain(B, 40, seed=2), plain(B, 40, seed=3), None, None)
    out, mean, rstd = torch.ops.fastdit_native.adaln(x, *rest, 1e-6, "layer", True)
    dx = torch.ops.fastdit_native.adaln_backward(dout, x, mean, rstd, *rest, "layer", True)[0]
    rows = torch.zeros(B, N, dtype=torch.bool)
    rows[0, 2] = rows[1, 5] = True
    assert torch.equal(out.isnan().any(-1), rows)
    assert torch.equal(dx.isnan().any(-1), rows)


def test_nothing_at_all():
    for shape in ((0, N, 8), (B, 0, 8)):
        x, modulation = torch.zeros(shape), torch.zeros(shape[0], 8)
        weight = torch.ones(8)
        rest = (modulation, modulation, weight, weight)
        out, mean, rstd = torch.ops.fastdit_native.adaln(x, *rest, 1e-6, "layer", True)
        assert out.shape == shape
        gradients = torch.ops.fastdit_native.adaln_backward(x, x, mean, rstd, *rest, "layer", True)
        assert [g.shape for g in gradients] == [t.shape for t in (x, *rest)]
        assert all((g == 0).all() for g in gradients)
    assert torch.ops.fastdit_native.bias_gelu(torch.zeros(0, 8), torch.ones(8)).shape == (0, 8)


WRONG = [
    ("adaln", 0, torch.ones(3, 4), "x: wrong shape"),
    ("adaln", 1, torch.ones(2, 5), "shift: wrong shape"),
    ("adaln", 2, torch.ones(2, 3, 5), "scale: wrong shape"),
    ("adaln", 3, torch.ones(4, dtype=torch.float16), "wrong dtype"),
    ("adaln", 0, torch.ones(2, 3, 4, dtype=torch.float64), "wrong dtype|float32, bfloat16"),
    ("adaln", 6, "batch", "norm: got batch"),
    ("adaln", 5, -1.0, "eps"),
    ("gated_adaln", 1, torch.ones(2, 2, 4), "y: wrong shape"),
    ("gated_residual", 2, torch.ones(2, 5), "gate: wrong shape"),
    ("bias_gelu", 1, torch.ones(5), "bias: wrong shape"),
    ("adaln_backward", 0, torch.ones(2, 3, 5), "dout: wrong shape"),
    ("adaln_backward", 3, torch.ones(2, 4), "rstd: wrong shape"),
    ("bias_gelu_backward", 0, torch.ones(2, 3, 3), "dout"),
    ("glu", 0, torch.ones(2, 3, 5), "x: wrong shape"),
    ("glu", 0, torch.ones(2, 3, 4, dtype=torch.float64), "float32, bfloat16"),
    ("glu", 1, torch.ones(2, 3, 4), "up is a tensor of its own"),
    ("glu", 2, torch.ones(3), "bias: wrong shape"),
    ("glu", 3, "relu", "activation: got relu"),
    ("glu_backward", 0, torch.ones(2, 3, 4), "dout"),
    ("glu_backward", 2, torch.ones(2, 3, 5), "up: must have x's shape"),
]


@pytest.mark.parametrize(("op", "position", "value", "message"), WRONG)
def test_the_library_guards_its_memory(op, position, value, message):
    args = list(calls(3, 4)[op])
    args[position] = value
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.fastdit_native, op)(*args)


def test_a_compiled_call_without_gradients_is_the_librarys_own_op():
    """fastdit's op around it is a function in Python, 20 µs a call; with gradients and in an
    exported program it is that one."""
    x, shift, scale = torch.randn(2, 64, 32), torch.randn(2, 32), torch.randn(2, 32)
    seen = []

    def record(graph, _inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    def called(*args):
        seen.clear()
        torch._dynamo.reset()
        return torch.compile(ops.adaln, backend=record, fullgraph=True)(*args)

    assert torch.equal(called(x, shift, scale), ops.adaln(x, shift, scale))
    assert "fastdit_native.adaln.default" in seen
    assert torch.equal(
        called(x.requires_grad_(), shift, scale).detach(), ops.adaln(x, shift, scale)
    )
    assert "fastdit.adaln.default" in seen

    class Module(torch.nn.Module):
        def forward(self, *args):
            return ops.adaln(*args)

    program = torch.export.export(Module(), (x.detach(), shift, scale))
    assert "fastdit.adaln.default" in [str(node.target) for node in program.graph.nodes]
