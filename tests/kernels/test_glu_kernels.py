"""The glu kernels: numbers, traffic, compiled code, and the op that runs them."""

from __future__ import annotations

import contextlib
import itertools

import patch_cases
import pytest
import torch
from baselines import hold_instructions
from patch_cases import ARCHITECTURES, DTYPES, beats_eager, error, rounding_floor, run, seeded

import fastdit
from fastdit import reference
from fastdit.kernels import glu as kernels
from fastdit.kernels import tuning

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
# Of the result; the largest power of two that divides the width, the tile, differs.
SHAPES = [(3, 5, 24), (37, 200), (2, 700), (9, 1), (130,), (1, 3, 513)]


def inputs(shape, dtype, packed=True, scale=3.0, offset=0.0):
    """The op's first three arguments, and the gradient of its result."""
    dout = seeded(*shape, seed=2, dtype=dtype)
    if not packed:
        gate, up = ((scale * seeded(*shape, seed=s) + offset).to(dtype) for s in (0, 1))
        return (gate, up, None), dout
    *rows, width = shape
    x = (scale * seeded(*rows, 2 * width, seed=0) + offset).to(dtype)
    return (x, None, seeded(2 * width, seed=1, dtype=dtype)), dout


def check(args, dout, floor=True):
    """Forward and backward against float64 and eager."""
    out, _ = run(kernels.glu, *args)
    assert (out.shape, out.dtype, out.is_contiguous()) == (dout.shape, dout.dtype, True)
    assert beats_eager(out, reference.glu(*args), reference.glu(*in_float64(args)), floor)
    got, launches = run(kernels.glu_backward, dout, *args)
    truth = patch_cases.gradients("glu", args, dout, torch.float64)
    eager = patch_cases.gradients("glu", args, dout, None)
    leaves = [a for a in args if isinstance(a, torch.Tensor)]
    assert all(g.shape == (0,) for g, a in zip(got, args[:3], strict=True) if a is None)
    present = [g for g, a in zip(got, args[:3], strict=True) if a is not None]
    for gradient, e, t, like in zip(present, eager, truth, leaves, strict=True):
        assert (gradient.shape, gradient.dtype) == (like.shape, like.dtype)
        assert gradient.is_contiguous()
        assert beats_eager(gradient, e, t, floor)
    return launches


def in_float64(args):
    return [a.double() if isinstance(a, torch.Tensor) else a for a in args]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(shape, dtype) for shape in SHAPES for dtype in DTYPES[:2]] + [(SHAPES[1], DTYPES[2])],
)
def test_numbers(shape, dtype):
    """Every shape with one activation and one order, and each of those with some shape."""
    index = SHAPES.index(shape)
    tensors, dout = inputs(shape, dtype)
    check((*tensors, ACTIVATIONS[index % 3], index % 2 == 0), dout)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gate_first", [True, False])
def test_every_activation_in_either_order_and_apart(activation, gate_first):
    (x, _, bias), dout = inputs((6, 40), torch.float32)
    check((x, None, bias, activation, gate_first), dout)
    check((x, None, None, activation, gate_first), dout)
    if gate_first:
        tensors, dout = inputs((6, 40), torch.bfloat16, packed=False)
        assert [launch.name for launch in check((*tensors, activation, True), dout)] == [
            "backward_kernel"
        ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_rows_and_a_large_mean(dtype):
    """Every program sums several tiles of rows, and the sums are far from 0."""
    tensors, dout = inputs((150, 256), dtype, offset=1.5)
    few = kernels.Tile(1024, 512, 4, programs=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "BACKWARD", {2: few, 4: few})
        launches = check((*tensors, "silu", False), dout + 1, floor=dtype == torch.float32)
    assert launches[0].grid == (3, 1, 1)


VALUES = [
    0.0,
    -0.0,
    1e-30,
    5.0,
    -5.0,
    9.0,
    -9.0,
    13.0,
    -13.0,
    40.0,
    -40.0,
    1e20,
    -1e20,
    3e38,
    -3e38,
]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extremes_neither_cancel_nor_overflow(activation):
    z = torch.tensor([VALUES])
    one = torch.ones_like(z)
    args = (z, one, None, activation, True)
    out, _ = run(kernels.glu, *args)
    exact = reference.glu(*in_float64(args))
    # In the tail each result is right to a few units in its own last place; both GELUs' definitions
    # cancel there, also in float64.
    tail = torch.tensor([-5.0, -9.0], dtype=torch.float64)
    if activation == "gelu":
        exact[0, [4, 6]] = tail * torch.special.erfc(-tail / 2**0.5) / 2
    if activation == "gelu_tanh":
        cubic = tail + 0.044715 * tail**3
        exact[0, [4, 6]] = tail / (1 + torch.exp(-2 * (2 / torch.pi) ** 0.5 * cubic))
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-30)
    (dgate, dup, _), _ = run(kernels.glu_backward, one, *args)
    torch.testing.assert_close(dup, out, rtol=1e-5, atol=1e-30)
    truth = torch.where(z > 20, 1.0, torch.where(z < -20, 0.0, float("nan")))
    (within, _) = patch_cases.gradients("glu", args, one, torch.float64)
    truth = torch.where(z.abs() <= 20, within, truth)
    torch.testing.assert_close(dgate.double(), truth, rtol=4e-6, atol=2e-7)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_infinity_are_eagers(activation):
    z = torch.tensor([[float("inf"), float("-inf"), float("nan"), 1.0]])
    up = torch.tensor([[2.0, 2.0, 2.0, float("nan")]])
    out, _ = run(kernels.glu, z, up, None, activation, True)
    want = reference.glu(z.double(), up.double(), None, activation, True)
    torch.testing.assert_close(out.double(), want, equal_nan=True, rtol=1e-6, atol=1e-6)
    got, _ = run(kernels.glu_backward, torch.ones_like(z), z, up, None, activation, True)
    assert got[0][0, 2:].isnan().all()
    assert torch.equal(got[1].isnan(), torch.tensor([[False, True, True, False]]))


