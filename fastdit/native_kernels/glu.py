"""glu and its backward in the compiled library, on CPUs: csrc/cpu/glu.cpp."""

from __future__ import annotations

from fastdit.native_kernels.rows import kernel
from fastdit.ops import _library


def _least(up, bias, differentiated: bool) -> int:
    """Elements of x from which a call is faster than eager's two to five ops, forward and backward
    together where it is differentiated. (One thread, AVX-512; benchmarks/bench_glu.py.)"""
    if bias is not None:
        return 4096 if differentiated else 0
    return 32768 if differentiated or up is not None else 16384


def _slower(x, up, bias, *options) -> str | None:
    differentiated = _library.differentiates((x, up, bias))
    least = _least(up, bias, differentiated)
    if x.numel() >= least:
        return None
    how = "differentiated, eager" if differentiated else "eager"
    return f"x has {x.numel()} elements; {how} PyTorch is faster below {least}"


KERNELS = (kernel("glu", checks_arguments=True, slower=_slower), kernel("glu_backward"))
