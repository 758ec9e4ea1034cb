"""glu and its backward in the compiled library, on CPUs: csrc/cpu/glu.cpp."""

from __future__ import annotations

from fastdit.native_kernels.direct import direct_call
from fastdit.native_kernels.rows import kernel
from fastdit.ops import _library

WORTH_A_NODE, WORTH_A_NODE_WITHOUT_BIAS = 2048, 32768
"""Elements of x from which a differentiated call of SiLU is no slower than eager, forward and
backward together; its other activations are faster from fewer. Without gradients the kernel is
faster at every size. (One thread, AVX-512; benchmarks/bench_glu.py.)"""


def _slower(x, up, bias, *options) -> str | None:
    least = WORTH_A_NODE_WITHOUT_BIAS if bias is None else WORTH_A_NODE
    if x.numel() >= least or not _library.differentiates((x, up, bias)):
        return None
    return f"x has {x.numel()} elements; differentiated, eager PyTorch is faster below {least}"


KERNELS = (
    kernel(
        "glu",
        direct=direct_call("glu"),
        slower=_slower,
        differentiated_from=WORTH_A_NODE_WITHOUT_BIAS,
    ),
    kernel("glu_backward"),
)
