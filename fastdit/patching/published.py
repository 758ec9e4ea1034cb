"""The published code and its forks: facebookresearch/DiT, SiT, REPA, fast-DiT, LightningDiT.

    x += gate₁·attn(norm1(x)·(1 + scale₁) + shift₁)
    x += gate₂·mlp(norm2(x)·(1 + scale₂) + shift₂)

with the six from one `adaLN_modulation`, or four where there is no shift (LightningDiT's
`wo_shift`). In a block the branch's addition and the next modulation become one `gated_adaln`.
timm's Attention keeps its projections and runs `attention` on the packed qkv, with QK-norm and
rotary positions inside; timm's Mlp adds its first bias in `bias_gelu`; a patch embedding is one
`patch_embed`.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdit import ops
from fastdit.patching import norms
from fastdit.patching.rules import Call, Rule, is_ours, own_forward, replacement, watched

TOKENS = 4


def has(module: nn.Module, *names: str) -> bool:
    """Whether the module has all these children."""
    return all(module._modules.get(name) is not None for name in names)


def linear(module: nn.Module | None) -> bool:
    """Whether the module is a Linear that may be computed from its weight and bias."""
    return type(module) is nn.Linear and not watched(module)


def tanh_gelu(module: nn.Module) -> bool:
    """Whether the module is the tanh form of GELU."""
    return isinstance(module, nn.GELU) and module.approximate == "tanh"


# ---- the block --------------------------------------------------------------------------------


def _six(rows: Tensor, width: int) -> tuple[Tensor | None, ...]:
    """shift, scale and gate of both branches; no shifts where the projection gives four."""
    if rows.shape[-1] == 4 * width:
        scale1, gate1, scale2, gate2 = rows.chunk(4, -1)
        return None, scale1, gate1, None, scale2, gate2
    return rows.chunk(6, -1)


@replacement("norm1", "norm2")
def block(self: nn.Module, x: Tensor, c: Tensor, feat_rope: Any = None) -> Tensor:
    """A Transformer block with adaLN-Zero."""
    found = norms.ready(x, self.norm1, self.norm2)
    if found is None or c.dim() != 2:
        return NotImplemented
    rows = self.adaLN_modulation(c)
    if rows.shape[-1] not in (4 * x.shape[-1], 6 * x.shape[-1]):
        return NotImplemented
    shift1, scale1, gate1, shift2, scale2, gate2 = _six(rows, x.shape[-1])
    normed = norms.adaln(found[0], x, shift1, scale1)
    branch = self.attn(normed) if feat_rope is None else self.attn(normed, rope=feat_rope)
    x, normed = norms.gated_adaln(found[1], x, branch, gate1, shift2, scale2)
    return norms.gated_residual(x, self.mlp(normed), gate2)


def _width(module: nn.Module) -> int:
    """The width of the tokens and of the condition."""
    return module.adaLN_modulation[-1].in_features


def _block_calls(module: nn.Module) -> list[Call]:
    width = _width(module)
    args = 0.01 * torch.randn(2, TOKENS, width), torch.randn(2, width)
    calls: list[Call] = [(args, {})]
    if len(inspect.signature(module.forward).parameters) > 2 and hasattr(module.attn, "num_heads"):
        calls.append(((*args, Rotation(TOKENS, width // module.attn.num_heads)), {}))
    return calls


BLOCK = Rule(
    name="adaLN-Zero block",
    ops="adaln, gated_adaln, gated_residual",
    forward=block,
    recognises=lambda m: (
        has(m, "norm1", "attn", "norm2", "mlp", "adaLN_modulation")
        and isinstance(m.adaLN_modulation, nn.Sequential)
        and isinstance(m.adaLN_modulation[-1], nn.Linear)
    ),
    probe=_block_calls,
)


# ---- the final layer ----------------------------------------------------------------------------


@replacement("norm_final")
def final_layer(self: nn.Module, x: Tensor, c: Tensor) -> Tensor:
    """A modulated normalisation, then a Linear."""
    found = norms.ready(x, self.norm_final)
    if found is None or c.dim() != 2:
        return NotImplemented
    shift, scale = self.adaLN_modulation(c).chunk(2, -1)
    return self.linear(norms.adaln(found[0], x, shift, scale))


FINAL_LAYER = Rule(
    name="final layer",
    ops="adaln",
    forward=final_layer,
    recognises=lambda m: has(m, "norm_final", "linear", "adaLN_modulation"),
    probe=lambda m: [
        ((0.01 * torch.randn(2, TOKENS, m.linear.in_features), torch.randn(2, _width(m))), {})
    ],
)


# ---- attention ----------------------------------------------------------------------------------


class Rotation(nn.Module):
    """Rotary positions by tables, pairs of channels interleaved, as EVA and LightningDiT have."""

    def __init__(self, tokens: int, head_dim: int) -> None:
        super().__init__()
        angles = torch.rand(tokens, head_dim // 2).repeat_interleave(2, -1)
        self.register_buffer("freqs_cos", angles.cos(), persistent=False)
        self.register_buffer("freqs_sin", angles.sin(), persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        a, b = t.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([-b, a], -1).flatten(-2)
        return t * self.freqs_cos + turned * self.freqs_sin


@replacement()
def rotary(self: nn.Module, t: Tensor) -> Tensor:
    """The rotation by itself; `attention` takes the tables instead of calling this."""
    return Rotation.forward(self, t)


ROTARY = Rule(
    name="rotary positions",
    ops="inside attention",
    forward=rotary,
    recognises=lambda m: (
        isinstance(getattr(m, "freqs_cos", None), Tensor)
        and isinstance(getattr(m, "freqs_sin", None), Tensor)
        and m.freqs_cos.dim() == 2
        and not hasattr(m, "patch_size")  # diffusers makes tables for its processors
    ),
    probe=lambda m: [((torch.randn(2, 3, *m.freqs_cos.shape),), {})],
)


def _tables(rope: Any) -> tuple[Tensor, Tensor] | None:
    """The tables of a rotation that is known to be one."""
    known = isinstance(rope, Rotation) or (
        isinstance(rope, nn.Module)
        and is_ours(own_forward(rope))
        and own_forward(rope).func is rotary
    )
    return (rope.freqs_cos, rope.freqs_sin) if known and not watched(rope) else None


def _qk_norm(attn: nn.Module, qkv: Tensor) -> dict[str, Any] | None:
    """QK-norm as arguments of the op; {} for none, None for one that the op has not."""
    q, k = attn._modules.get("q_norm"), attn._modules.get("k_norm")
    if all(m is None or isinstance(m, nn.Identity) for m in (q, k)):
        return {}
    found = [norms.norm_of(q), norms.norm_of(k)]
    if None in found or found[0][2:] != found[1][2:]:
        return None
    if not all(n.weight is None or n.weight.dtype == qkv.dtype for n in found):
        return None
    names = ("q_weight", "q_bias", "qk_eps", "qk_norm")
    options = dict(zip(names, found[0], strict=True))
    return {**options, "k_weight": found[1].weight, "k_bias": found[1].bias}


@replacement("q_norm", "k_norm", "attn_drop")
def attention(self: nn.Module, x: Tensor, rope: Any = None, **masks: Any) -> Tensor:
    """Self-attention on packed projections."""
    dropped = self.training and getattr(self._modules.get("attn_drop"), "p", 0.0) > 0
    tables = None if rope is None else _tables(rope)
    if dropped or any(masks.values()) or (rope is not None and tables is None):
        return NotImplemented
    qkv = self.qkv(x)
    options = _qk_norm(self, qkv)
    if options is None or x.dim() != 3:
        return NotImplemented
    scale = None if getattr(self, "fused_attn", False) else getattr(self, "scale", None)
    out = ops.attention(qkv, self.num_heads, scale=scale, rope=tables, **options)
    for name in ("norm", "proj", "proj_drop"):
        layer = self._modules.get(name)
        out = out if layer is None else layer(out)
    return out


def _attention_calls(module: nn.Module) -> list[Call]:
    x = torch.randn(2, TOKENS, module.qkv.in_features)
    calls: list[Call] = [((x,), {})]
    if "rope" in inspect.signature(module.forward).parameters:
        head_dim = module.qkv.out_features // (3 * module.num_heads)
        calls.append(((x,), {"rope": Rotation(TOKENS, head_dim)}))
    return calls


ATTENTION = Rule(
    name="packed attention",
    ops="attention",
    forward=attention,
    recognises=lambda m: has(m, "qkv", "proj") and isinstance(getattr(m, "num_heads", 0), int),
    probe=_attention_calls,
)


# ---- the MLP and the patch embedding ------------------------------------------------------------


@replacement("act")
def mlp(self: nn.Module, x: Tensor) -> Tensor:
    """Linear, tanh-GELU, Linear; the first bias is added by the GELU's kernel."""
    if not linear(self.fc1) or self.fc1.bias is None or not tanh_gelu(self.act):
        return NotImplemented
    hidden = ops.bias_gelu(F.linear(x, self.fc1.weight), self.fc1.bias)
    for name in ("drop1", "drop", "norm", "fc2", "drop2", "drop"):
        layer = self._modules.get(name)
        hidden = hidden if layer is None else layer(hidden)
    return hidden