def test_mixed_dtypes():
    (x, _, _), dout = inputs((7, 40), torch.float16)
    args = (x, None, seeded(80, seed=1), "silu", True)
    out, _ = run(kernels.glu, *args)
    exact = reference.glu(*in_float64(args))
    assert out.dtype == torch.float16
    assert error(out, exact) <= 1.02 * rounding_floor(exact, torch.float16)
    (dx, _, dbias), _ = run(kernels.glu_backward, dout, *args)
    assert (dx.dtype, dbias.dtype) == (torch.float16, torch.float32)
    truth = patch_cases.gradients("glu", args, dout, torch.float64)[1]
    assert error(dbias, truth) <= 1e-5


def test_strided_inputs_are_read_in_place():
    """A packed projection that is a slice of a wider one, as Flux 2's; two slices of one tensor."""
    wide, bias, dout = seeded(6, 160, seed=0), seeded(160, seed=1)[::2], seeded(40, 6, seed=2).T
    x, dense = wide[:, 48:128], wide[:, 48:128].contiguous()
    options = (None, bias, "silu", False)
    out, (launch,) = run(kernels.glu, x, *options)
    assert torch.equal(out, run(kernels.glu, dense, None, bias.contiguous(), "silu", False)[0])
    assert launch.arguments["up_ptr"].data_ptr() == x.data_ptr()
    assert launch.arguments["gate_ptr"].data_ptr() == x[:, 40:].data_ptr()
    got, launches = run(kernels.glu_backward, dout, x, *options)
    assert launches[0].arguments["up_ptr"].data_ptr() == x.data_ptr()
    want, _ = run(kernels.glu_backward, dout.contiguous(), dense, *options)
    assert all(map(torch.equal, got, want))
    gate, up = wide[:, 80:120], dense[:, :40]  # of different strides
    got, _ = run(kernels.glu_backward, dout, gate, up, None, "silu", True)
    copies = gate.contiguous(), up.contiguous()
    want, _ = run(kernels.glu_backward, dout.contiguous(), *copies, None, "silu", True)
    assert all(map(torch.equal, got, want))
    halves = dense.chunk(2, -1)
    apart, (launch,) = run(kernels.glu, *halves[::-1], None, "silu", True)
    assert launch.arguments["gate_ptr"].data_ptr() == halves[1].data_ptr()
    assert torch.equal(apart, run(kernels.glu, dense, None, None, "silu", False)[0])


def test_offsets_beyond_32_bits():
    """Rows 2^30 + 3 elements apart: the third begins beyond 2^31. Untouched pages cost nothing."""
    far = torch.empty(2**31 + 2**10, dtype=torch.bfloat16).as_strided((3, 32), (2**30 + 3, 1))
    (x, _, bias), _dout = inputs((3, 16), torch.bfloat16)
    far.copy_(x)
    options = (None, bias, "gelu", True)
    with patch_cases.VirtualGPU("sm_90", trace=False):
        assert torch.equal(kernels.glu(far, *options), kernels.glu(x, *options))
        got = kernels.glu_backward(far[:, :16], far, *options)
        assert all(map(torch.equal, got, kernels.glu_backward(x[:, :16], x, *options)))


