"""glu and its backward in the compiled library, on CPUs: csrc/cpu/glu.cpp."""

from __future__ import annotations

from fastdit.native_kernels.direct import direct_call
from fastdit.native_kernels.rows import kernel
from fastdit.ops import _library

WORTH_A_NODE, WORTH_A_NODE_WITHOUT_BIAS = 1024, 8192
"""Elements of x from which a differentiated call is faster than eager, forward and backward
together. Without gradients the way to eager costs a small call more than the kernel itself, 11 µs
against 7. (One thread, AVX-512; benchmarks/bench_glu.py.)"""


def _slower(x, up, bias, *options) -> str | None:
    least = WORTH_A_NODE_WITHOUT_BIAS if bias is None else WORTH_A_NODE
    if x.numel() >= least or not _library.differentiates((x, up, bias)):
        return None
    return f"x has {x.numel()} elements; differentiated, eager PyTorch is faster below {least}"


KERNELS = (
    kernel("glu", direct=direct_call("glu"), slower=_slower),
    kernel("glu_backward"),
)
