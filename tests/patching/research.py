"""Models with the module structure of the published research code, written anew for these tests.

Names of children, parameters, arguments and the order of operations are those of facebookresearch/
DiT, SiT, REPA, fast-DiT and LightningDiT (with timm's PatchEmbed, Attention and Mlp); the first is
held to its recorded outputs in test_research.py.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


class Patches(nn.Module):
    """timm's PatchEmbed."""

    def __init__(self, size, patch, channels, width):
        super().__init__()
        self.img_size, self.patch_size = (size, size), (patch, patch)
        self.num_patches = (size // patch) ** 2
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)
        self.norm = nn.Identity()

    def forward(self, x):
        assert tuple(x.shape[2:]) == self.img_size
        return self.norm(self.proj(x).flatten(2).transpose(1, 2))


class TimmAttention(nn.Module):
    """timm's Attention; with `rope`, LightningDiT's."""

    def __init__(self, width, heads, norm=None, drop=0.0):
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.scale, self.fused_attn = self.head_dim**-0.5, True
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = norm(self.head_dim) if norm else nn.Identity()
        self.k_norm = norm(self.head_dim) if norm else nn.Identity()
        self.attn_drop = nn.Dropout(drop)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x, rope=None):
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rope(q), rope(k)
        dropped = self.attn_drop.p if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropped)
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(batch, tokens, width)))


class TimmMlp(nn.Module):
    """timm's Mlp."""

    def __init__(self, width, hidden, approximate="tanh", drop=0.0):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU(approximate=approximate)
        self.drop1 = nn.Dropout(drop)
        self.norm = nn.Identity()
        self.fc2 = nn.Linear(hidden, width)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x):
        x = self.norm(self.drop1(self.act(self.fc1(x))))
        return self.drop2(self.fc2(x))


class SwiGLUFFN(nn.Module):
    """LightningDiT's feed-forward."""

    def __init__(self, width, hidden):
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, -1)
        return self.w3(F.silu(gate) * value)


class RMSNorm(nn.Module):
    """LightningDiT's, in float32 and back."""

    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        exact = x.float()
        unit = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + self.eps)
        return unit.type_as(x) * self.weight


class VisionRotary(nn.Module):
    """EVA's rotary positions: freqs_cos and freqs_sin over (tokens, head_dim)."""

    def __init__(self, grid, head_dim):
        super().__init__()
        freqs = 10000.0 ** (-torch.arange(0, head_dim // 2, 2) / (head_dim // 2))
        angle = (torch.arange(grid)[:, None] * freqs).repeat_interleave(2, -1)
        rows = angle[:, None].expand(grid, grid, -1)
        angles = torch.cat([rows, rows.transpose(0, 1)], -1).reshape(grid * grid, head_dim)
        self.register_buffer("freqs_cos", angles.cos())
        self.register_buffer("freqs_sin", angles.sin())

    def forward(self, t):
        even, odd = t[..., 0::2], t[..., 1::2]
        turned = torch.stack((-odd, even), -1).reshape(t.shape)
        return t * self.freqs_cos + turned * self.freqs_sin


def modulate(x, shift, scale):
    x = x * (1 + scale.unsqueeze(1))
    return x if shift is None else x + shift.unsqueeze(1)


def layer_norm(width):
    return nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)


class Block(nn.Module):
    """DiTBlock, SiTBlock and LightningDiTBlock."""

    def __init__(
        self, width, heads, norm=layer_norm, qk_norm=None, swiglu=False, wo_shift=False,
        mlp_ratio=4.0,
    ):  # fmt: skip
        super().__init__()
        self.norm1 = norm(width)
        self.attn = TimmAttention(width, heads, qk_norm)
        self.norm2 = norm(width)
        self.mlp = SwiGLUFFN(width, 2 * width) if swiglu else TimmMlp(width, int(mlp_ratio * width))
        parts = 4 if wo_shift else 6
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, parts * width))
        self.wo_shift = wo_shift

    def forward(self, x, c, feat_rope=None):
        parts = self.adaLN_modulation(c)
        if self.wo_shift:
            s1, g1, s2, g2 = parts.chunk(4, dim=1)
            b1 = b2 = None
        else:
            b1, s1, g1, b2, s2, g2 = parts.chunk(6, dim=1)
        x = x + g1.unsqueeze(1) * self.attn(modulate(self.norm1(x), b1, s1), rope=feat_rope)
        return x + g2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), b2, s2))


