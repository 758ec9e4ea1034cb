"""Flux 2 in diffusers: Flux2TransformerBlock of two streams, Flux2SingleTransformerBlock of one.

The modulations of all blocks are computed once by the model, and handed to each: six for each
stream of a joint block, three for a single one, whose attention has its feed-forward inside.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastdit.patching import joint, norms
from fastdit.patching.diffusers_norms import tokens
from fastdit.patching.flux import clipped
from fastdit.patching.rules import Call, replacement


def _parts(modulation: Tensor, count: int) -> tuple[Tensor, ...]:
    """Shift, scale and gate of one branch or of two: `(B, D)`, or `(B, N, D)` per token."""
    return modulation.chunk(count, dim=-1)


@replacement("norm1", "norm1_context", "norm2", "norm2_context")
def double_block(
    self: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb_mod_img: Tensor,
    temb_mod_txt: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> Any:
    """A block of two streams."""
    x, text = hidden_states, encoder_hidden_states
    found = norms.ready(x, self.norm1, self.norm2)
    found_text = norms.ready(text, self.norm1_context, self.norm2_context)
    if found is None or found_text is None:
        return NotImplemented
    shift, scale, *parts = _parts(temb_mod_img, 6)
    text_shift, text_scale, *text_parts = _parts(temb_mod_txt, 6)
    y, y_text = self.attn(
        hidden_states=norms.adaln(found[0], x, shift, scale),
        encoder_hidden_states=norms.adaln(found_text[0], text, text_shift, text_scale),
        image_rotary_emb=image_rotary_emb,
        **(joint_attention_kwargs or {}),
    )
    x = joint.feed_forward(found[1], self.ff, x, y, parts)
    return clipped(joint.feed_forward(found_text[1], self.ff_context, text, y_text, text_parts)), x


@replacement("norm")
def single_block(
    self: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None,
    temb_mod: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    split_hidden_states: bool = False,
    text_seq_len: int | None = None,
) -> Any:
    """A block of text and image tokens in one stream."""
    x = hidden_states
    if encoder_hidden_states is not None:
        text_seq_len = encoder_hidden_states.shape[1]
        x = torch.cat([encoder_hidden_states, x], dim=1)
    if (found := norms.ready(x, self.norm)) is None:
        return NotImplemented
    shift, scale, gate = _parts(temb_mod, 3)
    y = self.attn(
        hidden_states=norms.adaln(found[0], x, shift, scale),
        image_rotary_emb=image_rotary_emb,
        **(joint_attention_kwargs or {}),
    )
    x = clipped(norms.gated_residual(x, y, gate))
    return (x[:, :text_seq_len], x[:, text_seq_len:]) if split_hidden_states else x


def _width(module: nn.Module) -> int:
    return module.attn.query_dim


def _double_calls(module: nn.Module) -> list[Call]:
    width = _width(module)
    conditions = [torch.randn(2, 6 * width) for _ in range(2)]
    return [((tokens(width), tokens(width, 3), *conditions), {})]


def _single_calls(module: nn.Module) -> list[Call]:
    width = _width(module)
    per_sample, per_token = torch.randn(2, 3 * width), torch.randn(2, 7, 3 * width)
    return [
        ((tokens(width), tokens(width, 3), condition), {"split_hidden_states": True})
        for condition in (per_sample, per_token)
    ]


RULES = (
    joint.rule("joint block", double_block, "Flux2TransformerBlock", _double_calls),
    joint.rule(
        "parallel block",
        single_block,
        "Flux2SingleTransformerBlock",
        _single_calls,
        "adaln, gated_residual",
    ),
)
