"""What the tests of the patch and GELU kernels share: registration, errors, exact gradients."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import fastdit
from fastdit import backends, reference
from fastdit.testing import Launch, Resources, VirtualGPU, inspect

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = {"S": 384, "B": 768, "L": 1024, "XL": 1152}


def seeded(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


@contextlib.contextmanager
def on_the_cpu(*modules: str, arch: str = "sm_90") -> Iterator[VirtualGPU]:
    """Inside, the ops run these modules' kernels on CPU tensors, in the interpreter.

    The providers of a device are imported at its first call; asking for a kernel does that, so that
    these stand before any kernel the package has for the CPU.
    """
    kernels = [
        dataclasses.replace(kernel, device="cpu")
        for module in modules
        for kernel in importlib.import_module(f"fastdit.kernels.{module}").KERNELS
    ]
    before = {kernel.op: list(backends.kernels_for(kernel.op, "cpu")) for kernel in kernels}
    for op in before:
        backends.kernels_for(op, "cpu")[:] = [k for k in kernels if k.op == op]
    try:
        with fastdit.backend("native"), VirtualGPU(arch) as gpu:
            yield gpu
    finally:
        for op, registered in before.items():
            backends.kernels_for(op, "cpu")[:] = registered


def run(function: Callable[..., Any], *args: Any, arch: str = "sm_90", mode: str = "interpret"):
    """The result of a launcher under a virtual GPU, and its launches."""
    with VirtualGPU(arch, mode=mode) as gpu:
        result = function(*args)
    return result, gpu.launches


_inspected: dict[str, Resources] = {}


def resources(launch: Launch) -> Resources:
    """`inspect`, once for each compiled kernel: many shapes share one."""
    key = launch.compiled.hash
    if key not in _inspected:
        _inspected[key] = inspect(launch)
    return _inspected[key]


def error(got: Tensor, exact: Tensor) -> float:
    return (got.double() - exact).abs().max().item()


def rounding_floor(exact: Tensor, dtype: torch.dtype) -> float:
    """The error of the exact result rounded once."""
    return error(exact.to(dtype), exact)


def gradients(op: str, args: tuple, dout: Tensor, dtype: torch.dtype | None) -> list[Tensor]:
    """Of the eager definition: in `dtype`, or as the arguments are."""
    leaves = [
        a.detach().to(dtype or a.dtype).requires_grad_() if isinstance(a, Tensor) else a
        for a in args
    ]
    out = getattr(reference, op)(*leaves)
    wanted = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return list(torch.autograd.grad(out, wanted, dout.to(out.dtype)))


def beats_eager(got: Tensor, eager: Tensor, exact: Tensor, floor: bool = True) -> bool:
    """Whether the error is at most 1.25 times eager's own in its dtype.

    With `floor`, an error of half a unit in the last place of the largest value passes, and in
    float32, where the error of a sum of few terms is the luck of its order, of two units.
    """
    units = 2.0 if got.dtype == torch.float32 else 0.5
    least = units * torch.finfo(got.dtype).eps * exact.abs().max().item() if floor else 0.0
    return error(got, exact) <= max(1.25 * error(eager, exact), least)


ALL = [True] * 4


def patch_inputs(case: tuple, dtype: torch.dtype, pos_dtype: torch.dtype | None = None):
    """patch_embed's x, weight, bias, pos and the gradient of its tokens, for a case of (samples,
    channels, size, patch, D); the K terms of a token sum to about 1."""
    samples, channels, size, patch, width = case
    depth, tokens = channels * math.prod(patch), math.prod(size) // math.prod(patch)
    x = seeded(samples, channels, *size, seed=0, dtype=dtype)
    weight = (seeded(width, channels, *patch, seed=1) / depth**0.5).to(dtype)
    bias = seeded(width, seed=2, dtype=dtype)
    pos = seeded(1, tokens, width, seed=3, dtype=pos_dtype or dtype)
    dtokens = seeded(samples, tokens, width, seed=4, dtype=torch.promote_types(dtype, pos.dtype))
    return (x, weight, bias, pos), dtokens


def check_patch_gradients(got: tuple, args: tuple, dtokens: Tensor, floor: bool = True) -> None:
    """Each of patch_embed's gradients separately."""
    truth = gradients("patch_embed", args, dtokens, torch.float64)
    eager = gradients("patch_embed", args, dtokens, None)
    for gradient, e, t, like in zip(got, eager, truth, args, strict=True):
        assert (gradient.shape, gradient.dtype) == (like.shape, like.dtype)
        assert gradient.is_contiguous()
        assert beats_eager(gradient, e, t, floor)
