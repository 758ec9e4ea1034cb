"""What the tests of the patch and GELU kernels share: registration, errors, exact gradients."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
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


@functools.cache
def _resources(_key: str, launch: Any) -> Resources:
    return inspect(launch.launch)


@dataclasses.dataclass(frozen=True, eq=False)
class _Hashed:
    launch: Launch
    key: str

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hashed) and self.key == other.key


def resources(launch: Launch) -> Resources:
    """`inspect`, once for each compiled kernel: many shapes share one."""
    key = launch.compiled.hash
    return _resources(key, _Hashed(launch, key))


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
