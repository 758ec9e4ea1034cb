"""ACE-Step in diffusers: adaLN-single with RMS norms around self-attention, cross-attention and a
gated feed-forward. Without a cross-attention the gated addition reaches the last norm itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastdit.patching import norms
from fastdit.patching.diffusers_norms import named, tokens
from fastdit.patching.rules import Call, Rule, replacement


@replacement("self_attn_norm", "cross_attn_norm", "mlp_norm")
def block(
    self: nn.Module,
    hidden_states: Tensor,
    position_embeddings: Any,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
) -> Tensor:
    """A block, with or without cross-attention."""
    x, crosses = hidden_states, self.use_cross_attention and encoder_hidden_states is not None
    found = norms.ready(x, self.self_attn_norm, self.mlp_norm)
    between = norms.ready(x, self.cross_attn_norm) if crosses else []
    if found is None or between is None:
        return NotImplemented
    six = norms.table(self.scale_shift_table, temb)
    shift, scale, gate, last_shift, last_scale, last_gate = six
    y = self.self_attn(
        hidden_states=norms.adaln(found[0], x, shift, scale),
        image_rotary_emb=position_embeddings,
        attention_mask=attention_mask,
    )
    if crosses:
        x, normed = norms.gated_adaln(between[0], x, y, gate)
        y = self.cross_attn(
            hidden_states=normed,
            encoder_hidden_states=encoder_hidden_states,
            attention_mask=encoder_attention_mask,
        )
        x, normed = norms.added_adaln(found[1], x, y, last_shift, last_scale)
    else:
        x, normed = norms.gated_adaln(found[1], x, y, gate, last_shift, last_scale)
    return norms.gated_residual(x, self.mlp(normed), last_gate, rounds=True)


def _calls(module: nn.Module) -> list[Call]:
    width, attention = module.scale_shift_table.shape[-1], module.self_attn
    head_dim = attention.to_q.out_features // attention.heads
    rotation = torch.rand(4, head_dim), torch.rand(4, head_dim)
    args = tokens(width), rotation, torch.randn(2, 6, width)
    texts = (None, torch.randn(2, 3, width)) if module.use_cross_attention else (None,)
    return [(args, {"encoder_hidden_states": text}) for text in texts]


RULES = (
    Rule(
        name="adaLN-single block",
        ops="adaln, gated_adaln, gated_residual",
        forward=block,
        recognises=named("AceStepTransformerBlock"),
        probe=_calls,
    ),
)
