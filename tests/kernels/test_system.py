"""A whole DiT-XL/2 through the native kernels: how many it launches, how many bytes they move.

Nothing is computed: the model runs on fake tensors, where each op of fastdit is one node. A node's
launches are those of the CUDA kernel registered for it, compiled for the shapes at hand
(`fastdit.testing.fake_cuda`). Eager PyTorch is counted on the same model, one launch and one pass
over its operands for an ATen op.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import fastdit
from fastdit import backends, reference
from fastdit.testing import count_traffic
from fastdit.testing.counting import Cost
from fastdit.testing.fake_cuda import kernel_costs

BATCH = 32
NORMALISING = ("adaln", "gated_adaln", "gated_residual")

# The committed numbers; the conditioning does not depend on x, and a sampler can compute it before.
LAUNCHES = {"native": 245, "native, conditioning given": 228, "eager": 614}
REDUCTION_OF_TRAFFIC = 2.5


@contextlib.contextmanager
def opaque_ops(device: str = "cpu") -> Iterator[None]:
    """Inside, every op is one node of `torch.ops.fastdit`, as where a kernel is chosen."""

    def never(*_args: Any) -> None:
        raise AssertionError("a fake tensor reached a kernel")

    stubs = [backends.Kernel(op, device, "opaque", never) for op in backends.OPS]
    before = {op: list(backends.kernels_for(op, device)) for op in backends.OPS}
    for stub in stubs:
        backends.kernels_for(stub.op, device)[:] = [stub]
    try:
        with fastdit.backend("native"):
            yield
    finally:
        for op, kernels in before.items():
            backends.kernels_for(op, device)[:] = kernels


@pytest.fixture(scope="module")
def model():
    """A fake DiT-XL/2 in bfloat16, and its inputs."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with FakeTensorMode() as mode:
            dit = fastdit.DiT_models["DiT-XL/2"]()
            x = torch.empty(BATCH, 4, 32, 32)
            t, y = (torch.empty(BATCH, dtype=torch.long) for _ in range(2))
    finally:
        torch.set_default_dtype(default)
    return mode, dit, (x, t, y)


def test_launches_of_a_forward(model):
    mode, dit, (x, t, y) = model
    dit.eval()
    with mode, torch.no_grad():
        with opaque_ops(), count_traffic(kernel_costs()) as native:
            dit(x, t, y)
        with count_traffic() as given:
            dit.conditioning(t, y)
        # Where gradients flow each layer computes its own modulations, as published.
        with fastdit.backend("reference"), torch.enable_grad(), count_traffic() as eager:
            dit(x, t, y)
    found = {
        "native": native.total_launches,
        "native, conditioning given": native.total_launches - given.total_launches,
        "eager": eager.total_launches,
    }
    assert found["native"] <= LAUNCHES["native"]
    assert found["native, conditioning given"] <= LAUNCHES["native, conditioning given"]
    assert found["eager"] == LAUNCHES["eager"]


def eager_bytes(op: str, args: tuple) -> int:
    """Eager PyTorch's traffic of one call, forward and backward."""
    leaves = tuple(
        torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta", requires_grad=True)
        if isinstance(t, Tensor)
        else t
        for t in args
    )
    with count_traffic() as traffic:
        out = getattr(reference, op)(*leaves)
        outputs = (out,) if isinstance(out, Tensor) else out
        wanted = [t for t in leaves if isinstance(t, Tensor)]
        torch.autograd.grad(outputs, wanted, [torch.empty_like(o) for o in outputs])
    return traffic.total_bytes


def test_traffic_of_a_training_step(model):
    """Normalisation, modulation and gating, forward and backward: fused against eager."""
    mode, dit, (x, t, y) = model
    names = [name for op in NORMALISING for name in (op, f"{op}_backward")]
    calls: dict[str, list[tuple]] = {name: [] for name in names}
    costs = kernel_costs()

    def recorded(name: str, cost: Callable[..., Cost], args: tuple, kwargs: Any, out: Any) -> Cost:
        calls[name].append(args)
        return cost(args, kwargs, out)

    for name in names:
        key = f"fastdit::{name}"
        costs[key] = functools.partial(recorded, name, costs[key])
    dit.train()
    with mode, opaque_ops(), count_traffic(costs) as traffic:
        dit(x, t, y).float().square().mean().backward()
    assert [len(calls[name]) for name in names] == [1, 1, 56, 56, 0, 0]
    native = sum(traffic.bytes(f"fastdit::{name}") for name in names)
    eager = sum(eager_bytes(op, args) for op in NORMALISING for args in calls[op])
    assert eager / native >= REDUCTION_OF_TRAFFIC
    # In passes over (B, N, D): each of the 57 takes eager 30, the design 10 and partial sums 0.7.
    tokens = BATCH * 256 * 1152 * 2
    assert eager == pytest.approx(57 * 29.8 * tokens, rel=0.01)
    assert native <= 57 * 10.7 * tokens
