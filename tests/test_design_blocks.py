"""Designs layer by layer: PyTorch's own blocks, LightningDiT's, and the literal document's."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from designs import VARIANTS, inputs, tiny
from torch import nn

import fastdit
from fastdit import ops


@pytest.fixture(scope="module")
def models():
    names = ("in_context", "cross_attention", "lightningdit", "literal")
    return {name: tiny(**VARIANTS[name]) for name in names}


def copy_attention(theirs: nn.MultiheadAttention, qkv_weight, qkv_bias, proj) -> None:
    theirs.in_proj_weight.copy_(qkv_weight)
    theirs.in_proj_bias.copy_(qkv_bias)
    theirs.out_proj.load_state_dict(proj.state_dict())


@torch.no_grad()
def test_in_context_blocks_are_pytorchs_encoder_layers(models):
    model = models["in_context"]
    gelu = partial(F.gelu, approximate="tanh")
    options = {"activation": gelu, "batch_first": True, "norm_first": True, "layer_norm_eps": 1e-6}
    x, t, y = inputs(model)
    h = torch.cat([model.x_embedder(x, model.pos_embed), model.condition(t, y)], 1)
    for block in model.blocks:
        theirs = nn.TransformerEncoderLayer(24, 2, 96, dropout=0.0, **options).eval()
        attn, mlp = block.attn, block.mlp
        copy_attention(theirs.self_attn, attn.qkv.weight, attn.qkv.bias, attn.proj)
        pairs = {"linear1": mlp.fc1, "linear2": mlp.fc2, "norm1": block.norm1, "norm2": block.norm2}
        for layer, ours in pairs.items():
            getattr(theirs, layer).load_state_dict(ours.state_dict())
        h = theirs(h)
    h = F.layer_norm(h, (24,), *model.final_layer.norm_final.parameters(), 1e-6)
    rows = model.final_layer.linear(h[:, :4])
    torch.testing.assert_close(model(x, t, y), model.unpatchify(rows), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_cross_attention_blocks_are_pytorchs_decoder_layers(models):
    model = models["cross_attention"]
    gelu = partial(F.gelu, approximate="tanh")
    options = {"activation": gelu, "batch_first": True, "norm_first": True, "layer_norm_eps": 1e-6}
    x, t, y = inputs(model)
    h, c = model.x_embedder(x, model.pos_embed), model.condition(t, y)
    assert c.shape == (2, 2, 24)
    for block in model.blocks:
        theirs = nn.TransformerDecoderLayer(24, 2, 96, dropout=0.0, **options).eval()
        attn, cross, mlp = block.attn, block.cross_attn, block.mlp
        copy_attention(theirs.self_attn, attn.qkv.weight, attn.qkv.bias, attn.proj)
        weight = torch.cat([cross.q.weight, cross.kv.weight])
        bias = torch.cat([cross.q.bias, cross.kv.bias])
        copy_attention(theirs.multihead_attn, weight, bias, cross.proj)
        pairs = {"linear1": mlp.fc1, "linear2": mlp.fc2, "norm1": block.norm1}
        pairs |= {"norm2": block.norm_cross, "norm3": block.norm2}
        for layer, ours in pairs.items():
            getattr(theirs, layer).load_state_dict(ours.state_dict())
        h = theirs(h, c)
    h = F.layer_norm(h, (24,), *model.final_layer.norm_final.parameters(), 1e-6)
    expected = model.unpatchify(model.final_layer.linear(h))
    torch.testing.assert_close(model(x, t, y), expected, rtol=1e-4, atol=1e-4)


def rotated(x, cos, sin):
    """`(B, H, N, d)` with channels 2i, 2i + 1 turned, by complex numbers."""
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    turned = turned * torch.complex(cos[:, ::2], sin[:, ::2])
    return torch.view_as_real(turned).flatten(-2)


@torch.no_grad()
def test_lightningdit_is_its_layers_one_by_one(models):
    """RMSNorm, QK-norm, rotation, SwiGLU and modulation from PyTorch's own functions."""
    model = models["lightningdit"]
    x, t, y = inputs(model)
    h, c = model.x_embedder(x, model.pos_embed), model.condition(t, y)
    cos, sin = model.feat_rope.freqs_cos, model.feat_rope.freqs_sin

    def modulated(norm, h, shift, scale):
        normed = F.rms_norm(h, (24,), norm.weight, 1e-6)
        return normed * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)

    for block in model.blocks:
        parts = block.adaLN_modulation(c).chunk(6, 1)
        qkv = block.attn.qkv(modulated(block.norm1, h, *parts[:2]))
        q, k, v = qkv.view(2, 4, 3, 2, 12).permute(2, 0, 3, 1, 4)
        q, k = (
            rotated(n(z), cos, sin) for n, z in ((block.attn.q_norm, q), (block.attn.k_norm, k))
        )
        out = ((q @ k.mT) * 12**-0.5).softmax(-1) @ v
        h = h + parts[2].unsqueeze(1) * block.attn.proj(out.transpose(1, 2).flatten(2))
        gate, value = block.mlp.w12(modulated(block.norm2, h, *parts[3:5])).chunk(2, -1)
        h = h + parts[5].unsqueeze(1) * block.mlp.w3(F.silu(gate) * value)
    final = model.final_layer
    h = final.linear(modulated(final.norm_final, h, *final.adaLN_modulation(c).chunk(2, 1)))
    torch.testing.assert_close(model(x, t, y), model.unpatchify(h), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_gated_mlp_is_one_op_between_two_products(models, monkeypatch):
    model, calls = models["lightningdit"], []
    original = ops.glu
    monkeypatch.setattr(ops, "glu", lambda *args: (calls.append(args), original(*args))[1])
    model(*inputs(model))
    assert len(calls) == len(model.blocks)
    for args, block in zip(calls, model.blocks, strict=True):
        assert args[2] is block.mlp.w12.bias


def test_lightningdits_tensors():
    """LightningDiT-XL/1's names and shapes, as its released configuration builds them."""
    with torch.device("meta"):
        model = fastdit.DiT(
            16, 1, 32, learn_sigma=False, **fastdit.presets["lightningdit"], qk_norm="rms"
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes["feat_rope.freqs_cos"] == shapes["feat_rope.freqs_sin"] == (256, 72)
    assert shapes["pos_embed"] == (1, 256, 1152)
    assert shapes["final_layer.norm_final.weight"] == (1152,)
    assert {n.removeprefix("blocks.3."): s for n, s in shapes.items() if "blocks.3." in n} == {
        "norm1.weight": (1152,),
        "norm2.weight": (1152,),
        "attn.qkv.weight": (3456, 1152),
        "attn.qkv.bias": (3456,),
        "attn.q_norm.weight": (72,),
        "attn.k_norm.weight": (72,),
        "attn.proj.weight": (1152, 1152),
        "attn.proj.bias": (1152,),
        "mlp.w12.weight": (6144, 1152),
        "mlp.w12.bias": (6144,),
        "mlp.w3.weight": (1152, 3072),
        "mlp.w3.bias": (1152,),
        "adaLN_modulation.1.weight": (6912, 1152),
        "adaLN_modulation.1.bias": (6912,),
    }


@torch.no_grad()
def test_the_literal_document(models):
    """h = AdaLN(x) + branch(AdaLN(x)) with AdaLN(x) = γ∘LN(x) + β, γ and β of MLPs on [t, y]."""
    model = models["literal"]
    x, t, y = inputs(model)
    c = torch.cat([model.t_embedder(t), model.y_embedder(y, False)], 1)

    def adaln(layer, h, scale, shift):
        mlps = layer.adaLN_modulation
        return mlps[scale](c).unsqueeze(1) * F.layer_norm(h, (24,), eps=1e-6) + mlps[shift](
            c
        ).unsqueeze(1)

    h = model.x_embedder(x, model.pos_embed)
    for block in model.blocks:
        h = adaln(block, h, "scale_msa", "shift_msa")
        h = h + block.attn(h)
        h = adaln(block, h, "scale_mlp", "shift_mlp")
        h = h + block.mlp(h)
    rows = model.final_layer.linear(adaln(model.final_layer, h, "scale", "shift"))
    torch.testing.assert_close(model(x, t, y), model.unpatchify(rows), rtol=1e-4, atol=1e-4)
    assert model.t_embedder.mlp[0].in_features == 128
    assert [type(m) for m in model.blocks[0].adaLN_modulation["scale_msa"]] == [
        nn.Linear,
        nn.SiLU,
        nn.Linear,
    ]
