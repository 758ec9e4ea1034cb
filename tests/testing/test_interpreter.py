"""The interpreter's arithmetic against PyTorch's, where upstream's differs from a GPU's."""

import pytest
import sample_kernels as kernels
import torch

from fastdit.testing import VirtualGPU


@pytest.fixture(autouse=True)
def gpu():
    with VirtualGPU("sm_90") as gpu:
        yield gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("source", [torch.float32, torch.float64])
def test_casts_round_to_nearest_even(dtype, source):
    half = torch.finfo(dtype).eps / 2
    ties = torch.tensor([1 + half, 1 + 3 * half, -1 - half, 1 + half + 2e-6, 1 + half - 2e-6])
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 3e38, 1e-40])
    x = torch.cat([ties, special, torch.randn(116)]).to(source)
    out = torch.zeros(128, dtype=dtype)
    kernels.copy_and_cast[(1,)](x, out, BLOCK=128)
    assert torch.equal(out.nan_to_num(123), x.to(dtype).nan_to_num(123))
    back = torch.zeros(128, dtype=source)
    kernels.copy_and_cast[(1,)](out, back, BLOCK=128)
    assert torch.equal(back.nan_to_num(123), out.to(source).nan_to_num(123))


@pytest.mark.parametrize("dtype", [torch.int32, torch.float16])
def test_bfloat16_converts_to_other_types(dtype):
    x, out = (100 * torch.randn(64)).bfloat16(), torch.zeros(64, dtype=dtype)
    kernels.copy_and_cast[(1,)](x, out, BLOCK=64)
    assert torch.equal(out, x.to(dtype))


def test_bfloat16_arithmetic_is_on_numbers_not_bit_patterns():
    x, y = torch.randn(64).bfloat16(), torch.randn(64).bfloat16()
    out = torch.zeros(4, 64).bfloat16()
    kernels.bfloat16_arithmetic[(1,)](x, y, out, BLOCK=64)
    assert torch.equal(out, torch.stack([x * y, y - x, torch.minimum(x, y), 1.5 - x]))


def test_sums_of_bfloat16_are_of_numbers():
    x, out = torch.randn(4, 32).bfloat16(), torch.zeros(4).bfloat16()
    kernels.columns_sum[(4,)](x, out, 32, D=32)
    assert torch.equal(out, x.float().sum(1).bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_products(dtype):
    a, b = torch.randn(16, 32).to(dtype), torch.randn(32, 64).to(dtype)
    out = torch.zeros(16, 64, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    kernels.tile_product[(1,)](a, b, out, M=16, N=64, K=32, PRECISION="ieee")
    exact = a.double() @ b.double()
    tolerance = 1e-13 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=tolerance)


def test_tf32_products_lose_the_low_bits():
    a, b = torch.full((16, 16), 1 + 2**-10 + 2**-11), torch.eye(16)
    out = torch.zeros(16, 16)
    kernels.tile_product[(1,)](a, b, out, M=16, N=16, K=16, PRECISION="tf32")
    assert (out == 1 + 2**-10).all()


def test_blocks_too_small_for_the_target_are_refused():
    a, b = torch.ones(16, 8).half(), torch.ones(8, 16).half()
    with pytest.raises(AssertionError, match="K >= 16"):
        kernels.tile_product[(1,)](a, b, torch.zeros(16, 16), M=16, N=16, K=8, PRECISION="ieee")


def test_functions():
    x, out = torch.rand(64) + 0.1, torch.zeros(7, 64)
    kernels.many_functions[(1,)](x, out, BLOCK=64)
    wide = x.double()
    functions = (torch.exp, torch.log, torch.rsqrt, torch.erf, torch.sigmoid)
    expected = [f(wide) for f in functions] + [wide.cumsum(0), wide * wide + wide]
    torch.testing.assert_close(out.double(), torch.stack(expected), rtol=3e-6, atol=3e-7)


def test_libdevice():
    x, out = torch.randn(64), torch.zeros(64)
    kernels.tanh_of[(1,)](x, out, BLOCK=64)
    torch.testing.assert_close(out, x.tanh(), rtol=1e-6, atol=1e-7)


def test_helpers_and_tensors_with_strides():
    x = torch.randn(64)
    out = torch.zeros(64)
    kernels.keep_a_row[(1,)](x, out, BLOCK=64)
    torch.testing.assert_close(out, (x - x.mean()) * (x * x).sum(), rtol=1e-5, atol=1e-5)
