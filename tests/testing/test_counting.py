"""Kernels and bytes of PyTorch code, and the times modelled from them, against sums by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from fastdit.testing import Cost, count_traffic, roofline


def modulated(x, shift, scale):
    x = F.layer_norm(x, (x.shape[-1],))
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_modulated_layer_norm(device):
    b, n, d = 2, 8, 16
    x, shift, scale = (torch.ones(s, device=device) for s in ((b, n, d), (b, d), (b, d)))
    with count_traffic() as traffic:
        modulated(x, shift, scale)
    assert dict(traffic.launches) == {"aten::native_layer_norm": 1, "aten::add": 2, "aten::mul": 1}
    row, statistics, image = 4 * b * d, 2 * 4 * b * n, 4 * b * n * d
    assert traffic.bytes("aten::native_layer_norm") == 2 * image + statistics
    assert traffic.bytes("aten::mul") == 2 * image + row
    assert traffic.bytes("aten::add") == (2 * row) + (2 * image + row)
    assert traffic.total_launches == 4
    assert traffic.total_bytes == 6 * image + 4 * row + statistics


def test_fake_tensors_count_alike():
    with FakeTensorMode(), count_traffic() as traffic:
        modulated(torch.ones(2, 8, 16), torch.ones(2, 16), torch.ones(2, 16))
    assert traffic.total_launches == 4 + 3


def test_views_and_allocations_are_free():
    x = torch.randn(4, 6)
    with count_traffic() as traffic:
        x.t().reshape(2, 12)[0].view(3, 4).expand(5, 3, 4)
        torch.empty_like(x).new_empty(3)
    assert traffic.launches == {"aten::clone": 1}  # reshape of a transposed matrix copies


def test_expanded_and_repeated_inputs_are_loaded_once():
    x, row = torch.randn(4, 8), torch.randn(8)
    with count_traffic() as traffic:
        row.expand(4, 8) + x
        x * x
    assert traffic.loaded == {"aten::add": 4 * (8 + 32), "aten::mul": 4 * 32}


def test_in_place_ops_and_copies():
    x = torch.zeros(8)
    with count_traffic() as traffic:
        x.add_(1)
        x.copy_(torch.ones(8, dtype=torch.float16))
        x.zero_()
    assert traffic.loaded == {
        "aten::add_": 32,
        "aten::ones": 0,
        "aten::copy_": 16,
        "aten::zero_": 0,
    }
    assert traffic.stored["aten::copy_"] == traffic.stored["aten::zero_"] == 32


def test_gathers_load_only_what_they_take():
    with count_traffic() as traffic:
        F.embedding(torch.tensor([1, 2]), torch.randn(1000, 8))
    assert traffic.loaded["aten::embedding"] == 2 * 8 * 4 + 2 * 8


def test_flops_of_matrix_products():
    with torch.device("meta"), count_traffic() as traffic:
        torch.empty(4, 5) @ torch.empty(5, 6)
        F.linear(torch.empty(3, 4, 5), torch.empty(7, 5), torch.empty(7))
    assert traffic.total_flops == 2 * 4 * 5 * 6 + 2 * 12 * 5 * 7


def test_costs_of_ops_that_are_not_one_pass():
    two = {"aten::mul": lambda args, kwargs, out: Cost(2, 10, out.numel())}
    with count_traffic(costs=two) as traffic:
        torch.ones(3) * 2
    assert traffic.launches["aten::mul"] == 2
    assert traffic.bytes("aten::mul") == 13


def test_gradients_are_counted():
    x = torch.randn(3, 4, requires_grad=True)
    with count_traffic() as traffic:
        (x @ torch.randn(4, 2)).sum().backward()
    assert traffic.launches["aten::mm"] == 2


@pytest.mark.parametrize(
    ("gpu", "counts", "bound", "microseconds"),
    [
        ("H100", {"bytes": 38e6}, "memory", 38e6 / 0.92 / 3.35e6),
        ("A100", {"bytes": 38e6}, "memory", 38e6 / 0.92 / 2.039e6),
        ("B200", {"bytes": 0, "tensor_flops": 1.8e12}, "tensor", 1.8e12 / 0.8 / 2250e6),
        ("H100", {"bytes": 1e6, "warp_instructions": 1e8}, "issue", 1e8 / (132 * 4 * 1980)),
        ("H100", {"bytes": 0, "fp32_flops": 66.9e7}, "fp32", 10),
        ("H100", {"bytes": 1e3, "launches": 4}, "launch", 6),
    ],
)
def test_roofline(gpu, counts, bound, microseconds):
    found = roofline(gpu, **counts)
    assert found.bound == bound
    assert found.modelled_seconds * 1e6 == pytest.approx(microseconds)
    assert str(found) == f"modelled {microseconds:.2f} µs on {gpu} ({bound}-bound)"


def test_waves():
    found = roofline("A100", bytes=1, blocks=108 * 8 + 54, blocks_per_multiprocessor=4)
    assert (found.waves, found.last_wave) == (3, 0.125)


def test_a_roofline_refuses_what_it_cannot_model():
    with pytest.raises(ValueError, match="bytes: got -1"):
        roofline("H100", bytes=-1)
    with pytest.raises(ValueError, match=r"sm_90 \(H100\)"):
        roofline("V100", bytes=1)
