"""Attention, MLP and patch embedding with timm's signatures, diffusers' gated projections; the
published final layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from fastdit import ops
from fastdit.model import FinalLayer as _FinalLayer
from fastdit.nn.norms import RMSNorm
from fastdit.ops._checks import fail

TANH_GELU = partial(nn.GELU, approximate="tanh")


class Attention(nn.Module):
    """Multi-head self-attention on one packed projection.

    Args:
        dim: D, of input and output.
        num_heads: heads; divides `dim`.
        qkv_bias, proj_bias: of the projections.
        qk_norm: normalise queries and keys over each head's channels, by `norm_layer`.
        attn_drop: must be 0: the kernel has no dropout in the softmax.
        proj_drop: dropout after the output projection.
        norm_layer: `nn.LayerNorm` or `fastdit.nn.RMSNorm`, called with a head's channels.

    Raises:
        ValueError: `attn_drop` is not 0, or `num_heads` does not divide `dim`.
        TypeError: a `norm_layer` of another kind.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            fail("num_heads", num_heads, f"a divisor of dim = {dim}")
        if attn_drop != 0:
            fail("attn_drop", attn_drop, "0: the kernel has no dropout")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.q_norm = norm_layer(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim) if qk_norm else nn.Identity()
        if not isinstance(self.q_norm, nn.Identity | nn.LayerNorm | RMSNorm):
            got = type(self.q_norm).__name__
            raise TypeError(f"norm_layer: got {got}, allowed is nn.LayerNorm or fastdit.nn.RMSNorm")
        self.proj = nn.Linear(dim, dim, bias=proj_bias)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self, x: Tensor, attn_mask: None = None, rope: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """`(B, N, D)` tokens.

        Args:
            x: the tokens.
            attn_mask: must be None: attention is over all tokens.
            rope: rotary tables (cos, sin), as `fastdit.ops.attention` takes them.
        """
        if attn_mask is not None:
            fail("attn_mask", "a mask", "None: attention is over all tokens")
        options = {}
        if not isinstance(self.q_norm, nn.Identity):
            q, k = self.q_norm, self.k_norm
            options = {
                "q_weight": q.weight,
                "q_bias": getattr(q, "bias", None),
                "k_weight": k.weight,
                "k_bias": getattr(k, "bias", None),
                "qk_norm": "rms" if isinstance(q, RMSNorm) else "layer",
                "qk_eps": q.eps,
            }
        out = ops.attention(self.qkv(x), self.num_heads, rope=rope, **options)
        return self.proj_drop(self.proj(out))


class Mlp(nn.Module):
    """Two Linears around an activation; a tanh-GELU, the default, adds the first one's bias.

    Args:
        in_features: of the input.
        hidden_features, out_features: None is `in_features`.
        act_layer: called without arguments; anything but a tanh-GELU runs as it is.
        bias: of the Linears.
        drop: dropout after the activation and at the end.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] = TANH_GELU,
        bias: bool = True,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        hidden_features = hidden_features or in_features
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias)
        self.act = act_layer()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden_features, out_features or in_features, bias=bias)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        fused = isinstance(self.act, nn.GELU) and self.act.approximate == "tanh"
        if fused and self.fc1.bias is not None:
            hidden = ops.bias_gelu(F.linear(x, self.fc1.weight), self.fc1.bias)
        else:
            hidden = self.act(self.fc1(x))
        return self.drop2(self.fc2(self.drop1(hidden)))


class _GatedProjection(nn.Module):
    """A Linear to values and gates, in this order, and the product of a value and its activated
    gate; the Linear's bias is added by the product's kernel."""

    activation: str

    def __init__(self, dim_in: int, dim_out: int, bias: bool = True) -> None:
        super().__init__()
        self.proj = nn.Linear(dim_in, dim_out * 2, bias=bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`(..., dim_in)` to `(..., dim_out)`."""
        both = F.linear(hidden_states, self.proj.weight)
        return ops.glu(both, None, self.proj.bias, self.activation, gate_first=False)


class GEGLU(_GatedProjection):
    """A projection gated through the exact GELU.

    Args:
        dim_in: of the input.
        dim_out: of the output; the projection is twice as wide.
        bias: of the projection.
    """

    activation = "gelu"


class SwiGLU(_GatedProjection):
    """A projection gated through SiLU.

    Args:
        dim_in: of the input.
        dim_out: of the output; the projection is twice as wide.
        bias: of the projection.
    """

    activation = "silu"


class PatchEmbed(nn.Module):
    """Patches of `(B, C, H, W)` to tokens `(B, N, D)`.

    Args:
        img_size: side of the image, or (height, width), for `num_patches`; None takes any size.
        patch_size: side of a patch.
        in_chans: C.
        embed_dim: D.
        norm_layer: of the tokens; None is none.
        bias: of the projection.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] | None = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        norm_layer: Callable[[int], nn.Module] | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.patch_size = (patch_size, patch_size)
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.grid_size = None
        self.num_patches = None
        if self.img_size is not None:
            rows, columns = (size // patch_size for size in self.img_size)
            self.grid_size, self.num_patches = (rows, columns), rows * columns
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size, bias=bias)
        self.norm = norm_layer(embed_dim) if norm_layer else nn.Identity()

    def forward(self, x: Tensor, pos: Tensor | None = None) -> Tensor:
        """Tokens, plus the positions `(1, N, D)` if they are given."""
        if self.img_size is not None and tuple(x.shape[2:]) != tuple(self.img_size):
            fail("x", tuple(x.shape), f"(B, C, {self.img_size[0]}, {self.img_size[1]})")
        if isinstance(self.norm, nn.Identity):
            return ops.patch_embed(x, self.proj.weight, self.proj.bias, pos)
        tokens = self.norm(ops.patch_embed(x, self.proj.weight, self.proj.bias))
        return tokens if pos is None else tokens + pos


class FinalLayer(_FinalLayer):
    """The published final layer: a modulated norm, then a Linear to rows of pixels."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """`(B, N, D)` tokens and the condition `(B, D)`: `(B, N, patch²·out_channels)`."""
        return super().forward(x, c)