class FinalLayer(nn.Module):
    def __init__(self, width, out, norm=layer_norm):
        super().__init__()
        self.norm_final = norm(width)
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class TimestepEmbedder(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        freqs = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
        angles = t[:, None].float() * freqs[None].to(t.device)
        rows = torch.cat([angles.cos(), angles.sin()], -1)
        return self.mlp(rows.to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    def __init__(self, classes, width, dropout):
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)
        self.num_classes, self.dropout_prob = classes, dropout

    def forward(self, labels, train):
        if train and self.dropout_prob > 0:
            dropped = torch.rand(labels.shape[0], device=labels.device) < self.dropout_prob
            labels = torch.where(dropped, self.num_classes, labels)
        return self.embedding_table(labels)


class DiT(nn.Module):
    """facebookresearch/DiT and SiT."""

    def __init__(
        self, input_size=8, patch_size=2, in_channels=4, hidden_size=48, depth=2, num_heads=4,
        class_dropout_prob=0.1, num_classes=10, learn_sigma=True, **block,
    ):  # fmt: skip
        super().__init__()
        self.out_channels = in_channels * 2 if learn_sigma else in_channels
        self.x_embedder = Patches(input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        positions = torch.zeros(1, self.x_embedder.num_patches, hidden_size)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, **block) for _ in range(depth))
        norm = block.get("norm", layer_norm)
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * self.out_channels, norm)

    def unpatchify(self, x):
        p, c = self.x_embedder.patch_size[0], self.out_channels
        side = int(x.shape[1] ** 0.5)
        x = x.reshape(x.shape[0], side, side, p, p, c)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(x.shape[0], c, side * p, side * p)

    def condition(self, t, y):
        return self.t_embedder(t) + self.y_embedder(y, self.training)

    def forward(self, x, t, y):
        x = self.x_embedder(x) + self.pos_embed
        c = self.condition(t, y)
        for block in self.blocks:
            x = block(x, c)
        return self.unpatchify(self.final_layer(x, c))


class FastDiT(DiT):
    """chuanyangjin/fast-DiT: every block checkpointed."""

    def forward(self, x, t, y):
        x = self.x_embedder(x) + self.pos_embed
        c = self.condition(t, y)
        for block in self.blocks:
            x = checkpoint(lambda *args, block=block: block(*args), x, c, use_reentrant=False)
        return self.unpatchify(self.final_layer(x, c))


class REPA(DiT):
    """sihyun-yu/REPA: a SiT that also projects one block's tokens."""

    def __init__(self, encoder_depth=1, **kwargs):
        super().__init__(learn_sigma=False, **kwargs)
        width = self.pos_embed.shape[-1]
        self.encoder_depth = encoder_depth
        self.projectors = nn.ModuleList([nn.Sequential(nn.Linear(width, 24), nn.SiLU())])

    def forward(self, x, t, y):
        x = self.x_embedder(x) + self.pos_embed
        c = self.condition(t, y)
        for i, block in enumerate(self.blocks):
            x = block(x, c)
            if i + 1 == self.encoder_depth:
                projected = [projector(x) for projector in self.projectors]
        return self.unpatchify(self.final_layer(x, c)), projected


class LightningDiT(DiT):
    """hustvl/LightningDiT: RMSNorm, QK-norm, SwiGLU, rotary positions, optionally no shift."""

    def __init__(self, wo_shift=False, rms=True, qk_norm=True, swiglu=True, **kwargs):
        super().__init__(
            learn_sigma=False,
            norm=RMSNorm if rms else layer_norm,
            qk_norm=(RMSNorm if rms else nn.LayerNorm) if qk_norm else None,
            swiglu=swiglu,
            wo_shift=wo_shift,
            **kwargs,
        )
        attn = self.blocks[0].attn
        self.feat_rope = VisionRotary(math.isqrt(self.x_embedder.num_patches), attn.head_dim)

    def forward(self, x, t=None, y=None):
        x = self.x_embedder(x) + self.pos_embed
        c = self.condition(t, y)
        for block in self.blocks:
            x = block(x, c, self.feat_rope)
        return self.unpatchify(self.final_layer(x, c))


FAMILIES = {
    "DiT": DiT,
    "SiT": lambda **kw: DiT(learn_sigma=False, **kw),
    "REPA": REPA,
    "fast-DiT": FastDiT,
    "LightningDiT": LightningDiT,
    "LightningDiT, no shift": lambda **kw: LightningDiT(wo_shift=True, **kw),
    "LightningDiT, LayerNorm": lambda **kw: LightningDiT(rms=False, **kw),
}


def inputs(model, batch=2, seed=0):
    """Latents, timesteps and labels for one of these models."""
    generator = torch.Generator().manual_seed(seed)
    size = model.x_embedder.img_size
    channels = model.x_embedder.proj.in_channels
    dtype = model.pos_embed.dtype
    x = torch.randn(batch, channels, *size, generator=generator, dtype=dtype)
    t = torch.randint(0, 1000, (batch,), generator=generator)
    return x, t, torch.randint(0, 10, (batch,), generator=generator)
