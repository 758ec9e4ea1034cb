"""A DiT's layers: patches to tokens, the Transformer block in every design, and the final layer.

Every branch of every block reads a normalisation of the stream, which the condition may modulate,
and adds its output to the stream, perhaps through a gate:

    x += gate·branch(norm(x)·(1 + scale) + shift)

A block hands its last branch on unadded, so that one `gated_adaln` both ends it and begins the
next: between two matrix products the residual stream is read and written once. Where a design has
no gate the branch is pending with a gate of ones, one number read at stride 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdit import ops
from fastdit.conditioning import Modulated
from fastdit.designs import PUBLISHED, Design
from fastdit.ops._checks import autocast_dtype, described, fail

Branch = tuple[Tensor, Tensor]
"""What a block leaves to be added: a branch's output `(B, N, D)` and its gate `(B, D)`."""

Rope = tuple[Tensor, Tensor]

EPS = 1e-6


class PatchEmbed(nn.Module):
    """Patches to tokens; holds the convolution `proj` whose weights the checkpoints name.

    `patch_size` is one number for both sides of an image's patch, or one for each axis: two for an
    image, one for a signal.
    """

    def __init__(self, patch_size: int | Sequence[int], in_channels: int, hidden_size: int) -> None:
        super().__init__()
        patch = (patch_size,) * 2 if isinstance(patch_size, int) else tuple(patch_size)
        convolution = nn.Conv2d if len(patch) == 2 else nn.Conv1d
        self.proj = convolution(in_channels, hidden_size, patch, stride=patch)

    def forward(self, x: Tensor, pos: Tensor | None = None) -> Tensor:
        """`(B, C, *size)` as `(B, N, D)` tokens, plus the positions `pos`, `(1, N, D)`.

        Raises:
            ValueError: `x` has not the parameters' dtype and device; autocast takes any dtype.
        """
        weight = self.proj.weight
        other = x.device != weight.device or x.dtype != weight.dtype
        if other and autocast_dtype(x) is None:
            wanted = f"{str(weight.dtype).removeprefix('torch.')} on {weight.device}"
            fail("x", described(x), f"{wanted}, as the model's parameters")
        tokens = ops.patch_embed(x, weight, self.proj.bias, pos)
        # Positions widen the tokens that autocast narrowed; without them nothing else would.
        return tokens if pos is not None else tokens.to(weight.dtype)


