"""The modelled GPU table: what each op would take on an A100, H100 and B200, without one.

For every op at DiT-XL/2's size with 32 samples in bfloat16: launches and bytes of our Triton kernel
(compiled for the GPU), of eager PyTorch (counted, an ATen op being a kernel that loads its inputs
and stores its outputs) and of torch.compile (Inductor's code, generated and not run, with its own
estimate of bytes), and for each the time that `fastdit.testing.roofline` makes of it. No GPU has
measured any of these figures.

Attention's eager column, and Inductor's, is SDPA as FlashAttention-2 computes it: one launch, the
op's least traffic, and a head of 72 channels padded to 96, where ours is 64 + 16.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdit import backends, reference
from fastdit.testing import GPUS, VirtualGPU, count_traffic, roofline
from fastdit.workloads import Workload, workloads

MODELLED_GPUS = ("A100", "H100", "B200")
Counts = dict[str, int]


def ours(call: Workload) -> Counts | None:
    """Launches of our kernel; its bytes are the op's least."""
    kernels = backends.kernels_for(call.op, "cuda")
    kernel = next((k for k in kernels if k.unsupported(*call.args) is None), None)
    if kernel is None:
        return None
    moved = call.least_bytes()["forward"]
    if not kernel.run.__module__.startswith("fastdit.kernels."):
        return {"launches": 1, "bytes": moved}  # diffusion_step's CUDA C++ kernel
    with VirtualGPU("sm_90", mode="compile") as gpu:
        kernel.run(*call.args)
    return {"launches": len(gpu.launches), "bytes": moved}


def padded(channels: int, multiple: int) -> float:
    """How much more a head costs whose channels are padded to a multiple."""
    return -(-channels // multiple) * multiple / channels


def sdpa(call: Workload) -> Counts:
    return {"launches": 1, "bytes": call.least_bytes()["forward"]}


def eager(call: Workload) -> Counts:
    if call.op == "attention":
        return sdpa(call)  # on meta tensors PyTorch would take it apart
    definition = getattr(reference, call.op)
    with torch.no_grad(), count_traffic() as traffic:
        definition(*call.args)
    return {"launches": traffic.total_launches, "bytes": traffic.total_bytes}


def inductor(call: Workload) -> Counts | None:
    """None where this PyTorch is not the one whose private parts are known, or Inductor refuses."""
    if call.op == "attention":
        return sdpa(call)
    if not torch.__version__.startswith("2.13"):
        return None
    from fastdit.testing.inductor import inductor_code

    places = [i for i, a in enumerate(call.args) if isinstance(a, Tensor)]
    definition = getattr(reference, call.op)

    def function(*tensors: Tensor) -> Any:
        args: list[Any] = list(call.args)
        for place, tensor in zip(places, tensors, strict=True):
            args[place] = tensor
        return definition(*args)

    inputs = [(tuple(call.args[i].shape), call.args[i].dtype) for i in places]
    try:
        code = inductor_code(function, inputs)
    except Exception:
        return None
    moved = sum(code.bytes)
    if code.extern:  # library kernels: every input in and every output out
        moved += call.least_bytes()["forward"]
    return {"launches": code.launches, "bytes": moved}


COLUMNS: dict[str, Callable[[Workload], Counts | None]] = {
    "fastdit": ours,
    "eager": eager,
    "torch.compile": inductor,
}


@functools.cache
def table() -> list[dict[str, Any]]:
    """A row for each op's forward pass: counts by column, and modelled µs by column and GPU."""
    rows = []
    for call in workloads("XL", 32, device="meta"):
        counts = {name: count(call) for name, count in COLUMNS.items()}
        times = {
            name: {gpu: modelled_us(found, flops(call, name), gpu) for gpu in MODELLED_GPUS}
            for name, found in counts.items()
            if found is not None
        }
        rows.append({"op": call.op, "shape": call.shape, "counts": counts, "modelled_us": times})
    return rows


def flops(call: Workload, column: str) -> float:
    """On tensor cores, padding included."""
    if not call.flops:
        return 0.0
    width, heads = call.shape[-1] // 3, call.args[1]
    return call.flops * padded(width // heads, 16 if column == "fastdit" else 32)


def modelled_us(counts: Counts, flops: float, gpu: str) -> float:
    assert gpu in GPUS
    time = roofline(gpu, bytes=counts["bytes"], tensor_flops=flops, launches=counts["launches"])
    return 1e6 * time.modelled_seconds


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table, µs as A100 / H100 / B200."""
    lines = [
        "*Modelled*, not measured: launches, MB and µs on an " + ", ".join(MODELLED_GPUS) + ".",
        "",
        "| op | " + " | ".join(COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for row in rows:
        cells = []
        for name in COLUMNS:
            found, times = row["counts"][name], row["modelled_us"].get(name)
            if found is None or times is None:
                cells.append("–")
                continue
            shown = " / ".join(f"{times[gpu]:.1f}" for gpu in MODELLED_GPUS)
            cells.append(f"{found['launches']}, {found['bytes'] / 1e6:.1f} MB, {shown}")
        lines.append(f"| `{row['op']}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)
