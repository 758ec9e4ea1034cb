"""Count the kernels that PyTorch code launches and the bytes they must move, without running it.

Works on tensors of any device; with meta or fake tensors nothing is computed and no memory is
needed. One ATen op counts as one kernel that loads each of its inputs and stores each of its
outputs once, which is what eager CUDA does but for a few ops (a layer norm's backward is two).
Views and allocations are free.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_FREE = {
    "aten::_local_scalar_dense",
    "aten::_reshape_alias",
    "aten::_unsafe_view",
    "aten::detach",
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::lift_fresh",
    "aten::new_empty",
    "aten::new_empty_strided",
    "aten::promote_types",
}
_OVERWRITE = {"aten::copy_", "aten::fill_", "aten::zero_"}  # do not read their first argument
_GATHER = {"aten::embedding", "aten::gather", "aten::index", "aten::index_select"}


@dataclass(frozen=True)
class Cost:
    """What one call costs: kernels launched, bytes loaded and stored."""

    launches: int
    loaded: int
    stored: int


@dataclass
class Traffic:
    """Counts by op, such as `"aten::native_layer_norm"`; flop are of matrix products and SDPA."""

    launches: collections.Counter[str] = field(default_factory=collections.Counter)
    loaded: collections.Counter[str] = field(default_factory=collections.Counter)
    stored: collections.Counter[str] = field(default_factory=collections.Counter)
    flops: collections.Counter[str] = field(default_factory=collections.Counter)

    @property
    def total_launches(self) -> int:
        return self.launches.total()

    @property
    def total_bytes(self) -> int:
        return self.loaded.total() + self.stored.total()

    @property
    def total_flops(self) -> int:
        return self.flops.total()

    def bytes(self, op: str) -> int:
        """Loaded and stored by all calls of one op."""
        return self.loaded[op] + self.stored[op]


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Bytes of the distinct elements: an expanded dimension (stride 0) counts once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride != 0 else min(size, 1)
    return elements * tensor.element_size()


def _cost(op: torch._ops.OpOverload, args: Any, kwargs: Any, out: Any) -> Cost:
    name = op._schema.name
    inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    outputs = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
    # The same tensor twice (x·x) is loaded once.
    loads = list({id(t): t for t in inputs}.values())
    stored = sum(map(tensor_bytes, outputs))
    if name in _OVERWRITE:
        loads = inputs[1:]
    if name in _GATHER:
        return Cost(1, stored + sum(map(tensor_bytes, inputs[1:])), stored)
    return Cost(1, sum(map(tensor_bytes, loads)), stored)


class count_traffic(TorchDispatchMode):
    """Count what the code inside the block launches and moves.

        with torch.device("meta"), count_traffic() as traffic:
            model(x)
        traffic.total_launches, traffic.total_bytes

    Args:
        costs: for ops whose kernels do something else than load every input and store every
            output once: op name to a function of `(args, kwargs, output)` that returns a `Cost`.

    Triton launches are not ops: count those in `VirtualGPU.launches`.
    """

    def __init__(self, costs: Mapping[str, Callable[[Any, Any, Any], Cost]] | None = None) -> None:
        super().__init__()
        self.costs = dict(costs or {})
        self.traffic = Traffic()

    def __enter__(self) -> Traffic:
        super().__enter__()
        return self.traffic

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = op(*args, **kwargs)
        name = op._schema.name
        if op.is_view or name in _FREE or name.startswith("prim"):
            return out
        if name in self.costs:
            cost = self.costs[name](args, kwargs, out)
        else:
            cost = _cost(op, args, kwargs, out)
        self.traffic.launches[name] += cost.launches
        self.traffic.loaded[name] += cost.loaded
        self.traffic.stored[name] += cost.stored
        packet = op.overloadpacket
        if packet in flop_registry:
            self.traffic.flops[name] += flop_registry[packet](*args, **kwargs, out_val=out)
        return out
