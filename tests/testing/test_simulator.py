"""Compiled Triton kernels in the simulator: numbers against PyTorch, counts by hand."""

import pytest
import sample_kernels as kernels
import torch

from fastdit.testing import MemoryFault, VirtualGPU, simulate

ARCHITECTURES = ["sm_80", "sm_90", "sm_100", "sm_120"]


def simulated(kernel, grid, *args, arch="sm_80", **kwargs):
    with VirtualGPU(arch, mode="simulate") as gpu:
        kernel[grid](*args, **kwargs)
    return gpu.launches[0].simulation


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_coalesced_traffic(arch):
    x, y, out = torch.randn(1024), torch.randn(1024), torch.zeros(1024)
    found = simulated(kernels.vector_add, (2,), x, y, out, 1024, BLOCK=512, arch=arch)
    assert torch.equal(out, x + y)
    # 2 blocks of 4 warps, each one 512-byte request of each tensor.
    assert (found.loads.requests, found.stores.requests) == (16, 8)
    assert found.loads.widths == {128: 16}
    assert (found.loads.sectors, found.stores.sectors) == (256, 128)
    assert found.loads.bytes == found.loads.dram_bytes == 8192
    assert found.dram_bytes == 3 * 4096
    assert found.loads.efficiency == found.stores.efficiency == 1.0
    assert found.divergent_branches == 0
    assert (found.blocks, found.threads_per_block) == (2, 128)


def test_masked_lanes_move_nothing():
    x, y, out = torch.randn(1000), torch.randn(1000), torch.zeros(1000)
    found = simulated(kernels.vector_add, (4,), x, y, out, 1000, BLOCK=256)
    assert torch.equal(out, x + y)
    assert (found.loads.bytes, found.stores.bytes) == (8000, 4000)


def test_strided_traffic():
    x, out = torch.randn(1024), torch.zeros(128)
    found = simulated(kernels.strided_copy, (1,), x, out, STRIDE=8, BLOCK=128)
    assert torch.equal(out, x[::8])
    assert (found.loads.requests, found.loads.sectors) == (4, 128)
    assert found.loads.efficiency == 0.125  # 4 of each 32 bytes
    assert found.loads.bytes == 512
    assert found.loads.dram_bytes == 4096


def test_a_view_off_by_one_element_touches_a_fifth_sector():
    x, out = torch.randn(129), torch.zeros(128)
    found = simulated(kernels.unmasked_copy, (1,), x[1:], out, BLOCK=128)
    assert torch.equal(out, x[1:])
    assert (found.loads.requests, found.loads.sectors, found.loads.least_sectors) == (4, 20, 16)
    assert found.loads.widths == {32: 4}


def test_rows_loaded_twice_cross_the_bus_once():
    x, out = torch.randn(128), torch.zeros(8)
    found = simulated(kernels.columns_sum, (8,), x, out, 0, D=128)
    torch.testing.assert_close(out, x.sum().expand(8))
    assert found.loads.bytes == 8 * 512
    assert found.loads.dram_bytes == 512


@pytest.mark.parametrize("arch", ["sm_80", "sm_120"])
@pytest.mark.parametrize(
    ("dtype", "precision", "tolerance"),
    [
        (torch.bfloat16, "ieee", 3e-5),
        (torch.float16, "ieee", 3e-5),
        (torch.float32, "ieee", 3e-5),
        (torch.float32, "tf32", 3e-2),
    ],
)
def test_products(arch, dtype, precision, tolerance):
    a, b = torch.randn(32, 64).to(dtype), torch.randn(64, 32).to(dtype)
    out, interpreted = torch.zeros(2, 32, 32)
    options = {"M": 32, "N": 32, "K": 64, "PRECISION": precision}
    found = simulated(kernels.tile_product, (1,), a, b, out, arch=arch, **options)
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=0, atol=tolerance)
    tensor_cores = dtype != torch.float32 or precision == "tf32"
    assert found.mma_flops == (2 * 32 * 32 * 64 if tensor_cores else 0)
    with VirtualGPU(arch):
        kernels.tile_product[(1,)](a, b, interpreted, **options)
    torch.testing.assert_close(out, interpreted, rtol=0, atol=3e-5)


