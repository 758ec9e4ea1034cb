"""diffusers' BasicTransformerBlock: the blocks of DiT, PixArt and Latte.

    x += gate₁·attn1(norm1(x) modulated);  [x += attn2(x)];  x += gate₂·ff(norm(x) modulated)

adaLN-Zero takes its six from norm1's own projection; adaLN-single adds a table of the block's to
six that the model computed once. With a cross-attention between, its plain addition is fused with
the second normalisation instead of the gated one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastdit.patching import norms
from fastdit.patching.diffusers_norms import named, tokens
from fastdit.patching.rules import Call, Rule, replacement


def _second_norm(block: nn.Module) -> str:
    """The norm before the feed-forward: adaLN-single calls it norm2."""
    return "norm3" if block.norm_type == "ada_norm_zero" else "norm2"


def _first(
    block: nn.Module, x: Tensor, timestep: Tensor | None, class_labels: Tensor | None
) -> tuple[Tensor, ...] | None:
    """norm1(x) modulated, then gate₁, shift₂, scale₂, gate₂."""
    if block.norm_type == "ada_norm_zero":
        return block.norm1(x, timestep, class_labels, hidden_dtype=x.dtype)
    found = norms.ready(x, block.norm1)
    if found is None:
        return None
    six = norms.table(block.scale_shift_table[None], timestep.reshape(x.shape[0], 6, -1))
    return norms.adaln(found[0], x, *six[:2]), *six[2:]


@replacement("norm3")
def zero_block(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """A block whose norm1 is an AdaLayerNormZero, which is a site of its own."""
    return _block(self, *args, **kwargs)


@replacement("norm1", "norm2")
def single_block(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """A block modulated from its scale_shift_table."""
    return _block(self, *args, **kwargs)


def _block(
    self: nn.Module,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Tensor | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    class_labels: Tensor | None = None,
    added_cond_kwargs: dict[str, Tensor] | None = None,
) -> Tensor:
    x, options = hidden_states, cross_attention_kwargs or {}
    found = norms.ready(x, getattr(self, _second_norm(self)))
    chunked = self._chunk_size is not None
    if found is None or chunked or "gligen" in options or options.get("scale") is not None:
        return NotImplemented
    parts = _first(self, x, timestep, class_labels)
    if parts is None:
        return NotImplemented
    normed, gate, shift, scale, last_gate = parts
    if self.pos_embed is not None:
        normed = self.pos_embed(normed)
    context = encoder_hidden_states if self.only_cross_attention else None
    y = self.attn1(normed, encoder_hidden_states=context, attention_mask=attention_mask, **options)
    if self.attn2 is None:
        x, normed = norms.gated_adaln(found[0], x, y, gate, shift, scale)
    else:
        x = norms.gated_residual(x, y, gate)
        y = self.attn2(
            self._modules["norm2"](x) if self.norm_type == "ada_norm_zero" else x,
            encoder_hidden_states=encoder_hidden_states,
            attention_mask=encoder_attention_mask,
            **options,
        )
        x, normed = norms.added_adaln(found[0], x, y, shift, scale)
    return norms.gated_residual(x, self.ff(normed), last_gate)


def block(
    self: nn.Module,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Tensor | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    class_labels: Tensor | None = None,
    added_cond_kwargs: dict[str, Tensor] | None = None,
) -> Tensor:
    """Either kind of block, for loaders that know classes by their names only."""
    forward = zero_block if self.norm_type == "ada_norm_zero" else single_block
    return forward(
        self,
        hidden_states,
        attention_mask,
        encoder_hidden_states,
        encoder_attention_mask,
        timestep,
        cross_attention_kwargs,
        class_labels,
        added_cond_kwargs,
    )


def _calls(module: nn.Module) -> list[Call]:
    kwargs: dict[str, Any] = {}
    if module.attn2 is not None:
        kwargs["encoder_hidden_states"] = torch.randn(2, 3, module.attn2.to_k.in_features)
    if module.norm_type == "ada_norm_zero":
        kwargs |= {"timestep": torch.tensor([3, 700]), "class_labels": torch.tensor([0, 1])}
    else:
        kwargs["timestep"] = torch.randn(2, 6 * module.dim)
    return [((tokens(module.dim),), kwargs)]


def _rule(norm_type: str, forward: Any) -> Rule:
    return Rule(
        name=f"{norm_type} block",
        ops="adaln, gated_adaln, gated_residual",
        forward=forward,
        recognises=lambda m: (
            named("BasicTransformerBlock")(m) and getattr(m, "norm_type", None) == norm_type
        ),
        probe=_calls,
    )


RULES = (_rule("ada_norm_zero", zero_block), _rule("ada_norm_single", single_block))
