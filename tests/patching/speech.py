"""The blocks of F5-TTS, written anew for these tests: the names of children and arguments, and the
order of operations, are its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class AdaLayerNorm(nn.Module):
    """Six parts; the first two are applied, the others given back."""

    def __init__(self, width):
        super().__init__()
        self.silu, self.linear = nn.SiLU(), nn.Linear(width, 6 * width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)

    def forward(self, x, emb=None):
        shift, scale, *rest = self.linear(self.silu(emb)).chunk(6, dim=1)
        return self.norm(x) * (1 + scale[:, None]) + shift[:, None], *rest


class AdaLayerNorm_Final(nn.Module):
    """Scale first."""

    def __init__(self, width):
        super().__init__()
        self.silu, self.linear = nn.SiLU(), nn.Linear(width, 2 * width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)

    def forward(self, x, emb):
        scale, shift = self.linear(self.silu(emb)).chunk(2, dim=1)
        return self.norm(x) * (1 + scale)[:, None] + shift[:, None]


class FeedForward(nn.Module):
    def __init__(self, width):
        super().__init__()
        first = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"))
        self.ff = nn.Sequential(first, nn.Dropout(0.0), nn.Linear(4 * width, width))

    def forward(self, x):
        return self.ff(x)


class Attention(nn.Module):
    """Self-attention, or with `text` joint attention."""

    def __init__(self, width, heads, text=None):
        super().__init__()
        self.heads, self.processor = heads, None
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(0.0)])
        if text:
            self.to_qkv_c, self.to_out_c = nn.Linear(text, 3 * width), nn.Linear(width, text)

    def forward(self, x, c=None, mask=None, rope=None, c_rope=None):
        parts = [self.to_q(x), self.to_k(x), self.to_v(x)]
        if c is not None:
            both = zip(parts, self.to_qkv_c(c).chunk(3, -1), strict=True)
            parts = [torch.cat(pair, 1) for pair in both]
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in parts)
        keys = None if mask is None else F.pad(mask, (0, k.shape[2] - x.shape[1]), value=True)
        y = F.scaled_dot_product_attention(q, k, v, keys if keys is None else keys[:, None, None])
        y = y.transpose(1, 2).flatten(2)
        ours = self.to_out[1](self.to_out[0](y[:, : x.shape[1]]))
        ours = ours if mask is None else ours.masked_fill(~mask[..., None], 0.0)
        return ours if c is None else (ours, self.to_out_c(y[:, x.shape[1] :]))


class DiTBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.attn_norm, self.attn = AdaLayerNorm(width), Attention(width, heads)
        self.ff_norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.ff = FeedForward(width)

    def forward(self, x, t, mask=None, rope=None):
        norm, gate, shift_mlp, scale_mlp, gate_mlp = self.attn_norm(x, emb=t)
        x = x + gate.unsqueeze(1) * self.attn(x=norm, mask=mask, rope=rope)
        norm = self.ff_norm(x) * (1 + scale_mlp[:, None]) + shift_mlp[:, None]
        return x + gate_mlp.unsqueeze(1) * self.ff(norm)


class MMDiTBlock(nn.Module):
    def __init__(self, width, heads, context_pre_only=False):
        super().__init__()
        self.context_pre_only = context_pre_only
        self.attn_norm_c = (AdaLayerNorm_Final if context_pre_only else AdaLayerNorm)(width)
        self.attn_norm_x = AdaLayerNorm(width)
        self.attn = Attention(width, heads, width)
        norm = {"elementwise_affine": False, "eps": 1e-6}
        self.ff_norm_c = None if context_pre_only else nn.LayerNorm(width, **norm)
        self.ff_c = None if context_pre_only else FeedForward(width)
        self.ff_norm_x, self.ff_x = nn.LayerNorm(width, **norm), FeedForward(width)

    def forward(self, x, c, t, mask=None, rope=None, c_rope=None):
        if self.context_pre_only:
            norm_c = self.attn_norm_c(c, t)
        else:
            norm_c, gate_c, shift_c, scale_c, last_c = self.attn_norm_c(c, emb=t)
        norm_x, gate, shift, scale, last = self.attn_norm_x(x, emb=t)
        y, y_c = self.attn(x=norm_x, c=norm_c, mask=mask, rope=rope, c_rope=c_rope)
        if self.context_pre_only:
            c = None
        else:
            c = c + gate_c.unsqueeze(1) * y_c
            norm_c = self.ff_norm_c(c) * (1 + scale_c[:, None]) + shift_c[:, None]
            c = c + last_c.unsqueeze(1) * self.ff_c(norm_c)
        x = x + gate.unsqueeze(1) * y
        norm_x = self.ff_norm_x(x) * (1 + scale[:, None]) + shift[:, None]
        return c, x + last.unsqueeze(1) * self.ff_x(norm_x)


class Speech(nn.Module):
    """Two blocks of a kind, the final norm and a projection."""

    def __init__(self, kind, width=32, heads=2):
        super().__init__()
        if kind == "MMDiTBlock":
            self.joint_blocks = nn.ModuleList(
                MMDiTBlock(width, heads, context_pre_only) for context_pre_only in (False, True)
            )
        else:
            self.blocks = nn.ModuleList(DiTBlock(width, heads) for _ in range(2))
        self.norm_out, self.proj_out = AdaLayerNorm_Final(width), nn.Linear(width, 4)

    def forward(self, x, c, t, mask=None):
        for block in getattr(self, "joint_blocks", []):
            c, x = block(x, c, t, mask=mask)
        for block in getattr(self, "blocks", []):
            x = block(x, t, mask=mask)
        return self.proj_out(self.norm_out(x, t))
