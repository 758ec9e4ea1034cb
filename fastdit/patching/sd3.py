"""Stable Diffusion 3 in diffusers: JointTransformerBlock and SD3SingleTransformerBlock.

SD 3.5's second attention of the image stream is another gate between the two of `joint`; the last
block drops the text.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastdit.patching import joint, norms
from fastdit.patching.rules import replacement


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
        normed_text, parts = self.norm1_context(text, temb), []
    else:
        normed_text, *parts = self.norm1_context(text, emb=temb)
    y, y_text = self.attn(hidden_states=normed, encoder_hidden_states=normed_text, **options)
    if self.use_dual_attention:
        x = norms.gated_residual(x, y, gate)
        normed, gate = second
        y = self.attn2(hidden_states=normed, **options)
    x = joint.feed_forward(found[0], self.ff, x, y, (gate, shift, scale, last_gate))
    if self.context_pre_only:
        return None, x
    return joint.feed_forward(found_text[0], self.ff_context, text, y_text, parts), x


@replacement("norm2")
def single_block(self: nn.Module, hidden_states: Tensor, temb: Tensor) -> Tensor:
    """A block of the image stream alone."""
    return joint.one_stream(self, hidden_states, temb, encoder_hidden_states=None)


RULES = (
    joint.rule("joint block", joint_block, "JointTransformerBlock", joint.two_streams_calls),
    joint.rule("single block", single_block, "SD3SingleTransformerBlock", joint.one_stream_calls),
)
