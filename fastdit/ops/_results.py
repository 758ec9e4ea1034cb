"""Results written into tensors that the caller gives: `out=`, as PyTorch's own functions have it.

An op that takes `out` writes into it and returns it. Without gradients only; the tensors have the
results' shape, dtype and device and are contiguous, and PyTorch's version counter tells a backward
that had saved one. Where the op reads and writes element by element, `out` may be one of its
inputs: each public function says which. Any other overlap is an error.

A kernel that can, writes there at once; elsewhere, under torch.compile, a mode or a transform, the
op makes its result and copies it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdit.ops import _checks


def given(
    out: Any,
    names: tuple[str, ...],
    wanted: int | None,
    like: Tensor,
    shape: Sequence[int] | None = None,
) -> tuple[Tensor | None, ...]:
    """`out` as a tuple of one tensor for each of the results `names`, all like `like`, of `shape`
    where that differs; None behind the first `wanted`.

    Raises:
        ValueError, TypeError: not as many tensors, or a tensor's shape, dtype, device or layout.
    """
    several = len(names) > 1
    if several and not (isinstance(out, tuple | list) and len(out) == len(names)):
        got = f"{len(out)} of them" if isinstance(out, tuple | list) else type(out).__name__
        raise TypeError(f"out: got {got}, allowed is a tuple ({', '.join(names)})")
    tensors = tuple(out) if several else (out,)
    for index, tensor in enumerate(tensors):
        name = _name(index, names)
        if wanted is not None and index >= wanted:
            if tensor is not None:
                allowed = f"None where {names[index]} is not wanted"
                raise TypeError(f"{name}: got {type(tensor).__name__}, allowed is {allowed}")
            continue
        _checks.like(name, tensor, like, shape)
        if not tensor.is_contiguous():
            got = f"{_checks.described(tensor)} with strides {tuple(tensor.stride())}"
            _checks.fail(name, got, "a contiguous tensor")
    return tensors


def _name(index: int, names: tuple[str, ...]) -> str:
    return f"out[{index}]" if len(names) > 1 else "out"


def _bytes(tensor: Tensor) -> tuple[int, int]:
    """The addresses of the first element and behind the last."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in sizes)
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def check_apart(
    names: tuple[str, ...],
    outs: tuple[Tensor | None, ...],
    inputs: dict[str, Any],
    replaceable: tuple[str, ...],
) -> None:
    """No two results overlap, and none overlaps an input, unless it is the whole of one that may be
    replaced.

    Raises:
        ValueError: which do.
    """
    taken: dict[str, Tensor] = {}
    for index, out in enumerate(outs):
        if out is None or not out.numel():
            continue
        name = _name(index, names)
        begin, end = _bytes(out)
        for source, value in {**inputs, **taken}.items():
            if not isinstance(value, Tensor) or not value.numel():
                continue
            first, last = _bytes(value)
            whole = (first, last) == (begin, end) and value.dtype == out.dtype
            if (
                begin < last
                and first < end
                and not (whole and source in replaceable and value.is_contiguous())
            ):
                own = (o for o in replaceable if getattr(inputs[o], "shape", None) == out.shape)
                own = " or ".join(f"all of a contiguous {other}" for other in own)
                allowed = f"{own}, or no input's memory" if own else "no input's memory"
                _checks.fail(name, f"a tensor that overlaps {source}", allowed)
        taken[name] = out


def refuse_gradients(name: str) -> None:
    """Of a call that autograd would have to see.

    Raises:
        RuntimeError: always, in PyTorch's words.
    """
    raise RuntimeError(
        f"{name}(): functions with out=... arguments don't support automatic differentiation, "
        "but one of the arguments requires grad."
    )


def copy_into(outs: tuple[Tensor | None, ...], results: Any) -> None:
    """Copy what is not there yet."""
    values = (results,) if isinstance(results, Tensor) else results
    for to, value in zip(outs, values, strict=True):
        if to is not None and to is not value:
            to.copy_(value)


def note_written(outs: tuple[Tensor | None, ...]) -> None:
    """Tell autograd of tensors that a kernel is about to write to."""
    torch.autograd.graph.increment_version([tensor for tensor in outs if tensor is not None])
