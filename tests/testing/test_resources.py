"""Registers, spills, access widths and occupancy, against counts by hand."""

import pytest
import sample_kernels as kernels
import torch

from fastdit.testing import VirtualGPU, inspect, occupancy
from fastdit.testing.resources import is_wide

NVIDIA = ["sm_80", "sm_90", "sm_100", "sm_120"]


def compiled(arch, kernel, shapes, dtype=torch.float32, **options):
    tensors = [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]
    with VirtualGPU(arch, mode="compile"):
        return inspect(kernel[(1,)](*tensors, **options))


@pytest.mark.parametrize("arch", [*NVIDIA, "gfx942"])
def test_contiguous_rows_are_accessed_128_bits_at_a_time(arch):
    # 8 elements a thread: two 16-byte accesses of each tensor.
    threads = 64 if arch == "gfx942" else 32
    found = compiled(arch, kernels.unmasked_copy, [4096, 4096], BLOCK=8 * 4 * threads)
    assert (found.loads_wide, found.loads_narrow) == (2, 0)
    assert (found.stores_wide, found.stores_narrow) == (2, 0)
    assert found.spills == found.stack_bytes == found.tensor_core == 0
    assert 0 < found.registers <= 40
    assert found.num_warps == 4
    assert found.name == "unmasked_copy"


@pytest.mark.parametrize("arch", ["sm_80", "gfx942"])
def test_strided_rows_are_not(arch):
    found = compiled(arch, kernels.strided_copy, [1024, 256], STRIDE=3, BLOCK=256, num_warps=4)
    assert found.loads_wide == 0
    assert found.loads_narrow in (1, 2, 4)


def test_a_prefetch_size_is_no_width():
    assert is_wide("LDG.E.LTC128B.128.CONSTANT")
    assert not is_wide("LDG.E.LTC128B.64.CONSTANT")
    assert not is_wide("LDGSTS.E.LTC128B")


def test_spills_show_as_stack_and_local_accesses():
    row = [4096, 4096]
    healthy = compiled("sm_80", kernels.keep_a_row, row, BLOCK=4096, num_warps=4)
    spilled = compiled("sm_80", kernels.keep_a_row, row, BLOCK=4096, num_warps=1, maxnreg=64)
    assert (healthy.spills, healthy.stack_bytes) == (0, 0)
    assert spilled.spill_loads > 0
    assert spilled.spill_stores > 0
    assert spilled.stack_bytes > 0
    assert spilled.registers == 64


@pytest.mark.parametrize("arch", [*NVIDIA, "gfx942"])
def test_tensor_core_instructions(arch):
    shapes = [(64, 64), (64, 64), (64, 64)]
    found = compiled(
        arch, kernels.tile_product, shapes, torch.float16, M=64, N=64, K=64, PRECISION="ieee"
    )
    # 64³ multiply-adds on 4 warps: HMMA 16×8×16, HGMMA 64×64×16, UTCHMMA 64×64×16,
    # v_mfma 32×32×8 or 16×16×16.
    allowed = {"sm_80": {32}, "sm_90": {4}, "sm_100": {4}, "sm_120": {32}, "gfx942": {8, 16}}
    assert found.tensor_core in allowed[arch]


def test_products_in_ieee_fp32_use_no_tensor_core():
    shapes = [(32, 32), (32, 32), (32, 32)]
    options = {"M": 32, "N": 32, "K": 32}
    plain = compiled("sm_80", kernels.tile_product, shapes, PRECISION="ieee", **options)
    assert plain.tensor_core == 0
    assert compiled("sm_80", kernels.tile_product, shapes, PRECISION="tf32", **options).tensor_core


@pytest.mark.parametrize(
    ("arch", "registers", "shared_kib", "warps", "blocks", "fraction", "limit"),
    [
        ("sm_80", 32, 0, 8, 8, 1.0, "warps"),
        ("sm_80", 40, 0, 8, 6, 0.75, "registers"),
        ("sm_80", 255, 0, 4, 2, 0.125, "registers"),
        ("sm_80", 96, 0, 1, 20, 0.3125, "registers"),  # 21 warps fit, in fours 20
        ("sm_80", 16, 0, 1, 32, 0.5, "blocks"),
        ("sm_90", 32, 100, 4, 2, 0.125, "shared memory"),
        ("H100", 168, 113, 4, 2, 0.125, "shared memory"),
        ("H100", 168, 114, 4, 1, 0.0625, "shared memory"),  # 1 KiB of each block is reserved
        ("sm_120", 36, 0, 8, 6, 1.0, "warps"),
        ("gfx942", 128, 0, 4, 4, 0.5, "registers"),
        ("gfx942", 32, 33, 4, 1, 0.125, "shared memory"),
    ],
)
def test_occupancy(arch, registers, shared_kib, warps, blocks, fraction, limit):
    found = occupancy(arch, registers, 1024 * shared_kib, warps)
    assert (found.blocks, found.fraction, found.limit) == (blocks, fraction, limit)