def test_asynchronous_copies_arrive_when_waited_for():
    a, b, out = torch.randn(64, 256).half(), torch.randn(256, 64).half(), torch.zeros(64, 64)
    found = simulated(
        kernels.pipelined_product, (1,), a, b, out, 256, M=64, N=64, K=64, num_stages=3
    )
    assert found.opcodes["cp"] > 0
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=0, atol=1e-4)
    assert found.loads.dram_bytes == 2 * 64 * 256 * 2


@pytest.mark.parametrize("arch", ["sm_80", "sm_100"])
def test_functions_agree_with_the_interpreter(arch):
    x = torch.rand(128) + 0.1
    out, interpreted = torch.zeros(2, 7, 128)
    simulated(kernels.many_functions, (1,), x, out, BLOCK=128, arch=arch)
    with VirtualGPU(arch):
        kernels.many_functions[(1,)](x, interpreted, BLOCK=128)
    torch.testing.assert_close(out, interpreted, rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("arch", "dtype"),
    [("sm_80", torch.float16), ("sm_80", torch.bfloat16), ("sm_100", torch.bfloat16)],
)
def test_casts_round_to_nearest_even(arch, dtype):
    half = torch.finfo(dtype).eps / 2
    x = torch.cat([torch.tensor([1 + half, 1 + 3 * half, -1 - half, 3e38]), torch.randn(124)])
    out, back = torch.zeros(128, dtype=dtype), torch.zeros(128)
    simulated(kernels.copy_and_cast, (1,), x, out, BLOCK=128, arch=arch)
    assert torch.equal(out, x.to(dtype))
    simulated(kernels.copy_and_cast, (1,), out, back, BLOCK=128, arch=arch)
    assert torch.equal(back, out.float())


@pytest.mark.parametrize("arch", ["sm_80", "sm_100"])
def test_bfloat16_arithmetic(arch):
    x, y = torch.randn(128).bfloat16(), torch.randn(128).bfloat16()
    out = torch.zeros(4, 128).bfloat16()
    simulated(kernels.bfloat16_arithmetic, (1,), x, y, out, BLOCK=128, arch=arch)
    assert torch.equal(out, torch.stack([x * y, y - x, torch.minimum(x, y), 1.5 - x]))


def test_random_numbers_and_local_tables_agree_with_the_interpreter():
    out, interpreted = torch.zeros(2, 300)
    simulated(kernels.uniform_noise, (3,), out, 2**31 + 5, 300, BLOCK=128)
    with VirtualGPU("sm_80"):
        kernels.uniform_noise[(3,)](interpreted, 2**31 + 5, 300, BLOCK=128)
    torch.testing.assert_close(out, interpreted, rtol=1e-5, atol=1e-6)
    assert out.std() > 0.8


def test_atomics():
    counter = torch.zeros(2)
    found = simulated(kernels.count_up, (3,), counter, BLOCK=128)
    assert counter.tolist() == [192, 192]
    assert found.atomics > 0


def test_an_unmasked_tail_faults():
    with pytest.raises(MemoryFault, match=r"unmasked_copy.*load out of bounds"):
        simulated(kernels.unmasked_copy, (2,), torch.ones(96), torch.zeros(128), BLOCK=64)


def test_what_the_simulator_lacks_raises():
    a, b, out = torch.ones(64, 64).half(), torch.ones(64, 64).half(), torch.zeros(64, 64)
    with pytest.raises(NotImplementedError, match=r"wgmma|mbarrier|fence"):
        simulated(
            kernels.tile_product,
            (1,),
            a,
            b,
            out,
            M=64,
            N=64,
            K=64,
            PRECISION="ieee",
            arch="sm_90",
        )
    x = torch.empty(64, device="meta")
    with VirtualGPU("gfx942", mode="compile"):
        amd = kernels.unmasked_copy[(1,)](x, x, BLOCK=64)
    with pytest.raises(ValueError, match="without PTX"):
        simulate(amd, (1,), {})
