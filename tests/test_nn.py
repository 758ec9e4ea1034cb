"""fastdit.nn beside the layers it takes the place of: state dicts, outputs and gradients."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import pytest
import torch
from diffusers.models import activations
from diffusers.models import normalization as theirs
from torch import nn

import fastdit
import fastdit.nn as fnn

sys.path.insert(0, str(Path(__file__).parent / "patching"))
import compare
import research

D, C = 32, 24


def tokens(width=D, seed=0):
    return torch.randn(2, 5, width, generator=torch.Generator().manual_seed(seed))


def condition(width=D):
    return torch.randn(2, width, generator=torch.Generator().manual_seed(1))


def agree(ours, original, *args, **kwargs):
    """Same parameters by name; outputs and gradients within a few ulp."""
    compare.randomise(original)
    ours.load_state_dict(original.state_dict())
    found = [compare.run(m, lambda m: m(*args, **kwargs)) for m in (ours, original)]
    out, grad = compare.worst(*found)
    assert out <= 8
    assert grad <= 16


def same_signature(ours, original, extra=()):
    names = [list(inspect.signature(c).parameters) for c in (ours, original)]
    assert [n for n in names[0] if n not in extra] == names[1]


@pytest.mark.parametrize("norm", ["layer_norm", "fp32_layer_norm"])
def test_ada_layer_norm_zero(norm):
    same_signature(fnn.AdaLayerNormZero, theirs.AdaLayerNormZero)
    pair = fnn.AdaLayerNormZero(D, norm_type=norm), theirs.AdaLayerNormZero(D, norm_type=norm)
    agree(*pair, tokens(), emb=condition())


def test_ada_layer_norm_zero_with_an_embedder():
    pair = fnn.AdaLayerNormZero(D, 10).eval(), theirs.AdaLayerNormZero(D, 10).eval()
    agree(*pair, tokens(), torch.tensor([3, 700]), torch.tensor([0, 9]))


def test_ada_layer_norm_zero_single():
    same_signature(fnn.AdaLayerNormZeroSingle, theirs.AdaLayerNormZeroSingle)
    pair = fnn.AdaLayerNormZeroSingle(D), theirs.AdaLayerNormZeroSingle(D)
    agree(*pair, tokens(), condition())


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("affine", [True, False])
def test_ada_layer_norm_continuous(norm, affine):
    same_signature(fnn.AdaLayerNormContinuous, theirs.AdaLayerNormContinuous)
    pair = (
        cls(D, C, elementwise_affine=affine, norm_type=norm)
        for cls in (fnn.AdaLayerNormContinuous, theirs.AdaLayerNormContinuous)
    )
    agree(*pair, tokens(), condition(C))


@pytest.mark.parametrize("name", ["GEGLU", "SwiGLU"])
@pytest.mark.parametrize("bias", [True, False])
def test_gated_projections(name, bias):
    ours, original = getattr(fnn, name), getattr(activations, name)
    same_signature(ours, original)
    with fastdit.backend("native"):
        agree(ours(D, C, bias), original(D, C, bias), tokens())


@pytest.mark.parametrize("affine", [True, False])
def test_ada_layer_norm(affine):
    same_signature(fnn.AdaLayerNorm, theirs.AdaLayerNorm)
    options = {"output_dim": 2 * D, "norm_elementwise_affine": affine}
    for chunk_dim, temb in ((1, condition(C)), (0, condition(C)[0])):
        pair = (
            cls(C, chunk_dim=chunk_dim, **options)
            for cls in (fnn.AdaLayerNorm, theirs.AdaLayerNorm)
        )
        agree(*pair, tokens(), temb=temb)
    pair = (cls(D, 10) for cls in (fnn.AdaLayerNorm, theirs.AdaLayerNorm))
    agree(*pair, tokens(), torch.tensor(3))


def test_rms_norm():
    pair = fnn.RMSNorm(D, 1e-5), theirs.RMSNorm(D, 1e-5)
    agree(*pair, tokens())
    agree(*pair, tokens().reshape(2, 5, 1, D))


class Gated(nn.Module):
    """GatedAdaLN in plain PyTorch."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(D, 3 * D)
        self.norm = nn.LayerNorm(D, 1e-6)

    def forward(self, x, y, c):
        gate, shift, scale = (p.unsqueeze(1) for p in self.linear(c.sigmoid() * c).chunk(3, -1))
        h = x + gate * y
        return h, self.norm(h) * (1 + scale) + shift


