"""Lumina-Next in diffusers: Lumina 2's sandwich, with a cross-attention beside the self-attention.

x += tanh(gate₁)·norm2(out(attn1(n) + tanh(gate)·attn2(n, text))),  n = norm1(x)·(1 + scale₁)
x += tanh(gate₂)·ffn_norm2(ff(ffn_norm1(x)·(1 + scale₂)))
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastdit.patching import norms
from fastdit.patching.diffusers_norms import named, tokens
from fastdit.patching.rules import Call, Rule, replacement


@replacement("ffn_norm1")
def block(
    self: nn.Module,
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    image_rotary_emb: Tensor,
    encoder_hidden_states: Tensor,
    encoder_mask: Tensor | None,
    temb: Tensor,
    cross_attention_kwargs: dict[str, Any] | None = None,
) -> Tensor:
    """A block; its other norms are sites of their own."""
    x, options = hidden_states, cross_attention_kwargs or {}
    if (found := norms.ready(x, self.ffn_norm1)) is None:
        return NotImplemented
    normed, gate, scale, last_gate = self.norm1(x, temb)
    y = self.attn1(
        hidden_states=normed,
        encoder_hidden_states=normed,
        attention_mask=attention_mask,
        query_rotary_emb=image_rotary_emb,
        key_rotary_emb=image_rotary_emb,
        **options,
    )
    from_text = self.attn2(
        hidden_states=normed,
        encoder_hidden_states=self.norm1_context(encoder_hidden_states),
        attention_mask=encoder_mask,
        query_rotary_emb=image_rotary_emb,
        key_rotary_emb=None,
        **options,
    )
    y = (y + from_text * self.gate.tanh().view(1, 1, -1, 1)).flatten(-2)
    y = self.norm2(self.attn2.to_out[0](y))
    x, normed = norms.gated_adaln(found[0], x, y, gate.tanh(), None, scale)
    return norms.gated_residual(x, self.ffn_norm2(self.feed_forward(normed)), last_gate.tanh())


def _calls(module: nn.Module) -> list[Call]:
    width, texts = module.attn2.to_q.in_features, module.attn2.to_k.in_features
    rotation = torch.polar(
        torch.ones(1, 4, module.head_dim // 2), torch.rand(1, 4, module.head_dim // 2)
    )
    mask, text_mask = torch.ones(2, 4), torch.ones(2, 3, dtype=torch.bool)
    condition = torch.randn(2, module.norm1.linear.in_features)
    text = torch.randn(2, 3, texts)
    return [((tokens(width), mask, rotation, text, text_mask, condition, {}), {})]


RULES = (
    Rule(
        name="sandwiched block",
        ops="gated_adaln, gated_residual",
        forward=block,
        recognises=named("LuminaNextDiTBlock"),
        probe=_calls,
    ),
)