MLP = Rule(
    name="tanh-GELU MLP",
    ops="bias_gelu",
    forward=mlp,
    recognises=lambda m: has(m, "fc1", "act", "fc2") and isinstance(m.fc1, nn.Linear),
    refuses=lambda m: (
        None if tanh_gelu(m.act) else f"its activation is {m.act}; bias_gelu is the tanh-GELU"
    ),
    probe=lambda m: [((torch.randn(2, TOKENS, m.fc1.in_features),), {})],
)


@replacement("proj")
def patch_embed(self: nn.Module, x: Tensor) -> Tensor:
    """A convolution whose stride is its kernel, its patches as tokens."""
    proj = self.proj
    if any(size % patch for size, patch in zip(x.shape[2:], proj.kernel_size, strict=True)):
        return NotImplemented
    tokens = ops.patch_embed(x, proj.weight, proj.bias)
    layer = self._modules.get("norm")
    return tokens if layer is None else layer(tokens)


def _patch_calls(module: nn.Module) -> list[Call]:
    proj = module.proj
    size = getattr(module, "img_size", None) or [2 * patch for patch in proj.kernel_size]
    size = [size, size] if isinstance(size, int) else list(size)
    return [((torch.randn(1, proj.in_channels, *size),), {})]


def _no_patches(module: nn.Module) -> str | None:
    proj = module.proj
    patches = proj.stride == proj.kernel_size and proj.groups == 1 and proj.padding in ((0, 0), 0)
    return None if patches else "the convolution's stride is not its kernel"


PATCH_EMBED = Rule(
    name="patch embedding",
    ops="patch_embed",
    forward=patch_embed,
    recognises=lambda m: (
        isinstance(m._modules.get("proj"), nn.Conv2d)
        and "text_proj" not in m._modules
        and not hasattr(m, "interpolation_scale")  # diffusers', which adds positions itself
    ),
    refuses=_no_patches,
    probe=_patch_calls,
)

RULES = (BLOCK, FINAL_LAYER, ATTENTION, ROTARY, MLP, PATCH_EMBED)
