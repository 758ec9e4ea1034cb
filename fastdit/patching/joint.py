"""Blocks of two streams, image and text, that meet in one attention: what SD3, Flux and AuraFlow in
diffusers share.

Per stream an adaLN-Zero gives the attention's input and (gate₁, shift, scale, gate₂):

    h = x + gate₁·y;  x = h + gate₂·ff(norm2(h)·(1 + scale) + shift)

The gated addition and the modulation before the feed-forward become one `gated_adaln`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdit.patching import norms
from fastdit.patching.diffusers_norms import named, tokens
from fastdit.patching.rules import Call, Rule

Branch = Callable[[norms.Norm, nn.Module, Tensor, Tensor, Sequence[Tensor]], Tensor]
"""The rest of a stream's block: of norm2, feed-forward, stream, attention's output and the four."""


def feed_forward(
    norm: norms.Norm, ff: nn.Module, x: Tensor, y: Tensor, parts: Sequence[Tensor]
) -> Tensor:
    """Add a gated branch, then the gated feed-forward."""
    gate, shift, scale, last_gate = parts
    x, normed = norms.gated_adaln(norm, x, y, gate, shift, scale)
    return norms.gated_residual(x, ff(normed), last_gate)


def two_streams(
    self: nn.Module,
    x: Tensor,
    text: Tensor,
    temb: Tensor,
    branch: Branch = feed_forward,
    **options: Any,
) -> Any:
    """The text's stream, the image's, and what the attention returned besides; `NotImplemented`
    where the ops have not the norms."""
    found, found_text = norms.ready(x, self.norm2), norms.ready(text, self.norm2_context)
    if found is None or found_text is None:
        return NotImplemented
    normed, *parts = self.norm1(x, emb=temb)
    normed_text, *text_parts = self.norm1_context(text, emb=temb)
    y, y_text, *more = self.attn(hidden_states=normed, encoder_hidden_states=normed_text, **options)
    x = branch(found[0], self.ff, x, y, parts)
    return branch(found_text[0], self.ff_context, text, y_text, text_parts), x, *more


def one_stream(
    self: nn.Module, x: Tensor, temb: Tensor, branch: Branch = feed_forward, **options: Any
) -> Tensor:
    """A block of one stream; `NotImplemented` where the ops have not its norm."""
    if (found := norms.ready(x, self.norm2)) is None:
        return NotImplemented
    normed, *parts = self.norm1(x, emb=temb)
    y = self.attn(hidden_states=normed, **options)
    return branch(found[0], self.ff, x, y, parts)


def _width(module: nn.Module) -> int:
    return module.norm2.normalized_shape[0]


def two_streams_calls(module: nn.Module) -> list[Call]:
    width = _width(module)
    return [((tokens(width), tokens(width, 3), torch.randn(2, width)), {})]


def one_stream_calls(module: nn.Module) -> list[Call]:
    width = _width(module)
    return [((tokens(width), torch.randn(2, width)), {})]


def rule(
    name: str,
    forward: Callable[..., Any],
    class_name: str,
    calls: Callable[[nn.Module], list[Call]],
    ops: str = "gated_adaln, gated_residual",
) -> Rule:
    return Rule(name=name, ops=ops, forward=forward, recognises=named(class_name), probe=calls)
