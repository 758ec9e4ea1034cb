"""AuraFlow in diffusers: its joint and single blocks.

Unlike other joint blocks, the feed-forward's branch is added to the block's input, not to the
stream after attention: x + gate₂·ff(norm2(x + gate₁·attn)), and norms are in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastdit.patching import norms
from fastdit.patching.diffusers_norms import named, tokens
from fastdit.patching.rules import Call, Rule, replacement


def _stream(
    norm: norms.Norm, ff: nn.Module, x: Tensor, y: Tensor, parts: tuple[Tensor, ...]
) -> Tensor:
    gate, shift, scale, last_gate = parts
    _h, normed = norms.gated_adaln(norm, x, y, gate, shift, scale)
    return norms.gated_residual(x, ff(normed), last_gate)


@replacement("norm2", "norm2_context")
def joint_block(
    self: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_kwargs: dict[str, Any] | None = None,
) -> Any:
    """A block of two streams."""
    x, text = hidden_states, encoder_hidden_states
    found, found_text = norms.ready(x, self.norm2), norms.ready(text, self.norm2_context)
    if found is None or found_text is None:
        return NotImplemented
    normed, *parts = self.norm1(x, emb=temb)
    normed_text, *text_parts = self.norm1_context(text, emb=temb)
    y, y_text = self.attn(
        hidden_states=normed, encoder_hidden_states=normed_text, **(attention_kwargs or {})
    )
    x = _stream(found[0], self.ff, x, y, tuple(parts))
    return _stream(found_text[0], self.ff_context, text, y_text, tuple(text_parts)), x


@replacement("norm2")
def single_block(
    self: nn.Module,
    hidden_states: Tensor,
    temb: Tensor,
    attention_kwargs: dict[str, Any] | None = None,
) -> Tensor:
    """A block of text and image tokens in one stream."""
    if (found := norms.ready(hidden_states, self.norm2)) is None:
        return NotImplemented
    normed, *parts = self.norm1(hidden_states, emb=temb)
    y = self.attn(hidden_states=normed, **(attention_kwargs or {}))
    return _stream(found[0], self.ff, hidden_states, y, tuple(parts))


def _width(module: nn.Module) -> int:
    return module.norm2.normalized_shape[0]


def _joint_calls(module: nn.Module) -> list[Call]:
    width = _width(module)
    return [((tokens(width), tokens(width, 3), torch.randn(2, width)), {})]


RULES = (
    Rule(
        name="joint block",
        ops="gated_adaln, gated_residual",
        forward=joint_block,
        recognises=named("AuraFlowJointTransformerBlock"),
        probe=_joint_calls,
    ),
    Rule(
        name="single block",
        ops="gated_adaln, gated_residual",
        forward=single_block,
        recognises=named("AuraFlowSingleTransformerBlock"),
        probe=lambda m: [((tokens(_width(m)), torch.randn(2, _width(m))), {})],
    ),
)
