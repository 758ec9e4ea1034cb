"""What a model sees on its way: the data it predicts at every step, and where its heads look.

    frames = trajectory(model, [3], steps=25, cfg_scale=2.0, seed=0)
    maps = attention_maps(model, frames[12], torch.tensor([3]))

`fastdit inspect` draws both. An attention map is softmax(QKᵀ/√d) of a head, `(N, N)`: row i says
where token i looks. No kernel writes it; here the op itself gives it, with unit vectors for values:
P·I = P, as many columns at a time as a head has channels. So every option of the op is in it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdit import ops
from fastdit.blocks import Attention
from fastdit.model import DiT
from fastdit.sampling import sample


@dataclass(frozen=True)
class Frame:
    """One call of the model on the way.

    Attributes:
        time: what the model was given: a timestep, or a flow's t·time_scale.
        x: `(B, C, H, W)`, its input.
        data: like `x`, what it predicts the data to be.
    """

    time: float
    x: Tensor
    data: Tensor


def trajectory(model: DiT, classes: Sequence[int] | Tensor, **options: Any) -> list[Frame]:
    """The frames of `fastdit.sample(model, classes, **options)`, in order, and one more: the
    samples, as both its `x` and its `data`, with the last frame's time."""
    frames: list[Frame] = []
    drawn = sample(model, classes, observe=lambda *frame: frames.append(Frame(*frame)), **options)
    return [*frames, Frame(frames[-1].time, drawn, drawn)]


@torch.no_grad()
def attention_maps(model: DiT, frame: Frame, y: Tensor | None) -> Tensor:
    """Every block's and head's self-attention at one call of the model, without guidance.

    Args:
        model: a DiT in eval mode.
        frame: the call.
        y: what the model is called with beside it.

    Returns:
        `(depth, B, heads, N, N)` float32 on the CPU, rows summing to 1. The patches come first in
        N, then a design's in-context tokens.
    """
    maps: list[Tensor] = []
    with _watched(model, maps):
        model(frame.x, torch.full(frame.x.shape[:1], frame.time, device=frame.x.device), y)
    return torch.stack(maps)


@contextlib.contextmanager
def _watched(model: DiT, maps: list[Tensor]) -> Iterator[None]:
    """Inside, every block's attention leaves its map in `maps`, in the order of the blocks."""

    def watch(attention: Attention, args: tuple[Any, ...]) -> None:
        x, *rope = args
        options = {"rope": rope[0] if rope else None} | attention.qk_options()
        options = {k: v.float() if isinstance(v, Tensor) else v for k, v in options.items()}
        qkv = attention.qkv(x).float()
        maps.append(attention_map(qkv, attention.num_heads, **options).cpu())

    hooks = [block.attn.register_forward_pre_hook(watch) for block in model.blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def attention_map(qkv: Tensor, num_heads: int, **options: Any) -> Tensor:
    """softmax(QKᵀ·scale) of `fastdit.ops.attention` with the same arguments, `(B, heads, N, N)`."""
    batch, tokens, width = qkv.shape
    head_dim = width // (3 * num_heads)
    queries_keys = qkv[..., : 2 * num_heads * head_dim]
    columns = []
    for start in range(0, tokens, head_dim):
        units = torch.eye(tokens, dtype=qkv.dtype, device=qkv.device)[:, start : start + head_dim]
        units = torch.nn.functional.pad(units, (0, head_dim - units.shape[1]))
        values = units.repeat(1, num_heads).expand(batch, -1, -1)
        part = ops.attention(torch.cat([queries_keys, values], -1), num_heads, **options)
        columns.append(part.unflatten(-1, (num_heads, head_dim)).transpose(1, 2))
    return torch.cat(columns, -1)[..., :tokens]
