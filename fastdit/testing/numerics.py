"""The interpreter's instructions, replaced by ones that compute as a GPU does and are recorded.

Upstream's interpreter differs from a GPU without saying so (Triton 3.6 to 3.8); here
- bfloat16 values are numbers, not the 16-bit integers that store them, in `tl.dot`, `+`, `tl.sum`
  and all else; casts to bfloat16 round to nearest even instead of towards zero;
- `tl.dot` of fp32 with `input_precision="tf32"` drops the 13 low bits of its inputs;
- libdevice's common functions work.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter as upstream

from fastdit.testing.bfloat16 import bfloat16_to_float, float_to_bfloat16
from fastdit.testing.tracing import Recorder

Handle = upstream.TensorHandle
_Builder = upstream.InterpreterBuilder
_original = {
    name: getattr(_Builder, name)
    for name in (
        "binary_op",
        "cast_impl",
        "create_atomic_cas",
        "create_atomic_rmw",
        "create_dot",
        "create_fma",
        "create_fp_to_fp",
        "create_masked_load",
        "create_masked_store",
        "ternary_op",
        "unary_op",
    )
}
_original_apply = upstream.ReduceScanOpInterface.apply
_ARITHMETIC = (np.add, np.subtract, np.multiply, np.divide)


class _State:
    recorder: Recorder | None = None


_state = _State()


def _is_bfloat16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _number(handle: Any) -> Any:
    """The handle with its values as numpy numbers: bfloat16 becomes fp32."""
    return Handle(bfloat16_to_float(handle.data), tl.float32) if _is_bfloat16(handle) else handle


def _count(kind: str, flops: int) -> None:
    if _state.recorder is not None:
        _state.recorder.flops[kind] += flops


def _in_numbers(name: str, *handles: Any, op: Any = ()) -> Any:
    """Run upstream's method on numbers; round a bfloat16 result again, leave a comparison's."""
    out = _original[name](upstream.interpreter_builder, *map(_number, handles), *op)
    if any(map(_is_bfloat16, handles)) and out.data.dtype == np.float32:
        return Handle(float_to_bfloat16(out.data), tl.bfloat16)
    return out


def _binary_op(_builder: Any, lhs: Any, rhs: Any, op: Any) -> Any:
    out = _in_numbers("binary_op", lhs, rhs, op=(op,))
    if op in _ARITHMETIC and lhs.dtype.scalar.is_floating():
        _count("elementwise", out.data.size)
    return out


def _unary_op(_builder: Any, arg: Any, op: Any) -> Any:
    if op not in (np.negative, np.floor, np.ceil, np.abs):
        _count("special", arg.data.size)
    return _in_numbers("unary_op", arg, op=(op,))


def _ternary_op(_builder: Any, lhs: Any, rhs: Any, other: Any, op: Any) -> Any:
    if op is np.where:  # a choice of bit patterns, its condition is no number
        return _original["ternary_op"](_builder, lhs, rhs, other, op)
    return _in_numbers("ternary_op", lhs, rhs, other, op=(op,))


def _fma(_builder: Any, x: Any, y: Any, z: Any) -> Any:
    _count("elementwise", 2 * z.data.size)
    return _in_numbers("create_fma", x, y, z)


def _cast(builder: Any, src: Any, dst_type: Any) -> Any:
    src, dst = _number(src), dst_type.scalar
    if dst == tl.bfloat16:
        return Handle(float_to_bfloat16(src.data.astype(np.float32)), dst)
    return _original["cast_impl"](builder, src, dst_type)


def _fp_to_fp(builder: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
    types_ = {src.dtype.scalar, dst_type.scalar}
    towards_zero = rounding_mode == ir.ROUNDING_MODE.RTZ
    if not towards_zero and types_ <= {tl.bfloat16, tl.float16, tl.float32, tl.float64}:
        return _cast(builder, src, dst_type)
    return _original["create_fp_to_fp"](builder, src, dst_type, rounding_mode)


def _dot(builder: Any, a: Any, b: Any, d: Any, input_precision: Any, imprecise_acc: Any) -> Any:
    *batch, m, k = a.data.shape
    _count("dot", 2 * math.prod(batch) * m * k * b.data.shape[-1])
    if a.dtype.primitive_bitwidth == 8 or not a.dtype.scalar.is_floating():
        return _original["create_dot"](builder, a, b, d, input_precision, imprecise_acc)
    left, right = _number(a).data, _number(b).data
    if a.dtype.scalar == tl.float32 and input_precision == ir.INPUT_PRECISION.TF32:
        left, right = _tf32(left), _tf32(right)
    accumulator = np.float64 if d.data.dtype == np.float64 else np.float32
    # torch, not numpy: numpy's BLAS spins a thread per core on these small blocks, ten times
    # slower on a busy machine, and its thread count is fixed when it is first imported.
    operands = (torch.from_numpy(np.array(side, accumulator)) for side in (left, right))
    product = torch.matmul(*operands).numpy()
    total = (product + _number(d).data.astype(accumulator)).astype(accumulator)
    if _is_bfloat16(d):
        return Handle(float_to_bfloat16(total), tl.bfloat16)
    return Handle(total.astype(d.data.dtype), d.dtype.scalar)


def _tf32(values: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(values).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def _record(kind: str, pointers: Any, mask: Any, itemsize: int) -> Any:
    """The mask to go on with, once the access is recorded."""
    if _state.recorder is None:
        return mask
    lanes = None if mask is None else mask.data
    return Handle(_state.recorder.access(kind, pointers.data, lanes, itemsize), tl.int1)


def _masked_load(builder: Any, pointers: Any, mask: Any, other: Any, *modifiers: Any) -> Any:
    itemsize = upstream._get_np_dtype(pointers.get_element_ty()).itemsize
    mask = _record("load", pointers, mask, itemsize)
    return _original["create_masked_load"](builder, pointers, mask, other, *modifiers)


def _masked_store(builder: Any, pointers: Any, value: Any, mask: Any, *modifiers: Any) -> Any:
    mask = _record("store", pointers, mask, value.data.dtype.itemsize)
    return _original["create_masked_store"](builder, pointers, value, mask, *modifiers)


def _atomic_rmw(builder: Any, op: Any, pointers: Any, value: Any, mask: Any, *order: Any) -> Any:
    if _is_bfloat16(value):
        raise NotImplementedError("atomics on bfloat16 in the interpreter")
    mask = _record("atomic", pointers, mask, value.data.dtype.itemsize)
    return _original["create_atomic_rmw"](builder, op, pointers, value, mask, *order)


def _atomic_cas(builder: Any, pointers: Any, expected: Any, value: Any, *order: Any) -> Any:
    _record("atomic", pointers, None, value.data.dtype.itemsize)
    return _original["create_atomic_cas"](builder, pointers, expected, value, *order)


def _retyped(tensor: Any, handle: Any) -> Any:
    """A tensor of the same shape with another handle."""
    block = tensor.type.is_block()
    return tl.tensor(handle, tl.block_type(handle.dtype, tensor.shape) if block else handle.dtype)


def _reduce_or_scan(self: Any, inputs: Any) -> Any:
    """Reductions and scans in fp32 for bfloat16 inputs, rounded once at the end."""
    if not isinstance(inputs, tuple):
        return _reduce_or_scan(self, (inputs,))[0]
    _count("reduction", sum(t.handle.data.size for t in inputs if t.dtype.is_floating()))
    numbers = tuple(_retyped(t, _number(t.handle)) for t in inputs)
    return tuple(
        _retyped(result, Handle(float_to_bfloat16(result.handle.data), tl.bfloat16))
        if t.dtype == tl.bfloat16 and result.dtype == tl.float32
        else result
        for t, result in zip(inputs, _original_apply(self, numbers), strict=False)
    )


_LIBDEVICE: dict[str, Callable[..., torch.Tensor]] = {
    function.__name__: function
    for function in (
        torch.tanh,
        torch.erf,
        torch.erfc,
        torch.exp,
        torch.exp2,
        torch.expm1,
        torch.log,
        torch.log2,
        torch.log10,
        torch.log1p,
        torch.sqrt,
        torch.rsqrt,
        torch.sin,
        torch.cos,
        torch.tan,
        torch.asin,
        torch.acos,
        torch.atan,
        torch.atan2,
        torch.sinh,
        torch.cosh,
        torch.asinh,
        torch.acosh,
        torch.atanh,
        torch.pow,
        torch.fmod,
        torch.floor,
        torch.ceil,
        torch.trunc,
        torch.copysign,
        torch.hypot,
    )
} | {"rint": torch.round, "fma": lambda x, y, z: x * y + z, "div": torch.div}


def _extern(_builder: Any, _lib: str, _path: str, symbol: str, args: Any, *_: Any) -> Any:
    """libdevice's `__nv_tanhf` and the like; an approximate form is computed exactly."""
    function = _LIBDEVICE.get(symbol.removeprefix("__nv_").replace("fast_", "").removesuffix("f"))
    function = function or _LIBDEVICE.get(symbol.removeprefix("__nv_"))
    if function is None:
        raise NotImplementedError(f"{symbol} in the interpreter")
    values = np.broadcast_arrays(*(arg.data for arg in args))
    _count("special", values[0].size)
    result = function(*(torch.from_numpy(np.array(value)) for value in values)).numpy()
    return Handle(result, args[0].dtype.scalar)


