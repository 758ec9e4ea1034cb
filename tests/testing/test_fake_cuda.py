"""Counting on fake CUDA tensors: the walk of the graph is the engine's, attention is one kernel."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

import fastdit
from fastdit.testing import count_traffic
from fastdit.testing.fake_cuda import CudaAttention, backward, kernel_costs

sys.path.insert(0, str(Path(__file__).parents[1] / "patching"))
import compare
import research

needs_cuda = pytest.mark.skipif(
    not torch.backends.cuda.is_built(), reason="this PyTorch cannot fake CUDA tensors"
)


def loss_of(name, patched):
    torch.manual_seed(0)
    model = compare.randomise(research.FAMILIES[name]()).eval()
    if patched:
        fastdit.patch(model, "fast")
    args = research.inputs(model, 16)
    return model, lambda: compare.outputs(model, lambda m: m(*args))[0].square().mean()


@pytest.mark.parametrize(
    ("name", "patched"), [("DiT", False), ("fast-DiT", True), ("LightningDiT, no shift", True)]
)
def test_the_walk_gives_the_engines_gradients_and_launches(name, patched):
    model, loss = loss_of(name, patched)
    value = loss()
    with count_traffic() as walked:
        found = backward(value)
    value = loss()
    with count_traffic() as run:
        value.backward()
    assert patched == any(name.startswith("fastdit::") for name in run.launches)
    assert walked.launches == run.launches
    assert walked.total_bytes == run.total_bytes
    with_gradient = [p for p in model.parameters() if p.grad is not None]
    assert set(found) == set(with_gradient)
    assert max(compare.ulps(found[p], p.grad) for p in with_gradient) < 32


def launched(q, mask=None):
    with CudaAttention(), count_traffic() as traffic:
        backward(F.scaled_dot_product_attention(q, q, q, attn_mask=mask).float().sum())
    names = {name.removeprefix("aten::_scaled_dot_product_") for name in traffic.launches}
    return {name for name in names if "attention" in name or "bmm" in name}


@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=needs_cuda)])
def test_attention_is_the_kernel_of_a_gpu(device):
    with FakeTensorMode():
        q = torch.empty(2, 4, 16, 72, device=device, requires_grad=True)
        names = {"efficient_attention", "efficient_attention_backward"}
        assert launched(q) == names
        keys = torch.empty(2, 1, 1, 16, device=device, dtype=torch.bool)
        assert launched(q, keys) == names
        half = torch.empty(2, 4, 16, 72, device=device, dtype=torch.bfloat16, requires_grad=True)
        assert launched(half) == {"flash_attention", "flash_attention_backward"}


def test_an_op_costs_what_its_kernel_launches():
    x = torch.empty(2, 16, 128, device="meta")
    shift, scale = torch.empty(2, 2, 128, device="meta").unbind(1)
    with count_traffic(kernel_costs()) as traffic:
        torch.ops.fastdit.adaln(x, shift, scale, None, None, 1e-6, "layer", True)
    assert traffic.total_launches == 1
    statistics = 2 * 2 * 16
    assert traffic.total_bytes == 4 * (2 * x.numel() + 2 * shift.numel() + statistics)
