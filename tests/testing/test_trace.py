"""Traffic, flops and faults of the interpreter's trace, against counts by hand."""

import pytest
import sample_kernels as kernels
import torch

from fastdit.testing import KernelFault, VirtualGPU, trace


def traced(kernel, grid, *args, **kwargs):
    (launch,) = trace(lambda: kernel[grid](*args, **kwargs))
    return launch.trace


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_lanes_move_nothing(dtype):
    x, out = torch.ones(1000, dtype=dtype), torch.zeros(1000, dtype=dtype)
    found = traced(kernels.vector_add, (4,), x, x.clone(), out, 1000, BLOCK=256)
    size = 1000 * x.element_size()
    assert found.loaded == found.unique_loaded == {"x_ptr": size, "y_ptr": size}
    assert found.stored == found.unique_stored == {"out_ptr": size}
    assert found.flops == {"elementwise": 1024}
    assert found.bytes == found.unique_bytes == 3 * size
    assert found.faults() == []


def test_bytes_loaded_again_are_not_unique():
    x, out = torch.randn(64), torch.zeros(8)
    found = traced(kernels.columns_sum, (8,), x, out, 0, D=64)
    assert found.loaded == {"x_ptr": 8 * 256}
    assert found.unique_loaded == {"x_ptr": 256}
    assert found.flops == {"reduction": 512}


def test_views_of_one_storage_are_told_apart():
    whole = torch.randn(4, 3, 32)
    x, _, out = whole.unbind(1)
    found = traced(kernels.columns_sum, (4,), x, out, whole.stride(0), D=32)
    assert found.loaded == {"x_ptr": 4 * 128}
    assert found.stored == {"out_ptr": 4 * 4}
    assert found.faults() == []


def test_an_access_beside_a_view_is_out_of_bounds_inside_its_storage():
    whole, out = torch.arange(64.0), torch.zeros(64)
    found = traced(kernels.unmasked_copy, (1,), whole[:48], out, BLOCK=64)
    (fault,) = found.out_of_bounds
    assert (fault.kind, fault.lanes, fault.nearest, fault.offset) == ("load", 16, "x_ptr", 192)
    assert torch.equal(out, torch.where(torch.arange(64) < 48, whole, 0))


@pytest.mark.parametrize(("start", "faults"), [(-1, 1), (0, 0), (1, 1)])
def test_an_access_half_outside_a_view_is_out_of_bounds(start, faults):
    x, out = torch.arange(4, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    found = traced(kernels.load_a_pair, (1,), x[1:3], out, start)
    assert len(found.out_of_bounds) == faults
    assert out.item() == (0 if faults else 2 << 32 | 1)


def test_out_of_bounds_stores_are_reported_and_not_carried_out():
    storage = torch.zeros(64)
    with VirtualGPU("sm_90"), pytest.raises(KernelFault, match=r"store of 14 lanes.*\(1, 0, 0\)"):
        kernels.unmasked_copy[(2,)](torch.ones(64), storage[:50], BLOCK=32)
    assert torch.equal(storage, (torch.arange(64) < 50).float())


def test_two_programs_storing_one_element_is_a_race():
    x, out = torch.randn(62), torch.zeros(62)
    found = traced(kernels.overlapping_copy, (2,), x, out, STEP=30, BLOCK=32)
    assert found.races == {"out_ptr": 2 * 4}
    assert found.stored["out_ptr"] - found.unique_stored["out_ptr"] == 2 * 4
    with VirtualGPU("sm_90"), pytest.raises(KernelFault, match=r"8 bytes of 'out_ptr'.*twice"):
        kernels.overlapping_copy[(2,)](x, out, STEP=30, BLOCK=32)
    assert traced(kernels.overlapping_copy, (2,), x, out, STEP=30, BLOCK=16).races == {}


def test_two_lanes_storing_one_element_is_a_race():
    assert traced(kernels.one_cell_store, (1,), torch.zeros(16), BLOCK=32).races == {"out_ptr": 64}


def test_loading_what_another_program_stores_is_a_hazard():
    found = traced(kernels.shift_in_place, (3,), torch.randn(64 * 4), BLOCK=64)
    assert found.hazards == {"x_ptr": 2 * 64 * 4}
    x = torch.randn(64)
    assert traced(kernels.unmasked_copy, (2,), x, x, BLOCK=32).hazards == {}


def test_atomics_are_counted_and_no_race():
    counter = torch.zeros(2)
    found = traced(kernels.count_up, (3,), counter, BLOCK=32)
    assert counter.tolist() == [48, 48]
    assert found.atomics == {"counter_ptr": 3 * 32 * 4}
    assert found.races == found.hazards == {}


def test_flops_of_a_product():
    a, b, out = torch.randn(16, 32), torch.randn(32, 16), torch.zeros(16, 16)
    found = traced(kernels.tile_product, (1,), a, b, out, M=16, N=16, K=32, PRECISION="ieee")
    assert found.flops["dot"] == 2 * 16 * 16 * 32


def test_tracing_can_be_switched_off():
    with VirtualGPU("sm_90", trace=False) as gpu:
        kernels.overlapping_copy[(2,)](torch.ones(62), torch.zeros(62), STEP=30, BLOCK=32)
    assert gpu.launches[0].trace is None