def libdevice_function(name: str) -> Callable[..., Any]:
    """`triton.language.extra.libdevice`'s functions are empty until a back end replaces them."""

    def call(*args: Any, **_: Any) -> Any:
        tensors = [upstream.interpreter_semantic.to_tensor(arg) for arg in args]
        handle = _extern(None, "libdevice", "", f"__nv_{name}", [t.handle for t in tensors])
        return tl.tensor(handle, max(tensors, key=lambda t: t.handle.data.size).type)

    return call


_REPLACED = {
    "binary_op": _binary_op,
    "unary_op": _unary_op,
    "ternary_op": _ternary_op,
    "create_fma": _fma,
    "cast_impl": _cast,
    "create_fp_to_fp": _fp_to_fp,
    "create_dot": _dot,
    "create_masked_load": _masked_load,
    "create_masked_store": _masked_store,
    "create_atomic_rmw": _atomic_rmw,
    "create_atomic_cas": _atomic_cas,
    "create_extern_elementwise": _extern,
    "get_bf16": lambda _builder, value: Handle(
        float_to_bfloat16(np.array([value], np.float32)), tl.bfloat16
    ),
}


@contextlib.contextmanager
def installed(recorder: Recorder | None) -> Iterator[None]:
    """Inside, the interpreter computes with this module and records to `recorder`, if any."""
    reductions = upstream.ReduceScanOpInterface
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(_state, "recorder", recorder))
        stack.enter_context(mock.patch.object(reductions, "apply", _reduce_or_scan))
        for name, function in _REPLACED.items():
            stack.enter_context(mock.patch.object(_Builder, name, function, create=True))
        stack.enter_context(np.errstate(all="ignore"))
        yield
