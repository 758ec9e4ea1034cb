"""Wan in diffusers: modulation in float32 around a stream of any dtype, rounded once at the end.

That is what the ops do by themselves: float32 arithmetic, float32 modulations, one rounding to the
stream's dtype. The six are per sample, or per token where frames have timesteps of their own
(Wan 2.2).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastdit import ops
from fastdit.patching import norms
from fastdit.patching.diffusers_norms import named, tokens
from fastdit.patching.rules import Call, Rule, replacement


def _affine(norm: nn.Module, x: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """h = x + gate·y, and the cross-attention's norm of h. Its weight and bias stay in float32, so
    they are given as a scale and a shift, which may."""
    if isinstance(norm, nn.Identity):
        h = norms.gated_residual(x, y, gate, rounds=True)
        return h, h
    shift, scale = (t.expand(x.shape[0], -1) for t in (norm.bias, norm.weight))
    gate = norms.rows(gate, x)
    return ops.gated_adaln(x, y, gate, shift, scale, norm.eps, plus_one=False)


@replacement("norm1", "norm2", "norm3")
def block(
    self: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    rotary_emb: Tensor,
) -> Tensor:
    """Self-attention, cross-attention, feed-forward."""
    x = hidden_states
    found, affine = norms.ready(x, self.norm1, self.norm3), norms.norm_of(self.norm2)
    known = isinstance(self.norm2, nn.Identity) or (affine is not None and affine.bias is not None)
    if found is None or not known:
        return NotImplemented
    six = norms.table(self.scale_shift_table, temb.float())
    shift, scale, gate, last_shift, last_scale, last_gate = six
    y = self.attn1(norms.adaln(found[0], x, shift, scale), None, None, rotary_emb)
    x, normed = _affine(self.norm2, x, y, gate)
    y = self.attn2(normed, encoder_hidden_states, None, None)
    x, normed = norms.added_adaln(found[1], x, y, last_shift, last_scale)
    return norms.gated_residual(x, self.ffn(normed), last_gate, rounds=True)


def _calls(module: nn.Module) -> list[Call]:
    width = module.norm1.normalized_shape[0]
    text = torch.randn(2, 3, module.attn2.to_k.in_features)
    conditions = torch.randn(2, 6, width), torch.randn(2, 4, 6, width)
    return [((tokens(width), text, condition, None), {}) for condition in conditions]


RULES = (
    Rule(
        name="adaLN-single block",
        ops="adaln, gated_adaln, gated_residual",
        forward=block,
        recognises=named("WanTransformerBlock"),
        probe=_calls,
    ),
)
