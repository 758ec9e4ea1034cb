"""Calls of the ops that take `out=`: their arguments, and what they return."""

from __future__ import annotations

import pytest
import torch
from op_cases import B, D, N, random, step_table
from torch import Tensor

from fastdit import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OPS = (
    *("adaln", "gated_residual", "gated_adaln", "bias_gelu"),
    *("glu, packed", "glu, apart", "diffusion_step"),
)
"""An op, and behind a comma which of its calls, if they differ in what a result may replace."""
TAKEN = {
    "adaln": ("x",),
    "gated_residual": ("x", "y"),
    "gated_adaln": ("x", "y"),
    "bias_gelu": ("x",),
    "glu, packed": (),
    "glu, apart": ("x", "up"),
    "diffusion_step": ("x", "noise", "x0_previous"),
}
"""The arguments that a result may replace."""
every_op = pytest.mark.parametrize("op", OPS)


def plain(*shape: int, dtype=torch.float32, seed: int = 0) -> Tensor:
    return random(*shape, dtype=dtype, seed=seed, grad=False)


def arguments(op: str, stream=torch.float32, other=None, per_token=False) -> dict:
    """A call: the stream, and what is like it, in one dtype, what modulates it in another."""
    other = other or stream
    x, y = plain(B, N, D, dtype=stream), plain(B, N, D, dtype=other, seed=1)
    lead = (B, N) if per_token else (B,)
    shift, scale, gate = plain(*lead, 3 * D, dtype=other, seed=2).chunk(3, -1)
    weight, bias = plain(D, dtype=stream, seed=3), plain(D, dtype=other, seed=4)
    if op == "diffusion_step":
        image = [plain(B, 4, 3, 7, dtype=stream, seed=seed) for seed in (5, 6, 7)]
        table = step_table(dtype=torch.promote_types(stream, torch.float32))
        found = {"x": image[0], "model_output": plain(2 * B, 8, 3, 7, dtype=other, seed=8)}
        found |= {"table": table, "step": torch.tensor([1, 3]), "noise": image[1]}
        options = {"learned_range": True, "guided_channels": 3, "clip": 1.0}
        return found | {"x0_previous": image[2]} | options
    return {
        "adaln": {"x": x, "shift": shift, "scale": scale, "weight": weight},
        "gated_residual": {"x": x, "y": y, "gate": gate},
        "gated_adaln": {"x": x, "y": y, "gate": gate, "shift": shift, "scale": scale},
        "bias_gelu": {"x": x, "bias": bias},
        "glu, packed": {
            "x": plain(B, N, 2 * D, dtype=stream),
            "bias": plain(2 * D, dtype=other, seed=4),
            "activation": "gelu",
            "gate_first": False,
        },
        "glu, apart": {"x": x, "up": plain(B, N, D, dtype=stream, seed=1)},
    }[op]


def named(op: str) -> str:
    """The op's own name."""
    return op.partition(",")[0]


def call(op: str, **kwargs) -> Tensor | tuple[Tensor, ...]:
    return getattr(ops, named(op))(**kwargs)


def tensors(result) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def results(op: str) -> int:
    return 2 if op in ("gated_adaln", "diffusion_step") else 1


def as_out(outs: tuple[Tensor, ...]):
    return outs[0] if len(outs) == 1 else outs


def shape(op: str, args: dict) -> torch.Size:
    """Each result's."""
    size = args["x"].shape
    return torch.Size((*size[:-1], size[-1] // 2)) if op == "glu, packed" else size


def empty(op: str, args: dict) -> tuple[Tensor, ...]:
    x, size = args["x"], shape(op, args)
    return tuple(x.new_full(size, torch.nan) for _ in range(results(op)))


def returned(op: str, args: dict) -> tuple[Tensor, ...]:
    """The results of a call into new tensors, which they are."""
    outs = empty(op, args)
    got = tensors(call(op, **args, out=as_out(outs)))
    assert len(got) == len(outs)
    assert all(g is out for g, out in zip(got, outs, strict=True))
    return got


def copied(args: dict) -> dict:
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in args.items()}
