"""The bias_gelu kernels: numbers, traffic, compiled code, and the op that runs them."""

from __future__ import annotations

import patch_cases
import pytest
import torch
from baselines import hold_instructions
from patch_cases import ARCHITECTURES, DTYPES, beats_eager, error, rounding_floor, run, seeded

import fastdit
from fastdit import reference
from fastdit.kernels import bias_gelu as kernels

# Shape, and the largest power of two that divides the width: what the tile is made of.
SHAPES = [(3, 5, 24), (37, 200), (2, 700), (9, 1), (130,), (1, 3, 513)]


def inputs(shape, dtype, scale=3.0, offset=0.0):
    x = (scale * seeded(*shape, seed=0) + offset).to(dtype)
    bias = seeded(shape[-1], seed=1, dtype=dtype)
    return x, bias, seeded(*shape, seed=2, dtype=dtype)


def exact_forward(x, bias):
    return reference.bias_gelu(x.double(), bias.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_numbers(shape, dtype):
    x, bias, dout = inputs(shape, dtype)
    out, _ = run(kernels.bias_gelu, x, bias)
    exact = exact_forward(x, bias)
    assert (out.shape, out.dtype, out.is_contiguous()) == (x.shape, dtype, True)
    assert error(out, exact) <= 1.02 * rounding_floor(exact, dtype) + 4e-6
    got, _ = run(kernels.bias_gelu_backward, dout, x, bias)
    truth = patch_cases.gradients("bias_gelu", (x, bias), dout, torch.float64)
    eager = patch_cases.gradients("bias_gelu", (x, bias), dout, None)
    for gradient, e, t, like in zip(got, eager, truth, (x, bias), strict=True):
        assert (gradient.shape, gradient.dtype) == (like.shape, dtype)
        assert gradient.is_contiguous()
        assert beats_eager(gradient, e, t)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_rows_and_a_large_mean(dtype):
    """Every program sums several tiles of rows, and the sums are far from 0."""
    x, bias, dout = inputs((300, 512), dtype, offset=1.5)
    dout = dout + 1
    few = {2: kernels.Tile(1024, 512, 4, programs=3), 4: kernels.Tile(1024, 512, 4, programs=3)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "BACKWARD", few)
        got, launches = run(kernels.bias_gelu_backward, dout, x, bias)
    assert launches[0].grid == (3, 1, 1)
    truth = patch_cases.gradients("bias_gelu", (x, bias), dout, torch.float64)
    eager = patch_cases.gradients("bias_gelu", (x, bias), dout, None)
    for gradient, e, t in zip(got, eager, truth, strict=True):
        assert beats_eager(gradient, e, t, floor=False)


def test_extremes_neither_cancel_nor_overflow():
    values = [0.0, -0.0, 1e-30, 5.0, -5.0, 12.0, -12.0, 40.0, -40.0, 1e20, -1e20, 3e38, -3e38]
    x, bias = torch.tensor([values]), torch.zeros(len(values))
    out, _ = run(kernels.bias_gelu, x, bias)
    exact = exact_forward(x, bias)
    # In the tail each result is right to a few units in its own last place.
    torch.testing.assert_close(out.double(), exact, rtol=4e-6, atol=1e-37)
    (dx, _), _ = run(kernels.bias_gelu_backward, torch.ones_like(x), x, bias)
    truth = torch.where(x > 13, 1.0, torch.where(x < -13, 0.0, float("nan")))
    (within,) = patch_cases.gradients("bias_gelu", (x, bias), torch.ones_like(x), torch.float64)[:1]
    truth = torch.where(x.abs() <= 13, within, truth)
    torch.testing.assert_close(dx.double(), truth, rtol=4e-6, atol=1e-37)
    odd = torch.tensor([[float("inf"), float("nan")]])
    out, _ = run(kernels.bias_gelu, odd, torch.zeros(2))
    (dx, _), _ = run(kernels.bias_gelu_backward, torch.ones_like(odd), odd, torch.zeros(2))
    assert out[0, 0] == float("inf")
    assert dx[0, 0] == 1
    assert out[0, 1].isnan()
    assert dx[0, 1].isnan()


def test_mixed_dtypes():
    x, bias, dout = seeded(7, 40, seed=0).half(), seeded(40, seed=1), seeded(7, 40, seed=2).half()
    out, _ = run(kernels.bias_gelu, x, bias)
    exact = exact_forward(x, bias)
    assert out.dtype == torch.float16
    assert error(out, exact) <= 1.02 * rounding_floor(exact, torch.float16)
    (dx, dbias), _ = run(kernels.bias_gelu_backward, dout, x, bias)
    assert (dx.dtype, dbias.dtype) == (torch.float16, torch.float32)
    truth = patch_cases.gradients("bias_gelu", (x, bias), dout, torch.float64)[1]
    assert error(dbias, truth) <= 2e-6


def test_strided_inputs_are_read_in_place():
    wide, bias, dout = seeded(6, 80, seed=0), seeded(80, seed=1)[::2], seeded(40, 6, seed=2).T
    x = wide.chunk(2, -1)[1]
    out, launches = run(kernels.bias_gelu, x, bias)
    assert torch.equal(out, run(kernels.bias_gelu, x.contiguous(), bias.contiguous())[0])
    assert launches[0].arguments["x_ptr"].data_ptr() == x.data_ptr()
    got, launches = run(kernels.bias_gelu_backward, dout, x, bias)
    assert launches[0].arguments["x_ptr"].data_ptr() == x.data_ptr()
    want, _ = run(kernels.bias_gelu_backward, dout.contiguous(), x.contiguous(), bias.contiguous())
    assert all(map(torch.equal, got, want))


def test_offsets_beyond_32_bits():
    """Rows 2^30 + 3 elements apart: the third begins beyond 2^31. Untouched pages cost nothing."""
    far = torch.empty(2**31 + 2**10, dtype=torch.bfloat16).as_strided((3, 16), (2**30 + 3, 1))
    x, bias, _ = inputs((3, 16), torch.bfloat16)
    far.copy_(x)
    with patch_cases.VirtualGPU("sm_90", trace=False):
        assert torch.equal(kernels.bias_gelu(far, bias), kernels.bias_gelu(x, bias))
        got = kernels.bias_gelu_backward(far, far, bias)
        assert all(map(torch.equal, got, kernels.bias_gelu_backward(x, x, bias)))


def test_empty():
    bias = torch.ones(8)
    out, launches = run(kernels.bias_gelu, torch.zeros(0, 8), bias)
    assert out.shape == (0, 8)
    (dx, dbias), more = run(kernels.bias_gelu_backward, torch.zeros(0, 8), torch.zeros(0, 8), bias)
    assert dx.shape == (0, 8)
    assert torch.equal(dbias, torch.zeros(8))
    assert launches == more == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_traffic_is_the_least(dtype):
    x, bias, dout = inputs((70, 1536), dtype)
    _, (forward,) = run(kernels.bias_gelu, x, bias)
    size = x.nbytes
    assert forward.trace.loaded["x_ptr"] == forward.trace.unique_loaded["x_ptr"] == size
    assert forward.trace.stored == {"out_ptr": size}
    assert forward.trace.unique_loaded["bias_ptr"] == bias.nbytes
    _, (backward, second) = run(kernels.bias_gelu_backward, dout, x, bias)
    loaded, stored = backward.trace.loaded, backward.trace.stored
    assert loaded["x_ptr"] == loaded["dout_ptr"] == stored["dx_ptr"] == size
    rows = backward.grid[0]
    assert stored["partials_ptr"] == rows * 1536 * 4
    assert second.trace.loaded == {"rows_ptr": rows * 1536 * 4}
    assert second.trace.stored == {"out_ptr": bias.nbytes}


def test_partial_sums_are_few():
    """At 8192 tokens of a DiT-XL they are under 3 % of the traffic."""
    x = torch.empty(8192, 4608, dtype=torch.bfloat16, device="meta")
    bias = torch.empty(4608, dtype=torch.bfloat16, device="meta")
    _, (backward, _) = run(kernels.bias_gelu_backward, x, x, bias, mode="compile")
    assert 2 * backward.arguments["partials_ptr"].nbytes < 0.03 * 3 * x.nbytes


def test_second_run_is_bit_equal():
    x, bias, dout = inputs((90, 512), torch.bfloat16)
    first, _ = run(kernels.bias_gelu_backward, dout, x, bias)
    second, _ = run(kernels.bias_gelu_backward, dout, x, bias)
    assert all(map(torch.equal, first, second))


# Registers at most, occupancy at least, as compiled for NVIDIA; the bias is narrow where 512
# elements of it are fewer than 16 bytes a thread.
BUDGET = {
    ("forward_kernel", torch.bfloat16): (42, 0.83),
    ("forward_kernel", torch.float16): (42, 0.83),
    ("forward_kernel", torch.float32): (32, 1.0),
    ("backward_kernel", torch.bfloat16): (56, 0.56),
    ("backward_kernel", torch.float16): (56, 0.56),
    ("backward_kernel", torch.float32): (48, 0.75),
    ("sum_rows_kernel", torch.bfloat16): (48, 0.62),
    ("sum_rows_kernel", torch.float16): (48, 0.62),
    ("sum_rows_kernel", torch.float32): (48, 0.62),
}


@pytest.mark.parametrize(
    ("arch", "dtype"),
    [(arch, torch.bfloat16) for arch in ARCHITECTURES]
    + [("sm_80", torch.float32), ("sm_120", torch.float32), ("sm_90", torch.float16)],
)
def test_compiled_code(arch, dtype):
    for width in patch_cases.WIDTHS.values():
        x = torch.empty(32, 256, 4 * width, dtype=dtype, device="meta")
        bias = torch.empty(4 * width, dtype=dtype, device="meta")
        _, forward = run(kernels.bias_gelu, x, bias, arch=arch, mode="compile")
        _, backward = run(kernels.bias_gelu_backward, x, x, bias, arch=arch, mode="compile")
        for launch in (*forward, *backward):
            found = patch_cases.resources(launch)
            registers, occupancy = BUDGET[launch.name, dtype]
            assert found.spills == found.stack_bytes == 0
            if arch.startswith("sm_"):
                assert found.registers <= registers
                assert found.occupancy.fraction >= occupancy - 0.01
                assert found.loads_wide >= 1
                assert found.loads_narrow <= 1
            if arch.startswith("sm_") and launch.name != "sum_rows_kernel":
                assert found.stores_wide >= 1
                assert found.stores_narrow == 0


# Warp instructions of PTX for 16 rows of 1024: forward, backward, and the second stage.
INSTRUCTIONS = {
    ("sm_80", torch.bfloat16): (7680, 23680, 6304),
    ("sm_80", torch.float32): (7168, 18240, 5504),
    ("sm_90", torch.bfloat16): (7680, 23680, 6368),
    ("sm_90", torch.float32): (7168, 18240, 5504),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_compiled_code_simulated(arch, dtype):
    x, bias, dout = inputs((16, 1024), dtype)
    out, forward = run(kernels.bias_gelu, x, bias, arch=arch, mode="simulate")
    exact = exact_forward(x, bias)
    assert error(out, exact) <= 1.02 * rounding_floor(exact, dtype) + 4e-6
    got, backward = run(kernels.bias_gelu_backward, dout, x, bias, arch=arch, mode="simulate")
    truth = patch_cases.gradients("bias_gelu", (x, bias), dout, torch.float64)
    eager = patch_cases.gradients("bias_gelu", (x, bias), dout, None)
    assert all(map(beats_eager, got, eager, truth))
    simulations = [launch.simulation for launch in (*forward, *backward)]
    for simulation in simulations:
        assert simulation.loads.efficiency >= 0.99
        assert simulation.stores.efficiency >= 0.99
        assert simulation.divergent_branches == 0
        assert simulation.shared.conflict_ratio < 1.5
    assert simulations[0].dram_bytes == 2 * x.nbytes + bias.nbytes
    assert simulations[1].loads.dram_bytes == 2 * x.nbytes + bias.nbytes
    counts = [simulation.warp_instructions for simulation in simulations]
    hold_instructions(counts, INSTRUCTIONS[arch, dtype])


def test_the_op_runs_the_kernels():
    x, bias = seeded(2, 3, 40, seed=0).requires_grad_(), seeded(40, seed=1).requires_grad_()
    with patch_cases.on_the_cpu("bias_gelu") as gpu:
        assert fastdit.explain("bias_gelu", x, bias)[0].runs == "triton"
        fastdit.ops.bias_gelu(x, bias).square().sum().backward()
        names = [launch.name for launch in gpu.launches]
        assert names == ["forward_kernel", "backward_kernel", "sum_rows_kernel"]
        report = torch.library.opcheck(torch.ops.fastdit.bias_gelu.default, (x, bias))
        assert set(report.values()) == {"SUCCESS"}
        with pytest.raises(fastdit.BackendError, match="x is float64, the Triton kernels take"):
            fastdit.ops.bias_gelu(x.double(), bias.double())
        with torch.no_grad():
            own, want = x.clone(), fastdit.ops.bias_gelu(x, bias)
            assert fastdit.ops.bias_gelu(own, bias, out=own) is own
            assert torch.equal(own, want)
    with fastdit.backend("reference"):
        a, b = x.detach().requires_grad_(), bias.detach().requires_grad_()
        fastdit.ops.bias_gelu(a, b).square().sum().backward()
    torch.testing.assert_close(x.grad, a.grad)
    torch.testing.assert_close(bias.grad, b.grad)


def test_the_op_compiles_and_follows_autocasts_mixture():
    x, bias = seeded(2, 3, 40, seed=0).bfloat16().requires_grad_(), seeded(40, seed=1)

    def block(x, bias):
        return fastdit.ops.bias_gelu(x, bias).sum()

    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with patch_cases.on_the_cpu("bias_gelu") as gpu, torch.autocast("cpu", torch.bfloat16):
        (compiled_gradient,) = torch.autograd.grad(compiled(x, bias), x)
        assert {launch.name for launch in gpu.launches} >= {"forward_kernel", "backward_kernel"}
        (gradient,) = torch.autograd.grad(block(x, bias), x)
    assert compiled_gradient.dtype == torch.bfloat16
    assert torch.equal(compiled_gradient, gradient)
