"""What every launcher needs: the tensor's device, the dtypes of Triton, widths split in two.

Launchers read no tensor on the host and start no synchronisation, so that a CUDA graph can capture
them; they take meta tensors, on which a `fastdit.testing.VirtualGPU` compiles them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from fastdit.kernels import tuning

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device: make it `tensor`'s."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def arch_of(device: torch.device) -> int | str:
    """What a launch on `device` is compiled for: 80, 90 ... or "gfx942"."""
    if device.type == "cuda":
        return _arch_of_index(device.index)
    return triton.runtime.driver.active.get_current_target().arch


@functools.cache
def _arch_of_index(index: int | None) -> int | str:
    with torch.cuda.device(index):
        return triton.runtime.driver.active.get_current_target().arch


def result(x: Tensor, out: Tensor | None, shape: Sequence[int] | None = None) -> Tensor:
    """Where a kernel writes a result like `x`, of `shape` if that differs: to `out` if one is
    given. With autotuning on, which repeats a launch, to a new tensor all the same, for `out` may
    be what the kernel reads."""
    if out is None or tuning.enabled():
        return torch.empty(x.shape if shape is None else shape, dtype=x.dtype, device=x.device)
    return out


def unsupported_dtype(**tensors: Tensor | None) -> str | None:
    """Why Triton cannot take these tensors: the first whose dtype is none of `DTYPES`."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in DTYPES:
            dtype = str(tensor.dtype).removeprefix("torch.")
            return f"{name} is {dtype}, the Triton kernels take float32, bfloat16 and float16"
    return None


def unsupported_extent(**tensors: Tensor | None) -> str | None:
    """Why the kernels cannot index these tensors: the first of which one sample, all axes but the
    first, spans 2^31 elements. Offsets of samples have 64 bits, offsets inside one have 32."""
    for name, tensor in tensors.items():
        if tensor is not None:
            axes = zip(tensor.shape[1:], tensor.stride()[1:], strict=True)
            if sum((size - 1) * stride for size, stride in axes) >= 2**31:
                return f"one sample of {name} spans 2^31 elements or more"
    return None


def flat_rows(tensor: Tensor) -> Tensor:
    """`(..., D)` as `(M, D)` with unit stride along D; a view where the strides allow one."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def column_block(width: int, most: int) -> int:
    """The columns of a tile that walks over `width`: the largest power of two up to `most` that
    pads the width by at most an eighth, and not under 16 unless the width is."""
    block = most
    while block > 16 and -width % block > width // 8:
        block //= 2
    return min(block, triton.next_power_of_2(width))


def split_width(width: int) -> tuple[int, int]:
    """A row's width as two powers of two, `main + tail`, that cover it with the least padding.

    1152 is 1024 + 128, 384 is 256 + 128 and 1024 is 1024 + 0, without padding; a width that is no
    sum of two powers of two, such as 1408, gets the next larger tail and a mask.
    """
    main = triton.next_power_of_2(width + 1) // 2
    rest = width - main
    return main, triton.next_power_of_2(rest) if rest else 0
