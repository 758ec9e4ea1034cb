"""F5-TTS, speech: DiTBlock of one stream, MMDiTBlock of audio and text, and their norms.

    x += gate₁·attn(attn_norm(x) modulated);  x += gate₂·ff(ff_norm(x)·(1 + scale₂) + shift₂)

The six come out of attn_norm, an AdaLayerNorm that is a site of its own, as is the feed-forward's
first half. The last MMDiTBlock drops the text.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdit import ops
from fastdit.patching import joint, norms
from fastdit.patching.diffusers_norms import tokens
from fastdit.patching.published import has, linear, tanh_gelu
from fastdit.patching.rules import Call, Rule, replacement


@replacement("norm")
def norm(self: nn.Module, x: Tensor, emb: Tensor | None = None) -> Any:
    """The modulated input of the attention, and the rest of the six."""
    if (found := norms.ready(x, self.norm)) is None:
        return NotImplemented
    shift, scale, *rest = self.linear(self.silu(emb)).chunk(6, dim=1)
    return norms.adaln(found[0], x, shift, scale), *rest


@replacement("norm")
def final_norm(self: nn.Module, x: Tensor, emb: Tensor) -> Tensor:
    """Scale, then shift."""
    if (found := norms.ready(x, self.norm)) is None:
        return NotImplemented
    scale, shift = self.linear(self.silu(emb)).chunk(2, dim=1)
    return norms.adaln(found[0], x, shift, scale)


@replacement("ff_norm")
def block(
    self: nn.Module, x: Tensor, t: Tensor, mask: Tensor | None = None, rope: Any = None
) -> Tensor:
    """A block of one stream."""
    if (found := norms.ready(x, self.ff_norm)) is None:
        return NotImplemented
    normed, *parts = self.attn_norm(x, emb=t)
    y = self.attn(x=normed, mask=mask, rope=rope)
    return joint.feed_forward(found[0], self.ff, x, y, parts)


@replacement("ff_norm_c", "ff_norm_x")
def joint_block(
    self: nn.Module,
    x: Tensor,
    c: Tensor,
    t: Tensor,
    mask: Tensor | None = None,
    rope: Any = None,
    c_rope: Any = None,
) -> Any:
    """A block of two streams."""
    found = norms.ready(x, self.ff_norm_x)
    found_text = [None] if self.context_pre_only else norms.ready(c, self.ff_norm_c)
    if found is None or found_text is None:
        return NotImplemented
    if self.context_pre_only:
        normed_text, text_parts = self.attn_norm_c(c, t), []
    else:
        normed_text, *text_parts = self.attn_norm_c(c, emb=t)
    normed, *parts = self.attn_norm_x(x, emb=t)
    y, y_text = self.attn(x=normed, c=normed_text, mask=mask, rope=rope, c_rope=c_rope)
    text = None
    if not self.context_pre_only:
        text = joint.feed_forward(found_text[0], self.ff_c, c, y_text, text_parts)
    return text, joint.feed_forward(found[0], self.ff_x, x, y, parts)


@replacement("0", "1")
def projection(self: nn.Module, x: Tensor) -> Tensor:
    """Linear and tanh-GELU; the bias is added by the latter's kernel."""
    first, activation = self
    if not linear(first) or first.bias is None or not tanh_gelu(activation):
        return NotImplemented
    return ops.bias_gelu(F.linear(x, first.weight), first.bias)


def _parts(count: int, name: str) -> Any:
    """Whether a module is a norm that is modulated by `count` parts, under this name."""
    return lambda m: (
        type(m).__name__ == name
        and has(m, "silu", "linear", "norm")
        and m.linear.out_features == count * m.linear.in_features
        and not hasattr(m, "chunk_dim")
    )


def _norm_calls(module: nn.Module) -> list[Call]:
    width = module.linear.in_features
    return [((tokens(width), torch.randn(2, width)), {})]


def _block_calls(module: nn.Module) -> list[Call]:
    width = module.ff_norm.normalized_shape[0]
    return [((tokens(width), torch.randn(2, width)), {})]


def _joint_calls(module: nn.Module) -> list[Call]:
    width, text = (n.linear.in_features for n in (module.attn_norm_x, module.attn_norm_c))
    return [((tokens(width), tokens(text, 3), torch.randn(2, width)), {})]


RULES = (
    Rule(
        name="adaLN-Zero block",
        ops="gated_adaln, gated_residual",
        forward=block,
        recognises=lambda m: has(m, "attn_norm", "attn", "ff_norm", "ff"),
        probe=_block_calls,
    ),
    Rule(
        name="joint block",
        ops="gated_adaln, gated_residual",
        forward=joint_block,
        recognises=lambda m: has(m, "attn_norm_c", "attn_norm_x", "attn", "ff_norm_x", "ff_x"),
        probe=_joint_calls,
    ),
    Rule(
        name="adaLN-Zero norm",
        ops="adaln",
        forward=norm,
        recognises=_parts(6, "AdaLayerNorm"),
        probe=_norm_calls,
    ),
    Rule(
        name="adaptive norm",
        ops="adaln",
        forward=final_norm,
        recognises=_parts(2, "AdaLayerNorm_Final"),
        probe=_norm_calls,
    ),
    Rule(
        name="tanh-GELU projection",
        ops="bias_gelu",
        forward=projection,
        recognises=lambda m: (
            type(m) is nn.Sequential and len(m) == 2 and linear(m[0]) and tanh_gelu(m[1])
        ),
        probe=lambda m: [((torch.randn(2, 4, m[0].in_features),), {})],
    ),
)