def test_gated_adaln():
    layer = fnn.GatedAdaLN(D, elementwise_affine=True)
    x, y, c = tokens(), tokens(seed=2), condition()
    assert torch.equal(layer(x, y, c)[0], x)  # starts at zero
    agree(layer, Gated(), x, y, c)
    h, normed = fnn.GatedAdaLN(D, C, norm_type="rms_norm")(x, y, condition(C))
    assert torch.allclose(normed, nn.functional.rms_norm(h, (D,), eps=1e-6), atol=1e-6)


@pytest.mark.parametrize("norm", [None, nn.LayerNorm, fnn.RMSNorm])
def test_attention(norm):
    layer = fnn.Attention(
        D, 4, qkv_bias=True, qk_norm=norm is not None, norm_layer=norm or nn.LayerNorm
    )
    agree(layer, research.TimmAttention(D, 4, norm), tokens())
    cos, sin = (f(torch.rand(5, D // 4)) for f in (torch.cos, torch.sin))
    assert layer(tokens(), rope=(cos, sin)).shape == (2, 5, D)


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_mlp(approximate):
    layer = fnn.Mlp(D, 4 * D, act_layer=lambda: nn.GELU(approximate=approximate))
    agree(layer, research.TimmMlp(D, 4 * D, approximate), tokens())
    assert fnn.Mlp(D, bias=False)(tokens()).shape == (2, 5, D)


def test_patch_embed():
    layer, original = fnn.PatchEmbed(8, 2, 4, D), research.Patches(8, 2, 4, D)
    x = torch.randn(2, 4, 8, 8)
    agree(layer, original, x)
    assert layer.num_patches == original.num_patches
    pos = torch.randn(1, 16, D)
    assert torch.allclose(layer(x, pos), layer(x) + pos, atol=1e-6)
    normed = fnn.PatchEmbed(None, 2, 4, D, norm_layer=nn.LayerNorm)
    plain = original.proj(x).flatten(2).transpose(1, 2)
    normed.proj.load_state_dict(original.proj.state_dict())
    assert torch.allclose(normed(x, pos), normed.norm(plain) + pos, atol=1e-5)


def test_final_layer():
    agree(fnn.FinalLayer(D, 2, 4), research.FinalLayer(D, 16), tokens(), condition())


def test_wrong_arguments():
    with pytest.raises(ValueError, match="num_heads: got 5, allowed is a divisor of dim = 32"):
        fnn.Attention(D, 5)
    with pytest.raises(ValueError, match=r"attn_drop: got 0\.1, allowed is 0"):
        fnn.Attention(D, 4, attn_drop=0.1)
    with pytest.raises(ValueError, match="attn_mask: got a mask, allowed is None"):
        fnn.Attention(D, 4)(tokens(), torch.ones(5, 5))
    with pytest.raises(TypeError, match="norm_layer: got BatchNorm1d"):
        fnn.Attention(D, 4, qk_norm=True, norm_layer=nn.BatchNorm1d)
    with pytest.raises(ValueError, match="norm_type: got 'batch'"):
        fnn.AdaLayerNormContinuous(D, C, norm_type="batch")
    with pytest.raises(ValueError, match="chunk_dim: got 2, allowed is 0 or 1"):
        fnn.AdaLayerNorm(D, chunk_dim=2)
    with pytest.raises(ValueError, match="temb: got"):
        fnn.AdaLayerNorm(D, chunk_dim=1)(tokens(), temb=condition()[0])
    with pytest.raises(ValueError, match=r"x: got \(1, 4, 4, 4\)"):
        fnn.PatchEmbed(8, 2, 4, D)(torch.zeros(1, 4, 4, 4))
