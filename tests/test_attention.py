"""attention against torch.nn.MultiheadAttention and the formula in float64."""

from __future__ import annotations

import pytest
import torch
from op_cases import random
from torch import nn

import fastdit
from fastdit.embeddings import rope_2d
from fastdit.ops import attention


def qkv(width: int = 48, tokens: int = 9, dtype=torch.float32):
    return random(2, tokens, 3 * width, dtype=dtype, seed=0, grad=False)


@pytest.mark.parametrize("heads", [1, 2, 6])
def test_equals_torchs_multi_head_attention(heads):
    x, layer = (
        random(2, 9, 48, dtype=torch.float32, seed=1, grad=False),
        nn.MultiheadAttention(48, heads, batch_first=True),
    )
    packed = nn.functional.linear(x, layer.in_proj_weight, layer.in_proj_bias)
    ours = layer.out_proj(attention(packed, heads))
    torch.testing.assert_close(ours, layer(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize(("width", "heads"), [(72, 1), (144, 2), (48, 6)])
@pytest.mark.parametrize("tokens", [1, 2, 65])
@pytest.mark.parametrize("scale", [None, 0.05])
def test_formula(width, heads, tokens, scale):
    packed = qkv(width, tokens)
    q, k, v = (
        part.view(2, tokens, heads, width // heads).transpose(1, 2)
        for part in packed.double().chunk(3, -1)
    )
    factor = (width // heads) ** -0.5 if scale is None else scale
    exact = (q @ k.transpose(-1, -2) * factor).softmax(-1) @ v
    exact = exact.transpose(1, 2).reshape(2, tokens, width)
    torch.testing.assert_close(
        attention(packed, heads, scale=scale).double(), exact, atol=2e-6, rtol=0
    )


def test_strided_projection():
    wide = random(2, 9, 200, dtype=torch.float32, seed=2, grad=False)
    assert torch.equal(attention(wide[..., 8:152], 2), attention(wide[..., 8:152].clone(), 2))


def test_autocast_casts_as_scaled_dot_product_attention_does():
    packed = qkv()
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(packed, 2)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, attention(packed.bfloat16(), 2))


@pytest.mark.parametrize("shape", [(0, 5, 24), (2, 0, 24)])
@pytest.mark.parametrize("qk_norm", [None, "layer"])
def test_empty(shape, qk_norm):
    assert attention(torch.zeros(shape), 2, qk_norm=qk_norm).shape == (*shape[:2], 8)


def plain(*shape, seed, dtype=torch.float32):
    return random(*shape, dtype=dtype, seed=seed, grad=False)


def heads_of(packed, heads):
    return (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in packed.chunk(3, -1))


def attended(q, k, v):
    p = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    return (p @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("qk_norm", ["layer", "rms"])
def test_qk_norm_equals_the_layers_of_torch(qk_norm, affine):
    make = nn.LayerNorm if qk_norm == "layer" else nn.RMSNorm
    q_layer, k_layer = (make(12, eps=1e-5, elementwise_affine=affine) for _ in range(2))
    options = {"qk_norm": qk_norm, "qk_eps": 1e-5}
    for seed, (name, layer) in enumerate((("q", q_layer), ("k", k_layer))):
        for kind, parameter in layer.named_parameters():
            parameter.data = plain(12, seed=10 + 2 * seed + (kind == "bias"))
            options[f"{name}_{kind}"] = parameter.data
    packed = qkv()
    q, k, v = heads_of(packed, 4)
    expected = attended(q_layer(q), k_layer(k), v).detach()
    torch.testing.assert_close(attention(packed, 4, **options), expected)


def turned(x, angles, interleaved):
    """x with its pairs of channels multiplied by exp(i·angle) as complex numbers."""
    pairs = x.unflatten(-1, (-1, 2)) if interleaved else x.unflatten(-1, (2, -1)).mT
    product = torch.view_as_real(
        torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles)
    )
    return (product if interleaved else product.mT).flatten(-2)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("interleaved", [True, False])
def test_rope_turns_pairs_of_channels_as_complex_numbers(interleaved, per_sample):
    packed = qkv()
    angles = plain(*((2, 9, 6) if per_sample else (9, 6)), seed=3)
    full = angles.repeat_interleave(2, -1) if interleaved else torch.cat([angles, angles], -1)
    rope = (full.cos(), full.sin())
    out = attention(packed, 4, rope=rope, rope_interleaved=interleaved)
    q, k, v = heads_of(packed, 4)
    angles = angles[:, None] if per_sample else angles
    expected = attended(turned(q, angles, interleaved), turned(k, angles, interleaved), v)
    torch.testing.assert_close(out, expected)
    stacked = attention(packed, 4, rope=torch.stack(rope), rope_interleaved=interleaved)
    assert torch.equal(stacked, out)


def test_rope_comes_after_qk_norm():
    packed, weight = qkv(), plain(12, seed=4)
    angles = plain(9, 6, seed=3)
    full = angles.repeat_interleave(2, -1)
    out = attention(
        packed,
        4,
        qk_norm="rms",
        q_weight=weight,
        k_weight=weight,
        rope=(full.cos(), full.sin()),
    )
    q, k, v = heads_of(packed, 4)
    q, k = (turned(nn.functional.rms_norm(x, (12,), weight, 1e-6), angles, True) for x in (q, k))
    torch.testing.assert_close(out, attended(q, k, v))


@pytest.mark.parametrize("interleaved", [True, False])
def test_rope_2d_makes_scores_depend_on_the_distance_alone(interleaved):
    cos, sin = rope_2d(8, (3, 4), interleaved=interleaved)
    assert cos.shape == sin.shape == (12, 8)
    assert cos.dtype == sin.dtype == torch.float32
    q, k = plain(8, seed=1), plain(8, seed=2)
    q, k = (x * cos + fastdit.reference.rotate(x, interleaved) * sin for x in (q, k))
    scores = (q @ k.T).view(3, 4, 3, 4)  # from (row, column) to (row, column)
    torch.testing.assert_close(scores[0, 1, 1, 3], scores[1, 0, 2, 2])
    torch.testing.assert_close(scores[2, 2, 0, 1], scores[2, 3, 0, 2])
    assert not torch.isclose(scores[0, 0, 1, 0], scores[0, 0, 0, 1])
    with pytest.raises(ValueError, match="head_dim: got 10, allowed is a multiple of 4"):
        rope_2d(10, (2, 2))


def test_rope_2d_has_the_published_angles():
    cos, sin = rope_2d(8, (2, 3), theta=100.0)
    angles = torch.tensor([1, 1, 0.1, 0.1, 2, 2, 0.2, 0.2])  # token 5: row 1, column 2
    torch.testing.assert_close(cos[5], angles.cos())
    torch.testing.assert_close(sin[5], angles.sin())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_with_float32_tables(dtype):
    packed, weight = qkv(dtype=dtype), plain(12, seed=4, dtype=dtype)
    rope = rope_2d(12, (3, 3))
    options = {"qk_norm": "layer", "q_weight": weight, "k_weight": weight}
    out = attention(packed, 4, rope=rope, **options)
    assert out.dtype == dtype
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    exact = attention(packed.double(), 4, rope=tuple(t.double() for t in rope), **wide)
    assert (out - exact).abs().max() <= 6 * torch.finfo(dtype).eps * exact.abs().max()


def test_autocast_casts_the_parameters_of_qk_norm_too():
    packed, weight = qkv(), plain(24, seed=4).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(packed, 2, qk_norm="rms", q_weight=weight)
    low = attention(packed.bfloat16(), 2, qk_norm="rms", q_weight=weight.bfloat16())
    assert torch.equal(out, low)
    out.float().square().sum().backward()
    assert weight.grad.dtype == torch.float32


TABLE = torch.ones(3, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"qk_norm": "batch"}, "qk_norm: got 'batch', allowed is None, 'layer' or 'rms'"),
        ({"qk_norm": "rms", "qk_eps": -1.0}, "qk_eps: got -1.0, allowed is a number >= 0"),
        ({"q_weight": torch.ones(4)}, r"q_weight: got \(4,\).*None, unless qk_norm is given"),
        ({"qk_norm": "rms", "k_weight": torch.ones(5)}, r"k_weight: got \(5,\).*allowed is \(4,\)"),
        ({"qk_norm": "rms", "k_weight": torch.ones(4).double()}, "k_weight: .*float64.*float32"),
        ({"qk_norm": "layer", "k_bias": torch.ones(4)}, "k_bias: got.*unless.*k_weight is given"),
        (
            {"qk_norm": "rms", "q_weight": torch.ones(4), "q_bias": torch.ones(4)},
            "q_bias: got.*unless qk_norm='layer'",
        ),
        ({"rope": (TABLE,)}, r"rope: got tuple of 1, allowed is \(cos, sin\), each \(3, 4\) or"),
        ({"rope": 3}, r"rope: got int, allowed is \(cos, sin\)"),
        ({"rope": (TABLE, 1.0)}, "rope: got float"),
        ({"rope": (TABLE[:2], TABLE[:2])}, r"rope: got \(2, 4\)"),
        ({"rope": (TABLE.int(), TABLE.int())}, "rope: got .*int32"),
        ({"rope": (TABLE, torch.ones(3, 4, device="meta"))}, "rope: got .* on meta"),
        ({"rope": (TABLE.clone().requires_grad_(), TABLE)}, "rope: got .*without gradient"),
        ({"rope": (TABLE, TABLE.double())}, "rope: got .* and .*two tables of one shape"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        attention(torch.ones(2, 3, 24), 2, **options)


def test_rope_needs_pairs_and_weights_are_tensors():
    with pytest.raises(ValueError, match="rope: got tables for head_dim 3, allowed is an even"):
        attention(torch.ones(2, 3, 9), 1, rope=(torch.ones(3, 3), torch.ones(3, 3)))
    with pytest.raises(TypeError, match="q_weight: got float, allowed is a tensor"):
        attention(torch.ones(2, 3, 9), 1, qk_norm="rms", q_weight=1.0)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.ones(2, 3, 25), 2), r"qkv: got \(2, 3, 25\).*divisible by 3·num_heads = 6"),
        ((torch.ones(2, 3, 24), 0), "num_heads: got 0, allowed is a positive int"),
        ((torch.ones(2, 3, 24), True), "num_heads: got True"),
        ((torch.ones(2, 24), 2), r"qkv: got \(2, 24\)"),
    ],
)
def test_wrong_arguments_are_named(args, message):
    with pytest.raises(ValueError, match=message):
        attention(*args)