def test_empty():
    x, bias = torch.zeros(0, 8), torch.ones(8)
    out, launches = run(kernels.glu, x, None, bias, "silu", True)
    assert out.shape == (0, 4)
    (dx, _, dbias), more = run(kernels.glu_backward, out, x, None, bias, "silu", True)
    assert dx.shape == (0, 8)
    assert torch.equal(dbias, torch.zeros(8))
    assert launches == more == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_traffic_is_the_least(dtype):
    (x, _, bias), dout = inputs((30, 1024), dtype)
    _, (forward,) = run(kernels.glu, x, None, bias, "silu", True)
    half, sides = dout.nbytes, ("gate", "up")
    for side in sides:
        assert forward.trace.loaded[f"{side}_ptr"] == half
        assert forward.trace.unique_loaded[f"{side}_ptr"] == half
        assert forward.trace.unique_loaded[f"{side}_bias_ptr"] == bias.nbytes / 2
    assert forward.trace.stored == {"out_ptr": half}
    _, (backward, second) = run(kernels.glu_backward, dout, x, None, bias, "silu", True)
    loaded, stored = backward.trace.loaded, backward.trace.stored
    rows = backward.grid[0]
    for side in sides:
        assert loaded[f"{side}_ptr"] == stored[f"d{side}_ptr"] == loaded["dout_ptr"] == half
        assert stored[f"{side}_sums_ptr"] == rows * 1024 * 4
    assert second.trace.loaded == {"rows_ptr": rows * 2048 * 4}
    assert second.trace.stored == {"out_ptr": bias.nbytes}


def test_partial_sums_are_few():
    """At 8192 tokens of a LightningDiT-XL they are under 3 % of the traffic."""
    x = torch.empty(8192, 6144, dtype=torch.bfloat16, device="meta")
    args = (x[:, :3072], x, None, x[0], "silu", True)
    _, (backward, _) = run(kernels.glu_backward, *args, mode="compile")
    sums = backward.arguments["gate_sums_ptr"].nbytes + backward.arguments["up_sums_ptr"].nbytes
    assert 2 * sums < 0.03 * 2.5 * x.nbytes


def test_second_run_is_bit_equal():
    (x, _, bias), dout = inputs((90, 256), torch.bfloat16)
    first, second = (run(kernels.glu_backward, dout, x, None, bias, "silu", True)[0] for _ in "ab")
    assert all(map(torch.equal, first, second))


# Registers at most, occupancy at least, as compiled for NVIDIA, with a bias and without: of the
# forward kernel and the backward. A bias is narrow where 512 elements of it are fewer than 16 bytes
# a thread.
BUDGET = {
    ("forward_kernel", torch.bfloat16): (56, 0.56),
    ("forward_kernel", torch.float32): (40, 0.75),
    ("backward_kernel", torch.bfloat16): (96, 0.31),
    ("backward_kernel", torch.float32): (72, 0.43),
}
COMPILED = [(arch, torch.bfloat16, "silu", True) for arch in ARCHITECTURES] + [
    ("sm_90", torch.bfloat16, "gelu", False),
    ("sm_80", torch.float32, "silu", True),
]
EVERYTHING = itertools.product(
    ARCHITECTURES, (torch.bfloat16, torch.float32), ACTIVATIONS, (True, False)
)


def check_compiled(arch, dtype, activation, biased, width=3072):
    x = torch.empty(32, 256, 2 * width, dtype=dtype, device="meta")
    args = (x, None, x[0, 0] if biased else None, activation, True)
    _, forward = run(kernels.glu, *args, arch=arch, mode="compile")
    _, backward = run(kernels.glu_backward, x[..., :width], *args, arch=arch, mode="compile")
    for launch in (*forward, backward[0]):
        found = patch_cases.resources(launch)
        registers, occupancy = BUDGET[launch.name, dtype]
        assert found.spills == found.stack_bytes == 0
        if arch.startswith("sm_"):
            assert found.registers <= registers
            assert found.occupancy.fraction >= occupancy
            assert found.loads_wide >= 2
            assert found.loads_narrow <= 2 * biased
            assert found.stores_wide >= 1
            assert found.stores_narrow == 0


@pytest.mark.parametrize(("arch", "dtype", "activation", "biased"), COMPILED)
def test_compiled_code(arch, dtype, activation, biased):
    check_compiled(arch, dtype, activation, biased)


@pytest.mark.slow  # a minute of compilation
@pytest.mark.parametrize(
    ("arch", "dtype", "activation", "biased"), [one for one in EVERYTHING if one not in COMPILED]
)
def test_compiled_code_everywhere(arch, dtype, activation, biased):
    check_compiled(arch, dtype, activation, biased)


