"""CogVideoX in diffusers: video and text share norms and a feed-forward, with gates of their own.

norm1 is a site of its own; norm2's two normalisations take the gated additions before them along.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastdit.patching import norms
from fastdit.patching.diffusers_norms import named, tokens
from fastdit.patching.rules import Call, Rule, replacement


@replacement("norm2", "norm2.norm")
def block(
    self: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    attention_kwargs: dict[str, Any] | None = None,
) -> Any:
    """A block of two streams, concatenated for the feed-forward."""
    x, text = hidden_states, encoder_hidden_states
    if (found := norms.ready(x, self.norm2.norm)) is None:
        return NotImplemented
    length = text.shape[1]
    normed, normed_text, gate, text_gate = self.norm1(x, text, temb)
    y, y_text = self.attn1(
        hidden_states=normed,
        encoder_hidden_states=normed_text,
        image_rotary_emb=image_rotary_emb,
        **(attention_kwargs or {}),
    )
    parts = self.norm2.linear(self.norm2.silu(temb)).chunk(6, dim=1)
    shift, scale, last_gate, text_shift, text_scale, last_text_gate = parts
    x, normed = norms.gated_adaln(found[0], x, y, gate, shift, scale)
    text, normed_text = norms.gated_adaln(found[0], text, y_text, text_gate, text_shift, text_scale)
    y = self.ff(torch.cat([normed_text, normed], dim=1))
    x = norms.gated_residual(x, y[:, length:], last_gate)
    return x, norms.gated_residual(text, y[:, :length], last_text_gate)


def _calls(module: nn.Module) -> list[Call]:
    width = module.norm2.norm.normalized_shape[0]
    condition = torch.randn(2, module.norm2.linear.in_features)
    return [((tokens(width), tokens(width, 3), condition), {})]


RULES = (
    Rule(
        name="joint block",
        ops="gated_adaln, gated_residual",
        forward=block,
        recognises=named("CogVideoXBlock"),
        probe=_calls,
    ),
)
