"""Lumina 2 in diffusers: RMS norms before and after each branch, and gates through a tanh.

    x += tanh(gate₁)·norm2(attn(norm1(x)·(1 + scale₁)))
    x += tanh(gate₂)·ffn_norm2(ff(ffn_norm1(x)·(1 + scale₂)))

The norms of the branches, and norm1, are sites of their own. The context's blocks have no
modulation.
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
    image_rotary_emb: Any,
    temb: Tensor | None = None,
) -> Tensor:
    """A block, with or without modulation."""
    x = hidden_states
    if (found := norms.ready(x, self.ffn_norm1)) is None:
        return NotImplemented
    if self.modulation:
        normed, gate, scale, last_gate = self.norm1(x, temb)
    else:
        normed = self.norm1(x)
    y = self.attn(
        hidden_states=normed,
        encoder_hidden_states=normed,
        attention_mask=attention_mask,
        image_rotary_emb=image_rotary_emb,
    )
    if not self.modulation:
        x, normed = norms.added_adaln(found[0], x, self.norm2(y))
        return x + self.ffn_norm2(self.feed_forward(normed))
    x, normed = norms.gated_adaln(found[0], x, self.norm2(y), gate.tanh(), None, scale)
    return norms.gated_residual(x, self.ffn_norm2(self.feed_forward(normed)), last_gate.tanh())


def _calls(module: nn.Module) -> list[Call]:
    width = module.ffn_norm1.dim[0]
    condition = torch.randn(2, module.norm1.linear.in_features) if module.modulation else None
    return [((tokens(width), None, None, condition), {})]


RULES = (
    Rule(
        name="sandwiched block",
        ops="gated_adaln, gated_residual",
        forward=block,
        recognises=named("Lumina2TransformerBlock"),
        probe=_calls,
    ),
)
