"""diffusion_step of the compiled library, on CPUs and on CUDA: csrc/diffusion_step.h."""

from __future__ import annotations

import torch

from fastdit import backends
from fastdit.native_kernels.direct import direct_call

_op = torch.ops.fastdit_native.diffusion_step.default
_into = torch.ops.fastdit_native.diffusion_step_into.default
_STORED = (torch.float32, torch.bfloat16, torch.float16)


@torch.library.register_fake("fastdit_native::diffusion_step")
def _fake(x, *_rest):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))


@torch.library.register_fake("fastdit_native::diffusion_step_into")
def _fake_into(*_args):
    return None


def _run(*args, out=None):
    if out is None:
        return _op(*args)
    _into(*args, *out)
    return out


def _unsupported(x, model_output, table, *_rest) -> str | None:
    if x.dtype not in _STORED:
        return f"x is {x.dtype}; the kernel computes in float32"
    if model_output.dtype not in _STORED:
        return f"model_output is {model_output.dtype}; the kernel computes in float32"
    if table.dtype != torch.float32:
        return f"table is {table.dtype}; the kernel computes in float32"
    return None


def _unsupported_cuda(x, model_output, table, *rest) -> str | None:
    if x.dtype not in (torch.float32, model_output.dtype):
        return f"x is {x.dtype} and model_output {model_output.dtype}; a half x needs its own dtype"
    return _unsupported(x, model_output, table, *rest)


KERNELS = (
    backends.Kernel(
        "diffusion_step",
        "cpu",
        "csrc",
        _run,
        _unsupported,
        checks_arguments=True,
        direct=direct_call("diffusion_step"),
        takes_out=True,
    ),
    backends.Kernel(
        "diffusion_step",
        "cuda",
        "csrc",
        _run,
        _unsupported_cuda,
        checks_arguments=True,
        takes_out=True,
    ),
)
