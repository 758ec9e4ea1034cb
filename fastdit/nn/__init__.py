"""Layers on fastdit's ops, for people who write new models.

Signatures, parameters and their names are those of the layers that people use now, so that
checkpoints load and code changes by its imports:

| here | takes the place of |
|---|---|
| `Attention`, `Mlp`, `PatchEmbed` | timm's |
| `AdaLayerNorm`, `AdaLayerNormZero`, `AdaLayerNormZeroSingle` | diffusers' |
| `AdaLayerNormContinuous`, `RMSNorm` | diffusers' |
| `GEGLU`, `SwiGLU` | diffusers' |
| `FinalLayer`, `TimestepEmbedder`, `LabelEmbedder` | the published DiT's |
| `GatedAdaLN` | what stands between two branches: x + gate·y, then a modulated norm |
"""

from fastdit.embeddings import LabelEmbedder, TimestepEmbedder
from fastdit.nn.layers import GEGLU, Attention, FinalLayer, Mlp, PatchEmbed, SwiGLU
from fastdit.nn.norms import (
    AdaLayerNorm,
    AdaLayerNormContinuous,
    AdaLayerNormZero,
    AdaLayerNormZeroSingle,
    GatedAdaLN,
    RMSNorm,
)

__all__ = [
    "GEGLU",
    "AdaLayerNorm",
    "AdaLayerNormContinuous",
    "AdaLayerNormZero",
    "AdaLayerNormZeroSingle",
    "Attention",
    "FinalLayer",
    "GatedAdaLN",
    "LabelEmbedder",
    "Mlp",
    "PatchEmbed",
    "RMSNorm",
    "SwiGLU",
    "TimestepEmbedder",
]