# Warp instructions of PTX for 16 rows of 512: forward, and backward with a bias.
INSTRUCTIONS = {
    ("sm_80", torch.bfloat16, "silu"): (4848, 14176),
    ("sm_90", torch.float32, "gelu"): (8736, 12992),
}


@pytest.mark.parametrize(("arch", "dtype", "activation"), INSTRUCTIONS)
def test_compiled_code_simulated(arch, dtype, activation):
    (x, _, bias), dout = inputs((16, 512), dtype)
    args = (x, None, bias, activation, True)
    out, forward = run(kernels.glu, *args, arch=arch, mode="simulate")
    assert beats_eager(out, reference.glu(*args), reference.glu(*in_float64(args)))
    got, backward = run(kernels.glu_backward, dout, *args, arch=arch, mode="simulate")
    truth = patch_cases.gradients("glu", args, dout, torch.float64)
    eager = patch_cases.gradients("glu", args, dout, None)
    assert all(map(beats_eager, (got[0], got[2]), eager, truth))
    simulations = [launch.simulation for launch in (*forward, backward[0])]
    for simulation in simulations:
        assert simulation.loads.efficiency >= 0.99
        assert simulation.stores.efficiency >= 0.99
        assert simulation.divergent_branches == 0
        assert simulation.shared.conflict_ratio < 1.5
    assert simulations[0].dram_bytes == 1.5 * x.nbytes + bias.nbytes
    assert simulations[1].loads.dram_bytes == 1.5 * x.nbytes + bias.nbytes
    counts = [simulation.warp_instructions for simulation in simulations]
    hold_instructions(counts, INSTRUCTIONS[arch, dtype, activation])


def test_the_op_runs_the_kernels():
    x, bias = seeded(2, 3, 40, seed=0).requires_grad_(), seeded(40, seed=1).requires_grad_()
    with patch_cases.on_the_cpu("glu") as gpu:
        assert fastdit.explain("glu", x, None, bias)[0].runs == "triton"
        fastdit.ops.glu(x, None, bias, "gelu", gate_first=False).square().sum().backward()
        names = [launch.name for launch in gpu.launches]
        assert names == ["forward_kernel", "backward_kernel", "sum_rows_kernel"]
        args = (x, None, bias, "gelu", False)
        utils = ("test_schema", "test_faketensor")
        report = torch.library.opcheck(torch.ops.fastdit.glu.default, args, test_utils=utils)
        assert set(report.values()) == {"SUCCESS"}
        with pytest.raises(fastdit.BackendError, match="x is float64, the Triton kernels take"):
            fastdit.ops.glu(x.double())
    with fastdit.backend("reference"):
        a, b = x.detach().requires_grad_(), bias.detach().requires_grad_()
        fastdit.ops.glu(a, None, b, "gelu", gate_first=False).square().sum().backward()
    torch.testing.assert_close(x.grad, a.grad)
    torch.testing.assert_close(bias.grad, b.grad)


@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize("which", ["packed", "new", "gate", "up"])
def test_a_given_tensor_is_what_the_kernel_writes(which, tuned, monkeypatch):
    """Gate or up themselves too; but a copy, where a launch is repeated to be timed."""
    gate, up = seeded(6, 40, seed=0), seeded(6, 40, seed=1)
    args = (torch.cat([gate, up], -1),) if which == "packed" else (gate, up)
    out = {"gate": gate, "up": up}.get(which, torch.full_like(gate, torch.nan))
    monkeypatch.setitem(tuning._state, "enabled", tuned)
    warned = pytest.warns(RuntimeWarning, match="no GPU") if tuned else contextlib.nullcontext()
    with patch_cases.on_the_cpu("glu") as gpu, warned:
        want = fastdit.ops.glu(*args)
        assert fastdit.ops.glu(*args, out=out) is out
    assert torch.equal(out, want)
    written = [launch.arguments["out_ptr"].data_ptr() == out.data_ptr() for launch in gpu.launches]
    assert written == [False, not tuned]


def test_the_op_compiles_and_follows_autocasts_mixture():
    x, bias = seeded(2, 3, 40, seed=0).bfloat16().requires_grad_(), seeded(40, seed=1)

    def block(x, bias):
        return fastdit.ops.glu(x, None, bias).sum()

    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with patch_cases.on_the_cpu("glu") as gpu, torch.autocast("cpu", torch.bfloat16):
        (compiled_gradient,) = torch.autograd.grad(compiled(x, bias), x)
        assert {launch.name for launch in gpu.launches} >= {"forward_kernel", "backward_kernel"}
        (gradient,) = torch.autograd.grad(block(x, bias), x)
    assert torch.equal(compiled_gradient, gradient)