class Attention(nn.Module):
    """Multi-head self-attention with one packed projection."""

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: str | None = None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.qk_norm = qk_norm
        if qk_norm is not None:  # they hold weights and eps, the op normalises
            self.q_norm = _head_norm(qk_norm, hidden_size // num_heads)
            self.k_norm = _head_norm(qk_norm, hidden_size // num_heads)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, rope: Rope | None = None) -> Tensor:
        """`(B, N, D)` tokens to `(B, N, D)`; `rope` are rotary tables, `(N, head_dim)` each."""
        qkv = self.qkv(x)
        if self.qk_norm is None and rope is None:
            return self.proj(ops.attention(qkv, self.num_heads))
        return self.proj(ops.attention(qkv, self.num_heads, rope=rope, **self.qk_options()))

    def qk_options(self) -> dict:
        """QK-norm's arguments of the op."""
        if self.qk_norm is None:
            return {}
        return {
            "qk_norm": self.qk_norm,
            "qk_eps": self.q_norm.eps,
            "q_weight": self.q_norm.weight,
            "k_weight": self.k_norm.weight,
            "q_bias": getattr(self.q_norm, "bias", None),
            "k_bias": getattr(self.k_norm, "bias", None),
        }


def _head_norm(kind: str, head_dim: int) -> nn.LayerNorm | nn.RMSNorm:
    """With the eps of timm's and LightningDiT's QK-norm."""
    return nn.LayerNorm(head_dim, eps=1e-5) if kind == "layer" else nn.RMSNorm(head_dim, eps=1e-6)


class CrossAttention(nn.Module):
    """Attention of the tokens to the condition's sequence, whose keys and values x has no part in.

    The sequence is one or two tokens long: q and proj are all the work, and PyTorch's own
    attention does the rest.
    """

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(hidden_size, hidden_size)
        self.kv = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def keys_values(self, c: Tensor) -> Tensor:
        """`(B, K, D)` sequences as rows `(B, K·2·D)`: each token's key and value."""
        return self.kv(c).flatten(1)

    def forward(self, x: Tensor, keys_values: Tensor) -> Tensor:
        """`(B, N, D)` tokens and the rows of `keys_values` to `(B, N, D)`."""
        heads = (self.num_heads, x.shape[-1] // self.num_heads)
        k, v = keys_values.unflatten(1, (-1, 2, *heads)).permute(2, 0, 3, 1, 4).unbind(0)
        q = self.q(x).unflatten(2, heads).transpose(1, 2)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two Linears around a tanh-GELU; the first one's bias is added by the GELU's kernel."""

    def __init__(self, hidden_size: int, mlp_hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, mlp_hidden)
        self.fc2 = nn.Linear(mlp_hidden, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, N, D)` to `(B, N, D)`."""
        return self.fc2(ops.bias_gelu(F.linear(x, self.fc1.weight), self.fc1.bias))


class SwiGLU(nn.Module):
    """W₃·(SiLU(W₁x)∘W₂x), with two thirds of `mlp_hidden` to be as large as the other (Shazeer
    2020); W₁ and W₂ are one Linear, as in DINOv2 and LightningDiT, whose bias `glu` adds."""

    def __init__(self, hidden_size: int, mlp_hidden: int) -> None:
        super().__init__()
        hidden = int(2 / 3 * mlp_hidden)
        self.w12 = nn.Linear(hidden_size, 2 * hidden)
        self.w3 = nn.Linear(hidden, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, N, D)` to `(B, N, D)`."""
        return self.w3(ops.glu(F.linear(x, self.w12.weight), None, self.w12.bias))


class Norm(nn.Module):
    """The normalisation in front of a branch: adds the pending branch, normalises, modulates."""

    def __init__(self, hidden_size: int, design: Design) -> None:
        super().__init__()
        affine, bias = design.affine, design.affine and design.norm == "layer"
        self.kind, self.plus_one = design.norm, design.scale_plus_one
        self.register_parameter("weight", nn.Parameter(torch.ones(hidden_size)) if affine else None)
        self.register_parameter("bias", nn.Parameter(torch.zeros(hidden_size)) if bias else None)

    def forward(
        self, x: Tensor, pending: Branch | None, shift: Tensor | None, scale: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The stream with the pending branch added, and its modulated normalisation."""
        options = {"weight": self.weight, "bias": self.bias}
        options |= {"norm": self.kind, "plus_one": self.plus_one}
        if pending is None:
            return x, ops.adaln(x, shift, scale, EPS, **options)
        return ops.gated_adaln(x, *pending, shift, scale, EPS, **options)


class DiTBlock(Modulated):
    """A Transformer block; by default conditioned by adaLN-Zero.

    Args:
        hidden_size, num_heads, mlp_ratio: as in `DiT`.
        design: the block's form.
        sources: how many embeddings the condition is made of, timestep and label.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        design: Design = PUBLISHED,
        sources: int = 2,
    ) -> None:
        super().__init__()
        self.norm1 = Norm(hidden_size, design)
        self.attn = Attention(hidden_size, num_heads, design.qk_norm)
        self.cross_attn = None
        if design.conditioning == "cross_attention":
            self.norm_cross = Norm(hidden_size, design)
            self.cross_attn = CrossAttention(hidden_size, num_heads)
        self.norm2 = Norm(hidden_size, design)
        mlp = Mlp if design.mlp == "gelu" else SwiGLU
        self.mlp = mlp(hidden_size, int(hidden_size * mlp_ratio))
        names = [f"{part}_{branch}" for branch in ("msa", "mlp") for part in design.parts]
        self.add_modulation(design, hidden_size, names, sources)
        if self.cross_attn is not None:
            self.rows_width = sources * 2 * hidden_size
        self.normed_residual = design.residual == "normed"

    def rows(self, c: Tensor) -> Tensor | None:
        """Modulations, or the cross-attention's keys and values."""
        return super().rows(c) if self.cross_attn is None else self.cross_attn.keys_values(c)

    def forward(
        self,
        x: Tensor,
        c: Tensor | None,
        pending: Branch | None = None,
        defer: bool = False,
        modulations: Tensor | None = None,
        rope: Rope | None = None,
    ) -> Tensor | tuple[Tensor, Branch]:
        """One block.

        Args:
            x: `(B, N, D)` tokens.
            c: `(B, D)` condition; `(B, K, D)` where it is a sequence.
            pending: the branch that the block before left to be added to `x`.
            defer: leave this block's last branch to the next.
            modulations: `(B, rows_width)`, this block's `rows(c)`, where they are known already;
                `c` is not read.
            rope: rotary tables of the tokens, `(N, head_dim)` each.

        Returns:
            `(B, N, D)`; with `defer`, that without the last branch, and the branch.
        """
        rows = self.rows(c) if modulations is None else modulations
        msa, mlp = self._parts(x, pending, rows)
        x, normed = self._normed(self.norm1, x, pending, *msa[:2])
        pending = (self.attn(normed, rope), msa[2])
        if self.cross_attn is not None:
            x, normed = self._normed(self.norm_cross, x, pending, None, None)
            pending = (self.cross_attn(normed, rows), msa[2])
        x, normed = self._normed(self.norm2, x, pending, *mlp[:2])
        last = (self.mlp(normed), mlp[2])
        return (x, last) if defer else ops.gated_residual(x, *last)

    def _normed(self, norm: Norm, x: Tensor, *args) -> tuple[Tensor, Tensor]:
        """The stream that the next branch is added to, and what it reads."""
        x, normed = norm(x, *args)
        return (normed, normed) if self.normed_residual else (x, normed)

    def _parts(self, x: Tensor, pending: Branch | None, rows: Tensor | None):
        """Shift, scale and gate of each branch; None where the design has none, but for gates."""
        if len(self.names) == 6:
            parts = rows.chunk(6, dim=1)
            return parts[:3], parts[3:]
        chunks = rows.chunk(len(self.names), dim=1) if self.names else ()
        found = dict(zip(self.names, chunks, strict=True))
        one = None
        if "gate_msa" not in found:
            one = x.new_ones(1).expand(len(x), x.shape[2]) if pending is None else pending[1]
        return tuple(
            (found.get(f"shift_{b}"), found.get(f"scale_{b}"), found.get(f"gate_{b}", one))
            for b in ("msa", "mlp")
        )


class FinalLayer(Modulated):
    """A modulated normalisation and the Linear that turns tokens into rows of pixels.

    Args:
        hidden_size: D.
        patch_size: side of a patch, or its sides.
        out_channels: of the rows of pixels.
        design: whether and how the normalisation is modulated.
        sources: as in `DiTBlock`.
    """

    def __init__(
        self,
        hidden_size: int,
        patch_size: int | Sequence[int],
        out_channels: int,
        design: Design = PUBLISHED,
        sources: int = 2,
    ) -> None:
        super().__init__()
        patch = (patch_size,) * 2 if isinstance(patch_size, int) else tuple(patch_size)
        self.norm_final = Norm(hidden_size, design)
        self.linear = nn.Linear(hidden_size, torch.Size(patch).numel() * out_channels)
        names = ("shift", "scale") if design.modulated else ()
        self.add_modulation(design, hidden_size, names, sources)

    def forward(
        self,
        x: Tensor,
        c: Tensor | None,
        pending: Branch | None = None,
        modulations: Tensor | None = None,
    ) -> Tensor:
        """`(B, N, D)` tokens to `(B, N, prod(patch)·out_channels)`; arguments as in `DiTBlock`."""
        rows = self.rows(c) if modulations is None else modulations
        shift, scale = rows.chunk(2, dim=1) if self.names else (None, None)
        return self.linear(self.norm_final(x, pending, shift, scale)[1])
