"""Direct calls into the compiled library, past PyTorch's dispatcher: csrc/cpu/direct.cpp.

A direct call takes the schema arguments of one op, unchecked, and returns what the public function
returns; NotImplemented where they are in order and only autograd has to see the call; or None, and
the ordinary call has to decide.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad, profiler

from fastdit import native


@functools.cache
def _constants() -> tuple[Any, ...]:
    """The `Constants` of csrc/cpu/direct.cpp, in its order."""
    watching = (
        (torch._C._len_torch_dispatch_stack, 0),
        (torch._C._len_torch_function_stack, 0),
        (torch._C._is_tracing, False),
    )
    variables = (
        (vars(forward_ad), "_current_level", -1),
        (vars(profiler), "_is_profiler_enabled", False),
    )
    if not all(name in module for module, name, _outside in variables):
        raise AttributeError("one of PyTorch's private variables is gone")
    # What torch.compile's code allocates with, in half of empty_like's time, or None.
    guards = getattr(torch._C._dynamo, "guards", None)
    return (
        *(None, NotImplemented, True, False, "layer", "rms", "silu", "gelu", "gelu_tanh"),
        *(torch.float32, torch.bfloat16, torch.float16),
        *(torch.Tensor, torch.nn.Parameter, int),
        *(torch.empty_like, getattr(guards, "_empty_strided_cpu", None)),
        torch.empty(0).is_neg,
        "requires_grad",
        torch._C._increment_version,
        watching,
        variables,
    )


def direct_call(name: str) -> Callable[..., Any] | None:
    """The direct call of an op, or None where this PyTorch or this Python does not allow one."""
    capsule = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        return None
    try:
        constants = _constants()
    except AttributeError:  # another PyTorch: one of its private functions is gone
        return None
    make = ctypes.PyDLL(str(native.load()[0])).fastdit_direct_call
    make.argtypes = (ctypes.c_char_p, ctypes.py_object, ctypes.py_object)
    make.restype = ctypes.py_object
    try:
        return make(name.encode(), constants, capsule)
    except ValueError:  # a null pointer: no Python to be found
        return None
