"""Sana in diffusers: adaLN-single around linear attention, cross-attention and a convolution."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastdit.patching import norms
from fastdit.patching.diffusers_norms import named, tokens
from fastdit.patching.rules import Call, Rule, replacement


@replacement("norm1", "norm2")
def block(
    self: nn.Module,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Tensor | None = None,
    height: int | None = None,
    width: int | None = None,
) -> Tensor:
    """A block; the feed-forward sees the tokens as an image."""
    x = hidden_states
    if (found := norms.ready(x, self.norm1, self.norm2)) is None:
        return NotImplemented
    six = norms.table(self.scale_shift_table[None], timestep.reshape(x.shape[0], 6, -1))
    shift, scale, gate, last_shift, last_scale, last_gate = six
    y = self.attn1(norms.adaln(found[0], x, shift, scale))
    if self.attn2 is None:
        x, normed = norms.gated_adaln(found[1], x, y, gate, last_shift, last_scale)
    else:
        x = norms.gated_residual(x, y, gate)
        y = self.attn2(
            x, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask
        )
        x, normed = norms.added_adaln(found[1], x, y, last_shift, last_scale)
    y = self.ff(normed.unflatten(1, (height, width)).permute(0, 3, 1, 2))
    return norms.gated_residual(x, y.flatten(2, 3).permute(0, 2, 1), last_gate)


def _calls(module: nn.Module) -> list[Call]:
    width = module.norm1.normalized_shape[0]
    text = torch.randn(2, 3, module.attn2.to_k.in_features)
    return [((tokens(width), None, text, None, torch.randn(2, 6 * width), 2, 2), {})]


RULES = (
    Rule(
        name="adaLN-single block",
        ops="adaln, gated_adaln, gated_residual",
        forward=block,
        recognises=named("SanaTransformerBlock"),
        probe=_calls,
    ),
)
