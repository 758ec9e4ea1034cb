"""Flux in diffusers: FluxTransformerBlock of two streams, FluxSingleTransformerBlock of one.

The first is SD3's joint block with rotary positions. The second runs attention and feed-forward
side by side and adds both through one gate.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastdit.patching import joint, norms
from fastdit.patching.diffusers_norms import tokens
from fastdit.patching.rules import Call, replacement

HALF_MAX = 65504  # diffusers clips what float16 cannot hold


def clipped(x: Tensor) -> Tensor:
    """What Flux does with a stream in float16."""
    return x.clip(-HALF_MAX, HALF_MAX) if x.dtype == torch.float16 else x


@replacement("norm2", "norm2_context")
def double_block(
    self: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> Any:
    """A block of two streams."""
    streams = joint.two_streams(
        self,
        hidden_states,
        encoder_hidden_states,
        temb,
        image_rotary_emb=image_rotary_emb,
        **(joint_attention_kwargs or {}),
    )
    if streams is NotImplemented:
        return NotImplemented
    text, x, *from_adapter = streams
    for image_prompt in from_adapter:
        x = x + image_prompt
    return clipped(text), x


@replacement()
def single_block(
    self: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> Any:
    """A block of text and image tokens in one stream."""
    length = encoder_hidden_states.shape[1]
    x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    normed, gate = self.norm(x, emb=temb)
    hidden = self.act_mlp(self.proj_mlp(normed))
    y = self.attn(
        hidden_states=normed, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {})
    )
    x = norms.gated_residual(x, self.proj_out(torch.cat([y, hidden], dim=2)), gate)
    x = clipped(x)
    return x[:, :length], x[:, length:]


def _calls(module: nn.Module) -> list[Call]:
    width = module.attn.query_dim
    return [((tokens(width), tokens(width, 3), torch.randn(2, width)), {})]


RULES = (
    joint.rule("joint block", double_block, "FluxTransformerBlock", joint.two_streams_calls),
    joint.rule(
        "parallel block", single_block, "FluxSingleTransformerBlock", _calls, "gated_residual"
    ),
)
