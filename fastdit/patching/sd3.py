"""Stable Diffusion 3 in diffusers: JointTransformerBlock and SD3SingleTransformerBlock.

Two streams, image and text, each with its own adaLN-Zero, meet in one attention. Per stream, the
gated addition and the modulation before the feed-forward become one `gated_adaln`. SD 3.5's second
attention of the image stream is another gate in between; the last block drops the text.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastdit.patching import norms
from fastdit.patching.diffusers_norms import named, tokens
from fastdit.patching.rules import Call, Rule, replacement


def feed_forward(
    norm: norms.Norm, ff: nn.Module, x: Tensor, y: Tensor, parts: tuple[Tensor, ...]
) -> Tensor:
    """Add a gated branch, then the gated feed-forward: parts are gate, shift, scale, gate."""
    gate, shift, scale, last_gate = parts
    x, normed = norms.gated_adaln(norm, x, y, gate, shift, scale)
    return norms.gated_residual(x, ff(normed), last_gate)


@replacement("norm2", "norm2_context")
def joint_block(
    self: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> Any:
    """A block of two streams."""
    x, text, options = hidden_states, encoder_hidden_states, joint_attention_kwargs or {}
    found, found_text = norms.ready(x, self.norm2), [None]
    if not self.context_pre_only:
        found_text = norms.ready(text, self.norm2_context)
    if found is None or found_text is None or self._chunk_size is not None:
        return NotImplemented
    normed, gate, shift, scale, last_gate, *second = self.norm1(x, emb=temb)
    if self.context_pre_only:
        normed_text, parts = self.norm1_context(text, temb), ()
    else:
        normed_text, *parts = self.norm1_context(text, emb=temb)
    y, y_text = self.attn(hidden_states=normed, encoder_hidden_states=normed_text, **options)
    if self.use_dual_attention:
        x = norms.gated_residual(x, y, gate)
        normed, gate = second
        y = self.attn2(hidden_states=normed, **options)
    x = feed_forward(found[0], self.ff, x, y, (gate, shift, scale, last_gate))
    if self.context_pre_only:
        return None, x
    return feed_forward(found_text[0], self.ff_context, text, y_text, tuple(parts)), x


@replacement("norm2")
def single_block(self: nn.Module, hidden_states: Tensor, temb: Tensor) -> Tensor:
    """A block of the image stream alone."""
    if (found := norms.ready(hidden_states, self.norm2)) is None:
        return NotImplemented
    normed, *parts = self.norm1(hidden_states, emb=temb)
    y = self.attn(hidden_states=normed, encoder_hidden_states=None)
    return feed_forward(found[0], self.ff, hidden_states, y, tuple(parts))


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
        recognises=named("JointTransformerBlock"),
        probe=_joint_calls,
    ),
    Rule(
        name="single block",
        ops="gated_adaln, gated_residual",
        forward=single_block,
        recognises=named("SD3SingleTransformerBlock"),
        probe=lambda m: [((tokens(_width(m)), torch.randn(2, _width(m))), {})],
    ),
)
