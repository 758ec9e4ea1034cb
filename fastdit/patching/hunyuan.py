"""HunyuanDiT in diffusers: no gates; three branches, each added as it is.

The shift enters in norm1, a site of its own. Each later affine normalisation takes the addition
before it along.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastdit.patching import norms
from fastdit.patching.diffusers_norms import named, tokens
from fastdit.patching.rules import Call, Rule, replacement


@replacement("norm2", "norm3")
def block(
    self: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    temb: Tensor | None = None,
    image_rotary_emb: Any = None,
    skip: Tensor | None = None,
) -> Tensor:
    """Self-attention, cross-attention, feed-forward; a long skip joins at the start."""
    x = hidden_states
    if (found := norms.ready(x, self.norm2, self.norm3)) is None:
        return NotImplemented
    if self.skip_linear is not None:
        x = self.skip_linear(self.skip_norm(torch.cat([x, skip], dim=-1)))
    y = self.attn1(self.norm1(x, temb), image_rotary_emb=image_rotary_emb)
    x, normed = norms.added_adaln(found[0], x, y)
    y = self.attn2(
        normed, encoder_hidden_states=encoder_hidden_states, image_rotary_emb=image_rotary_emb
    )
    x, normed = norms.added_adaln(found[1], x, y)
    return x + self.ff(normed)


def _calls(module: nn.Module) -> list[Call]:
    width = module.norm2.normalized_shape[0]
    text = torch.randn(2, 3, module.attn2.to_k.in_features)
    skip = tokens(width) if module.skip_linear is not None else None
    return [((tokens(width), text, torch.randn(2, width)), {"skip": skip})]


RULES = (
    Rule(
        name="block without gates",
        ops="gated_adaln",
        forward=block,
        recognises=named("HunyuanDiTBlock"),
        probe=_calls,
    ),
)
