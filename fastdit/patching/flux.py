"""Flux in diffusers: FluxTransformerBlock of two streams, FluxSingleTransformerBlock of one.

The first is SD3's joint block with rotary positions. The second runs attention and feed-forward
side by side and adds both through one gate.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastdit.patching import norms
from fastdit.patching.diffusers_norms import named, tokens
from fastdit.patching.rules import Call, Rule, replacement
from fastdit.patching.sd3 import feed_forward

HALF_MAX = 65504  # diffusers clips what float16 cannot hold


def _clipped(x: Tensor) -> Tensor:
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
    x, text = hidden_states, encoder_hidden_states
    found, found_text = norms.ready(x, self.norm2), norms.ready(text, self.norm2_context)
    if found is None or found_text is None:
        return NotImplemented
    normed, *parts = self.norm1(x, emb=temb)
    normed_text, *text_parts = self.norm1_context(text, emb=temb)
    y, y_text, *from_adapter = self.attn(
        hidden_states=normed,
        encoder_hidden_states=normed_text,
        image_rotary_emb=image_rotary_emb,
        **(joint_attention_kwargs or {}),
    )
    x = feed_forward(found[0], self.ff, x, y, tuple(parts))
    for image_prompt in from_adapter:
        x = x + image_prompt
    return _clipped(
        feed_forward(found_text[0], self.ff_context, text, y_text, tuple(text_parts))
    ), x


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
    x = _clipped(x)
    return x[:, :length], x[:, length:]


def _calls(module: nn.Module) -> list[Call]:
    width = module.attn.query_dim
    return [((tokens(width), tokens(width, 3), torch.randn(2, width)), {})]


RULES = (
    Rule(
        name="joint block",
        ops="gated_adaln, gated_residual",
        forward=double_block,
        recognises=named("FluxTransformerBlock"),
        probe=_calls,
    ),
    Rule(
        name="parallel block",
        ops="gated_residual",
        forward=single_block,
        recognises=named("FluxSingleTransformerBlock"),
        probe=_calls,
    ),
)
