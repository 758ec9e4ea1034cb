"""A whole DiT-XL/2 through the native kernels: how many it launches, how many bytes they move.

Nothing is computed: the model runs on fake tensors, where each op of fastdit is one node. A node's
launches are those of the CUDA kernel registered for it, compiled for the shapes at hand; an op
whose kernel is not registered counts as the design's (`DESIGNED`). Eager PyTorch is counted on the
same model, one launch and one pass over its operands for an ATen op.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import fastdit
from fastdit import backends, reference
from fastdit.testing import VirtualGPU, count_traffic
from fastdit.testing.counting import Cost, tensor_bytes

BATCH = 32
NORMALISING = ("adaln", "gated_adaln", "gated_residual")

# Launches of ops that have no kernel yet; a backward is a pass and the sums of its partial sums.
# What attention runs is chosen by a table, on the device: one kernel forward, whichever it is.
DESIGNED = {
    "adaln": 1,
    "gated_adaln": 1,
    "gated_residual": 1,
    "attention": 1,
    "adaln_backward": 2,
    "gated_adaln_backward": 2,
    "gated_residual_backward": 2,
    "attention_backward": 3,
}

# The committed numbers; the conditioning does not depend on x, and a sampler can compute it before.
LAUNCHES = {"native": 245, "native, conditioning given": 228, "eager": 614}
REDUCTION_OF_TRAFFIC = 2.5


def on_meta(values: tuple) -> tuple:
    """Tensors by shape, strides and dtype only: hashable, and made meta tensors by `tensors`."""
    return tuple(
        (tuple(v.shape), v.stride(), v.dtype)
        if isinstance(v, Tensor)
        else (tuple(v) if isinstance(v, list) else v)
        for v in values
    )


def tensors(spec: tuple) -> tuple:
    return tuple(
        torch.empty_strided(s[0], s[1], dtype=s[2], device="meta")
        if isinstance(s, tuple) and s and isinstance(s[0], tuple)
        else s
        for s in spec
    )


@functools.cache
def native_cost(op: str, spec: tuple) -> Cost | None:
    """Launches and bytes of the kernel registered for `op`, each launch moving each of its tensors
    once; None where there is none."""
    args = tensors(spec)
    for kernel in backends.kernels_for(op, "cuda"):
        if "attention" not in op and kernel.unsupported(*args) is None:
            with VirtualGPU("sm_90", mode="compile") as gpu, count_traffic() as others:
                kernel.run(*args)
            moved = sum(
                tensor_bytes(tensor)
                for launch in gpu.launches
                for tensor in {
                    id(t): t for t in launch.arguments.values() if isinstance(t, Tensor)
                }.values()
            )
            return Cost(len(gpu.launches) + others.total_launches, moved, others.total_bytes)
    return None


class Counts:
    """What one run of the model launched, and the calls of fastdit's ops in it."""

    def __init__(self) -> None:
        self.calls: Counter[tuple[str, tuple]] = Counter()
        self.node_bytes: dict[tuple[str, tuple], int] = {}
        names = [name for op in backends.OPS for name in (op, f"{op}_backward")]
        self.costs = {f"fastdit::{name}": functools.partial(self._record, name) for name in names}

    def _record(self, name: str, args: tuple, _kwargs: Any, out: Any) -> Cost:
        key = (name, on_meta(args))
        self.calls[key] += 1
        outputs = (out,) if isinstance(out, Tensor) else out
        moved = [t for t in (*args, *outputs) if isinstance(t, Tensor)]
        self.node_bytes[key] = sum(map(tensor_bytes, moved))
        return Cost(0, 0, 0)  # counted by `launches` and `bytes`, after the run

    def launches(self) -> int:
        return sum(
            count * (cost.launches if (cost := native_cost(*key)) else DESIGNED[key[0]])
            for key, count in self.calls.items()
        )

    def normalising_bytes(self) -> int:
        return sum(
            count
            * (cost.loaded + cost.stored if (cost := native_cost(*key)) else self.node_bytes[key])
            for key, count in self.calls.items()
            if key[0].removesuffix("_backward") in NORMALISING
        )


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
    counts = Counts()
    dit.eval()
    with mode, torch.no_grad():
        with opaque_ops(), count_traffic(counts.costs) as native:
            dit(x, t, y)
        with count_traffic() as given:
            dit.conditioning(t, y)
        # Where gradients flow each layer computes its own modulations, as published.
        with fastdit.backend("reference"), torch.enable_grad(), count_traffic() as eager:
            dit(x, t, y)
    launched = native.total_launches + counts.launches()
    found = {
        "native": launched,
        "native, conditioning given": launched - given.total_launches,
        "eager": eager.total_launches,
    }
    assert found["native"] <= LAUNCHES["native"]
    assert found["native, conditioning given"] <= LAUNCHES["native, conditioning given"]
    assert found["eager"] == LAUNCHES["eager"]


def eager_bytes(op: str, spec: tuple) -> int:
    """Eager PyTorch's traffic of one call, forward and backward."""
    leaves = tuple(
        t.requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t
        for t in tensors(spec)
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
    counts = Counts()
    dit.train()
    with mode, opaque_ops(), count_traffic(counts.costs):
        dit(x, t, y).float().square().mean().backward()
    native = counts.normalising_bytes()
    ops = Counter(op for op, _ in counts.calls.elements())
    assert [ops[op] for op in NORMALISING] == [1, 56, 0]
    assert [ops[f"{op}_backward"] for op in NORMALISING] == [1, 56, 0]
    forward = {key: n for key, n in counts.calls.items() if key[0] in NORMALISING}
    eager = sum(n * eager_bytes(*key) for key, n in forward.items())
    assert eager / native >= REDUCTION_OF_TRAFFIC
    # In passes over (B, N, D): each of the 57 takes eager 30, the design 10 and partial sums 0.7.
    tokens = BATCH * 256 * 1152 * 2
    assert eager == pytest.approx(57 * 29.8 * tokens, rel=0.01)
    assert native <= 57 * 10.7 * tokens
