"""What code would launch on a GPU, counted on fake CUDA tensors where there is none.

    with FakeTensorMode(), CudaAttention(), count_traffic(kernel_costs()) as traffic:
        backward(model(x).square().mean())

`count_traffic` sees what PyTorch decides on the machine at hand, and two of its decisions ask for a
device: attention is decomposed into matrix products and a softmax over N x N scores instead of the
one kernel that a GPU gets, and the autograd engine looks for the device's streams before it runs.
Here attention is the kernel, and the graph is walked without the engine. An op of fastdit counts
as what its Triton kernels launch.

Fake CUDA tensors need a PyTorch that was built with CUDA, and no GPU; meta tensors count the same.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from fastdit import backends
from fastdit.testing.counting import Cost, count_traffic, tensor_bytes
from fastdit.testing.virtual import VirtualGPU

CHOSEN_ON_THE_DEVICE = {"attention": 1, "attention_backward": 3}
"""Launches of the op whose kernel a table chooses by the GPU."""
_TWO_IF_AFFINE = ("aten::native_layer_norm_backward", "aten::_fused_rms_norm_backward")


class CudaAttention(TorchFunctionMode):
    """Inside, `F.scaled_dot_product_attention` is the fused kernel that a GPU runs for it: the
    memory-efficient one for float32 or a mask, else FlashAttention."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (t.repeat_interleave(groups, -3) for t in (key, value))
    if attn_mask is None and query.dtype != torch.float32:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(
            ~attn_mask, -torch.inf
        )
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    grad = torch.is_grad_enabled() and query.requires_grad
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, attn_mask, grad, dropout_p, is_causal, scale=scale)[0]


def _order(root: Node) -> list[Node]:
    """Every node that `root` reaches, the last made first, which is the engine's order."""
    found, stack = {root}, [root]
    while stack:
        below = {node for node, _ in stack.pop().next_functions if node is not None} - found
        found |= below
        stack += below
    return sorted(found, key=lambda node: (not _leaf(node), node._sequence_nr()), reverse=True)


def _leaf(node: Node) -> bool:
    return hasattr(node, "variable")


def _run(node: Node, arrived: dict[int, Tensor]) -> Iterator[tuple[tuple[Node, int], Tensor]]:
    """The gradients that a node makes of those that arrived, each with the edge that it takes.
    A function in Python gets None for an output that has no gradient."""
    gradients = [arrived.get(i) for i in range(len(node._input_metadata))]
    if not isinstance(node, torch.autograd.function.BackwardCFunction):
        results = node(*gradients)
        results = results if isinstance(results, tuple) else (results,)
        pairs = zip(node.next_functions, results, strict=False)
        return ((edge, result) for edge, result in pairs if edge[0] is not None)
    results = node.apply(*gradients)
    results = results if isinstance(results, tuple) else (results,)
    wanted = [r for r, need in zip(results, node.needs_input_grad, strict=True) if need]
    edges = [edge for edge in node.next_functions if edge[0] is not None]
    return iter(zip(edges, wanted, strict=True))


def _like_input(gradient: Tensor, metadata: Any) -> Tensor:
    """A gradient in the shape and dtype of the tensor that it belongs to: summed over what was
    broadcast."""
    if gradient.shape != metadata.shape:
        gradient = gradient.sum_to_size(metadata.shape)
    return gradient.to(metadata.dtype)


@contextlib.contextmanager
def _one_backward() -> Iterator[None]:
    """Activation checkpointing recomputes once for each pass of the engine that it knows of."""
    with mock.patch.object(torch._C, "_current_graph_task_id", return_value=0):
        yield


@torch.no_grad()
def backward(loss: Tensor) -> dict[Tensor, Tensor]:
    """The gradients of a scalar with respect to the leaves that it depends on.

    Runs every node of the graph once, in topological order, as the autograd engine does; hooks of
    tensors do not run, and nothing is stored in `.grad`.
    """
    root = loss.grad_fn
    assert root is not None, "loss: got a tensor without a graph"
    waiting: dict[Node, dict[int, Tensor]] = {root: {0: torch.ones_like(loss)}}
    found: dict[Tensor, Tensor] = {}
    with _one_backward():
        for node in _order(root):
            arrived = waiting.pop(node, {})
            if _leaf(node):
                found[node.variable] = arrived[0]
                continue
            for (below, index), gradient in _run(node, arrived):
                if gradient is None:
                    continue
                gradient = _like_input(gradient, below._input_metadata[index])
                entry = waiting.setdefault(below, {})
                entry[index] = entry[index] + gradient if index in entry else gradient
    return found


def kernel_costs() -> dict[str, Callable[[Any, Any, Any], Cost]]:
    """For `count_traffic`: every op of fastdit by the kernels registered for CUDA, compiled for
    the shapes at hand; each launch moves each of its tensors once."""
    names = [name for op in backends.OPS for name in (op, f"{op}_backward")]
    ours = {f"fastdit::{name}": functools.partial(_cost, name) for name in names}
    return ours | dict.fromkeys(_TWO_IF_AFFINE, _norm_backward)


def _norm_backward(args: tuple[Any, ...], _kwargs: Any, out: Any) -> Cost:
    """PyTorch's own: one kernel for the input's gradient, one for the weight's and the bias's."""
    loaded, stored = _moved(args), _moved(out)
    return Cost(1 + any(args[-1][1:]), loaded, stored)


def _moved(values: Any) -> int:
    tensors = {id(t): t for t in tree_leaves(values) if isinstance(t, Tensor)}
    return sum(map(tensor_bytes, tensors.values()))


def _cost(op: str, args: tuple[Any, ...], _kwargs: Any, out: Any) -> Cost:
    if op in CHOSEN_ON_THE_DEVICE:
        return Cost(CHOSEN_ON_THE_DEVICE[op], _moved(args), _moved(out))
    with _disable_current_modes():
        return _compiled_cost(op, tuple(map(_spec, args)))


def _spec(value: Any) -> Any:
    """An argument that can be a key: a tensor by its shape, strides and dtype."""
    if isinstance(value, Tensor):
        return torch.Size(value.shape), value.stride(), value.dtype
    return tuple(value) if isinstance(value, list) else value


def _meta(spec: Any) -> Any:
    if isinstance(spec, tuple) and spec and isinstance(spec[0], torch.Size):
        return torch.empty_strided(spec[0], spec[1], dtype=spec[2], device="meta")
    return spec


@functools.cache
def _compiled_cost(op: str, spec: tuple[Any, ...]) -> Cost:
    args = tuple(map(_meta, spec))
    kernel = next(k for k in backends.kernels_for(op, "cuda") if k.unsupported(*args) is None)
    with VirtualGPU("sm_90", mode="compile") as gpu, count_traffic() as others:
        kernel.run(*args)
    moved = sum(_moved(list(launch.arguments.values())) for launch in gpu.launches)
    return Cost(len(gpu.launches) + others.total_launches, moved, others.total_bytes)
