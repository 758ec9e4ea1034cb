"""The row-wise ops of the compiled library, on CPUs: csrc/cpu/.

adaln, gated_adaln, gated_residual and bias_gelu and their backward. They take float32, bfloat16 and
float16 in any mixture that the ops allow, any width and any strides.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdit import backends
from fastdit.ops import _library

NAMES = ("adaln", "gated_adaln", "gated_residual", "bias_gelu")
STORED = (torch.float32, torch.bfloat16, torch.float16)


def unsupported(*args) -> str | None:
    """Why the kernels cannot run these arguments: a tensor of a dtype that they would round."""
    for value in args:
        if isinstance(value, Tensor) and value.dtype not in STORED:
            return f"a tensor is {value.dtype}; the kernel computes in float32"
    return None


def kernel(name: str, **options) -> backends.Kernel:
    """The library's op `name` as a kernel on CPUs; its fake is that of `torch.ops.fastdit`'s."""
    torch.library.register_fake(f"fastdit_native::{name}", _library.FAKES[name])
    run = getattr(torch.ops.fastdit_native, name).default
    return backends.Kernel(name, "cpu", "csrc", run, unsupported, **options)


KERNELS = (
    *(kernel(name) for name in NAMES),
    *(kernel(f"{name}_backward") for name in NAMES),
)
