"""glu and its backward in the compiled library, on CPUs: csrc/cpu/glu.cpp."""

from __future__ import annotations

from fastdit.native_kernels.rows import kernel
from fastdit.ops import _library

WORTH_A_NODE = 4096
"""Elements of x from which a differentiated call is faster than eager's, as in `rows`."""


def _slower(x, *rest) -> str | None:
    if x.numel() >= WORTH_A_NODE or not _library.differentiates((x, *rest)):
        return None
    return (
        f"x has {x.numel()} elements; differentiated, eager PyTorch is faster below {WORTH_A_NODE}"
    )


KERNELS = (kernel("glu", checks_arguments=True, slower=_slower), kernel("glu_backward"))
