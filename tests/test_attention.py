"""attention against torch.nn.MultiheadAttention and the formula in float64."""

from __future__ import annotations

import pytest
import torch
from op_cases import random
from torch import nn

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
def test_empty(shape):
    assert attention(torch.zeros(shape), 2).shape == (*shape[:2], 8)


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
