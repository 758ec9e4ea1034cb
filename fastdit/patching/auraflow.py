"""AuraFlow in diffusers: its joint and single blocks.

Unlike other joint blocks, the feed-forward's branch is added to the block's input, not to the
stream after attention: x + gate₂·ff(norm2(x + gate₁·attn)), and norms are in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fastdit.patching import joint, norms
from fastdit.patching.rules import replacement


def _feed_forward(
    norm: norms.Norm, ff: nn.Module, x: Tensor, y: Tensor, parts: Sequence[Tensor]
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
    options = attention_kwargs or {}
    return joint.two_streams(
        self, hidden_states, encoder_hidden_states, temb, _feed_forward, **options
    )


@replacement("norm2")
def single_block(
    self: nn.Module,
    hidden_states: Tensor,
    temb: Tensor,
    attention_kwargs: dict[str, Any] | None = None,
) -> Tensor:
    """A block of text and image tokens in one stream."""
    return joint.one_stream(self, hidden_states, temb, _feed_forward, **(attention_kwargs or {}))


RULES = (
    joint.rule(
        "joint block", joint_block, "AuraFlowJointTransformerBlock", joint.two_streams_calls
    ),
    joint.rule(
        "single block", single_block, "AuraFlowSingleTransformerBlock", joint.one_stream_calls
    ),
)
