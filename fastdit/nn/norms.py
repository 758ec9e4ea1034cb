"""Adaptive normalisations: SiLU and a Linear make shifts, scales and gates of a condition (B, D).

The norm with its modulation is one kernel. Names and orders of the parts are diffusers'.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastdit import ops
from fastdit.ops._checks import fail


class RMSNorm(nn.Module):
    """x / √(mean(x²) + eps)·weight over the last axis; `(B, N, D)` or any shape ending in D."""

    def __init__(self, dim: int, eps: float = 1e-6, elementwise_affine: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim)) if elementwise_affine else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states
        rows = x if x.dim() == 3 else x.reshape(1, -1, x.shape[-1])
        return ops.adaln(rows, eps=self.eps, weight=self.weight, norm="rms").reshape(x.shape)


def _norm(name: str, dim: int, eps: float, affine: bool, bias: bool = True) -> nn.Module:
    if name not in ("layer_norm", "rms_norm", "fp32_layer_norm"):
        fail("norm_type", repr(name), "'layer_norm', 'fp32_layer_norm' or 'rms_norm'")
    if name == "rms_norm":
        return RMSNorm(dim, eps, affine)
    return nn.LayerNorm(dim, eps, affine, bias=bias)


def _modulate(norm: nn.Module, x: Tensor, shift: Tensor | None, scale: Tensor | None) -> Tensor:
    kind = "rms" if isinstance(norm, RMSNorm) else "layer"
    bias = getattr(norm, "bias", None)
    return ops.adaln(x, shift, scale, norm.eps, weight=norm.weight, bias=bias, norm=kind)


class AdaLayerNormZero(nn.Module):
    """The norm before a block's first branch, and its projection to all six parts.

    Args:
        embedding_dim: D.
        num_embeddings: classes, for a block with a timestep and label embedder of its own
            (diffusers' DiT, whose embedder this then takes); None takes the condition as `emb`.
        norm_type: "layer_norm", or "fp32_layer_norm": the ops compute in float32 anyway, it only
            has eps 1e-5 as in diffusers.
        bias: of the projection.
    """

    def __init__(
        self,
        embedding_dim: int,
        num_embeddings: int | None = None,
        norm_type: str = "layer_norm",
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.emb = None
        if num_embeddings is not None:
            from diffusers.models.embeddings import CombinedTimestepLabelEmbeddings

            self.emb = CombinedTimestepLabelEmbeddings(num_embeddings, embedding_dim)
        self.silu = nn.SiLU()
        self.linear = nn.Linear(embedding_dim, 6 * embedding_dim, bias=bias)
        eps = 1e-5 if norm_type == "fp32_layer_norm" else 1e-6
        self.norm = _norm(norm_type, embedding_dim, eps, affine=False)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        hidden_dtype: torch.dtype | None = None,
        emb: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """`(B, N, D)` normalised and modulated, then gate_msa, shift_mlp, scale_mlp, gate_mlp
        `(B, D)`."""
        if self.emb is not None:
            emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
        shift, scale, *rest = self.linear(self.silu(emb)).chunk(6, dim=1)
        return _modulate(self.norm, x, shift, scale), *rest


class AdaLayerNormZeroSingle(nn.Module):
    """The norm of a block with one branch: shift, scale and a gate."""

    def __init__(self, embedding_dim: int, norm_type: str = "layer_norm", bias: bool = True):
        super().__init__()
        self.silu = nn.SiLU()
        self.linear = nn.Linear(embedding_dim, 3 * embedding_dim, bias=bias)
        self.norm = _norm(norm_type, embedding_dim, 1e-6, affine=False)

    def forward(self, x: Tensor, emb: Tensor) -> tuple[Tensor, Tensor]:
        shift, scale, gate = self.linear(self.silu(emb)).chunk(3, dim=1)
        return _modulate(self.norm, x, shift, scale), gate


class AdaLayerNormContinuous(nn.Module):
    """The norm of a model's end: any condition, projected to a scale and a shift, in that order."""

    def __init__(
        self,
        embedding_dim: int,
        conditioning_embedding_dim: int,
        elementwise_affine: bool = True,
        eps: float = 1e-5,
        bias: bool = True,
        norm_type: str = "layer_norm",
    ) -> None:
        super().__init__()
        self.silu = nn.SiLU()
        self.linear = nn.Linear(conditioning_embedding_dim, embedding_dim * 2, bias=bias)
        self.norm = _norm(norm_type, embedding_dim, eps, elementwise_affine, bias)

    def forward(self, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
        scale, shift = self.linear(self.silu(conditioning_embedding).to(x.dtype)).chunk(2, dim=1)
        return _modulate(self.norm, x, shift, scale)


class AdaLayerNorm(nn.Module):
    """A norm modulated by a timestep's embedding, or by a condition.

    Args:
        embedding_dim: of the condition.
        num_embeddings: timesteps, where the layer embeds them itself.
        output_dim: twice the width of the norm; None is 2·embedding_dim.
        norm_elementwise_affine, norm_eps: of the norm.
        chunk_dim: 1: the condition is `(B, D)` and gives shift, then scale. 0: one timestep for
            the whole batch gives scale, then shift, as in diffusers.
    """

    def __init__(
        self,
        embedding_dim: int,
        num_embeddings: int | None = None,
        output_dim: int | None = None,
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-5,
        chunk_dim: int = 0,
    ) -> None:
        super().__init__()
        if chunk_dim not in (0, 1):
            fail("chunk_dim", chunk_dim, "0 or 1")
        self.chunk_dim = chunk_dim
        output_dim = output_dim or embedding_dim * 2
        self.emb = None if num_embeddings is None else nn.Embedding(num_embeddings, embedding_dim)
        self.silu = nn.SiLU()
        self.linear = nn.Linear(embedding_dim, output_dim)
        self.norm = nn.LayerNorm(output_dim // 2, norm_eps, norm_elementwise_affine)

    def forward(
        self, x: Tensor, timestep: Tensor | None = None, temb: Tensor | None = None
    ) -> Tensor:
        if self.emb is not None:
            temb = self.emb(timestep)
        if temb.dim() != self.chunk_dim + 1:
            fail("temb", tuple(temb.shape), "(B, D) with chunk_dim=1, (D,) with chunk_dim=0")
        parts = self.linear(self.silu(temb)).chunk(2, dim=-1)
        if self.chunk_dim == 0:
            scale, shift = (part.expand(x.shape[0], -1) for part in parts)
        else:
            shift, scale = parts
        return _modulate(self.norm, x, shift, scale)


class GatedAdaLN(nn.Module):
    """What stands between two branches, one kernel: h = x + gate·y, and norm(h) modulated.

    Args:
        dim: D.
        conditioning_dim: of the condition; None is D.
        eps: added to the variance.
        elementwise_affine: give the norm a weight and a bias.
        norm_type: "layer_norm" or "rms_norm".

    The projection starts at zero: as in adaLN-Zero, the branch then adds nothing.
    """

    def __init__(
        self,
        dim: int,
        conditioning_dim: int | None = None,
        eps: float = 1e-6,
        elementwise_affine: bool = False,
        norm_type: str = "layer_norm",
    ) -> None:
        super().__init__()
        self.silu = nn.SiLU()
        self.linear = nn.Linear(conditioning_dim or dim, 3 * dim)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.norm = _norm(norm_type, dim, eps, elementwise_affine)

    def forward(self, x: Tensor, y: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """The stream x `(B, N, D)`, a branch's output y, a condition `(B, C)`: h and norm(h)."""
        gate, shift, scale = self.linear(self.silu(condition)).chunk(3, dim=-1)
        norm = self.norm
        return ops.gated_adaln(
            x,
            y,
            gate,
            shift,
            scale,
            norm.eps,
            weight=norm.weight,
            bias=getattr(norm, "bias", None),
            norm="rms" if isinstance(norm, RMSNorm) else "layer",
        )
