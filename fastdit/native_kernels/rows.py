"""The row-wise ops of the compiled library, on CPUs: csrc/cpu/.

adaln, gated_adaln, gated_residual and bias_gelu and their backward. They take float32, bfloat16 and
float16 in any mixture that the ops allow, any width and any strides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdit import backends
from fastdit.native_kernels.direct import direct_call
from fastdit.ops import _library

NAMES = ("adaln", "gated_adaln", "gated_residual", "bias_gelu")
_WORTH_A_NODE = {
    "adaln": 1536,
    "gated_adaln": 1024,
    "gated_residual": 65536,
    "bias_gelu": 6144,
}
"""Elements of x from which a differentiated call is faster than eager, forward and backward
together: an autograd node in Python costs 40 µs, eager's nodes in C++ a few each. Without
gradients the kernels are faster at every size. (One thread, AVX-512; benchmarks/.)"""
STORED = (torch.float32, torch.bfloat16, torch.float16)


def unsupported(*args) -> str | None:
    """Why the kernels cannot run these arguments: a tensor of a dtype that they would round."""
    for value in args:
        if isinstance(value, Tensor) and value.dtype not in STORED:
            return f"a tensor is {value.dtype}; the kernel computes in float32"
    return None


def _slower(name: str) -> Callable[..., str | None]:
    least = _WORTH_A_NODE[name]

    def slower(x, *rest) -> str | None:
        if x.numel() >= least or not _library.differentiates((x, *rest)):
            return None
        return f"x has {x.numel()} elements; differentiated, eager PyTorch is faster below {least}"

    return slower


def kernel(name: str, run: Callable[..., Any] | None = None, **options) -> backends.Kernel:
    """The library's op `name`, or `run` around it, as a kernel on CPUs.

    The op has the schema of `torch.ops.fastdit`'s, and its fake.
    """
    torch.library.register_fake(f"fastdit_native::{name}", _library.DEFINITIONS[name].fake)
    op = getattr(torch.ops.fastdit_native, name).default
    return backends.Kernel(name, "cpu", "csrc", run or op, unsupported, **options)


KERNELS = (
    *(
        kernel(
            name,
            checks_arguments=True,
            direct=direct_call(name),
            slower=_slower(name),
            differentiated_from=_WORTH_A_NODE[name],
        )
        for name in NAMES
    ),
    *(kernel(f"{name}_backward") for name in NAMES),
)
