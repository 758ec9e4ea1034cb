"""DiT in plain PyTorch: what the benchmarks call eager.

The arithmetic of Peebles & Xie 2022 as their code does it, op for op: a convolution for the
patches, a Linear with its bias before the GELU, every block computing its own modulation. The names
of the parameters are fastdit's, which are the published ones, so that both share their weights.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastdit


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, width))


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (
            nn.LayerNorm(width, elementwise_affine=False, eps=1e-6) for _ in range(2)
        )
        self.attn, self.mlp = Attention(width, heads), Mlp(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, 1)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.linear(modulate(self.norm_final(x), *self.adaLN_modulation(c).chunk(2, 1)))


class PlainDiT(nn.Module):
    """The same function as `like`, in eval mode, on its very parameters."""

    def __init__(self, like: fastdit.DiT) -> None:
        super().__init__()
        config = like.config
        width, heads, patch = (config[key] for key in ("hidden_size", "num_heads", "patch_size"))
        self.patch, self.out_channels, self.grid = patch, like.out_channels, like.grid
        self.num_classes, self.in_channels = like.num_classes, like.in_channels
        with torch.device("meta"):
            self.x_embedder = nn.Module()
            self.x_embedder.proj = nn.Conv2d(config["in_channels"], width, patch, stride=patch)
            self.t_embedder, self.y_embedder = nn.Module(), nn.Module()
            self.t_embedder.mlp = nn.Sequential(
                nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width)
            )
            labels = len(like.y_embedder.embedding_table.weight)
            self.y_embedder.embedding_table = nn.Embedding(labels, width)
            self.pos_embed = nn.Parameter(torch.empty_like(like.pos_embed), requires_grad=False)
            self.blocks = nn.ModuleList(Block(width, heads) for _ in range(config["depth"]))
            self.final_layer = FinalLayer(width, patch * patch * self.out_channels)
        self.load_state_dict(like.state_dict(keep_vars=True), assign=True)
        self.train(like.training)

    def condition(self, t: Tensor, y: Tensor) -> Tensor:
        frequencies = torch.exp(
            -math.log(10000) * torch.arange(128, dtype=torch.float32, device=t.device) / 128
        )
        angles = t[:, None].float() * frequencies
        embedded = torch.cat([angles.cos(), angles.sin()], 1)
        embedded = embedded.to(self.pos_embed.dtype)
        return self.t_embedder.mlp(embedded) + self.y_embedder.embedding_table(y)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c = self.condition(t, y)
        x = self.x_embedder.proj(x).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            x = block(x, c)
        x = self.final_layer(x, c)
        (height, width), patch, channels = self.grid, self.patch, self.out_channels
        x = x.reshape(len(x), height, width, patch, patch, channels)
        x = torch.einsum("nhwpqc->nchpwq", x)
        return x.reshape(len(x), channels, height * patch, width * patch)

    def forward_with_cfg(
        self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float, guided_channels: int = 3
    ) -> Tensor:
        half = x[: len(x) // 2]
        out = self.forward(torch.cat([half, half]), t, y)
        eps, rest = out[:, :guided_channels], out[:, guided_channels:]
        conditional, unconditional = eps.chunk(2)
        guided = unconditional + cfg_scale * (conditional - unconditional)
        return torch.cat([torch.cat([guided, guided]), rest], 1)
