"""patch_embed, unpatchify and bias_gelu against torch.nn's layers and einsum."""

from __future__ import annotations

import pytest
import torch
from op_cases import random
from torch import nn

import fastdit
from fastdit.ops import bias_gelu, patch_embed, unpatchify


def plain(*shape: int, seed: int = 0) -> torch.Tensor:
    return random(*shape, dtype=torch.float32, seed=seed, grad=False)


@pytest.mark.parametrize("patch", [(1, 1), (2, 2), (4, 2), (8, 8)])
def test_patch_embed_is_a_strided_convolution(patch):
    x, pos = plain(2, 3, 8, 16), plain(1, (8 // patch[0]) * (16 // patch[1]), 20, seed=1)
    conv = nn.Conv2d(3, 20, patch, stride=patch)
    expected = conv(x).flatten(2).transpose(1, 2) + pos
    out = patch_embed(x, conv.weight, conv.bias, pos)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(patch_embed(x, conv.weight, conv.bias, pos[0]), expected)
    assert out.is_contiguous()


def test_patch_embed_of_a_signal():
    x, conv = plain(2, 3, 12), nn.Conv1d(3, 20, 4, stride=4, bias=False)
    torch.testing.assert_close(patch_embed(x, conv.weight), conv(x).transpose(1, 2))


def test_patch_embed_under_autocast():
    x, weight, pos = plain(2, 3, 4, 4), plain(8, 3, 2, 2, seed=1), plain(4, 8, seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        assert patch_embed(x, weight).dtype == torch.bfloat16
        assert patch_embed(x, weight, None, pos).dtype == torch.float32


@pytest.mark.parametrize("patch", [(1, 1), (2, 2), (4, 2)])
def test_unpatchify_is_the_published_einsum(patch):
    tokens = plain(2, 15, patch[0] * patch[1] * 3)
    image = torch.einsum("nhwpqc->nchpwq", tokens.view(2, 5, 3, *patch, 3))
    expected = image.reshape(2, 3, 5 * patch[0], 3 * patch[1])
    assert torch.equal(unpatchify(tokens, patch, (5, 3), 3), expected)


def test_unpatchify_of_a_signal_and_of_one_token_is_a_copy():
    tokens = plain(2, 6, 8)
    signal = unpatchify(tokens, 4, 6, 2)
    assert signal[1, 1, 4 * 5 + 3] == tokens[1, 5, 3 * 2 + 1]
    one = plain(1, 1, 1)
    assert unpatchify(one, 1, (1, 1), 1).data_ptr() != one.data_ptr()


def test_unpatchify_moves_any_bit_pattern():
    tokens = plain(2, 4, 12)
    tokens[0, 1, 2], tokens[1, 3, 4] = float("nan"), float("-inf")
    out = unpatchify(tokens, 2, (2, 2), 3)
    assert out.isnan().sum() == 1
    assert out.isneginf().sum() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bias_gelu_is_torchs(dtype):
    x, bias = plain(3, 4, 5, 20).to(dtype) * 4, plain(20, seed=1).to(dtype)
    expected = nn.GELU(approximate="tanh")(x + bias)
    with fastdit.backend("reference"):
        assert torch.equal(bias_gelu(x, bias), expected)
    exact = nn.GELU(approximate="tanh")(x.double() + bias.double())
    floor = torch.finfo(torch.float32).eps * exact.abs()
    ours, eager = bias_gelu(x, bias) - exact, expected - exact
    assert (ours.abs() <= eager.abs().max() + floor).all()


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_bias_gelu_over_all_magnitudes(backend):
    """Every 997th float32 that is finite: a kernel is right to 2 units in the last place."""
    x = torch.arange(0, 2**32, 997, dtype=torch.int64).to(torch.uint32).view(torch.float32)
    x = x[x.isfinite()].unsqueeze(1)
    z = x.double()
    with fastdit.backend(backend):
        out = bias_gelu(x, torch.zeros(1))
    exact = z * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3))
    if backend == "reference":  # 1 + tanh cancels in eager PyTorch's float32
        assert (out - exact).abs().max() <= 1e-6 * x.abs().max()
        return
    normal = exact.abs() >= torch.finfo(torch.float32).tiny
    error = ((out - exact).abs() / exact.abs())[normal]
    kernel = fastdit.explain("bias_gelu", x, torch.zeros(1))[0].runs != "reference"
    assert not kernel or error.max() <= 2 * torch.finfo(torch.float32).eps
    assert not kernel or (out - exact)[~normal].abs().max() <= torch.finfo(torch.float32).tiny


def test_bias_gelu_accepts_autocasts_mixture():
    out = bias_gelu(plain(2, 3, 8).bfloat16(), plain(8, seed=1))
    assert out.dtype == torch.bfloat16


def test_empty():
    assert patch_embed(torch.zeros(0, 3, 4, 4), torch.ones(8, 3, 2, 2)).shape == (0, 4, 8)
    assert unpatchify(torch.zeros(0, 4, 12), 2, (2, 2), 3).shape == (0, 3, 4, 4)
    assert bias_gelu(torch.zeros(0, 8), torch.ones(8)).shape == (0, 8)


IMAGE, KERNEL = torch.ones(2, 3, 4, 4), torch.ones(8, 3, 2, 2)
WRONG = [
    (
        patch_embed,
        (torch.ones(2, 3, 5, 4), KERNEL),
        r"x: got \(2, 3, 5, 4\).*divisible by \(2, 2\)",
    ),
    (patch_embed, (IMAGE, torch.ones(8, 4, 2, 2)), r"weight: got \(8, 4, 2, 2\)"),
    (patch_embed, (IMAGE, KERNEL.double()), "weight: got .*float64"),
    (patch_embed, (IMAGE, KERNEL, torch.ones(7)), r"bias: got \(7,\).*allowed is \(8,\)"),
    (patch_embed, (IMAGE, KERNEL, None, torch.ones(5, 8)), r"pos: got \(5, 8\).*\(4, 8\)"),
    (patch_embed, (IMAGE, KERNEL, None, torch.ones(2, 4, 8)), r"pos: got \(2, 4, 8\)"),
    (unpatchify, (torch.ones(2, 4, 11), 2, (2, 2), 3), r"tokens: got .*allowed is \(B, 4, 12\)"),
    (unpatchify, (torch.ones(2, 4, 12), (2, 2, 1), (2, 2), 3), r"patch: got \(2, 2, 1\)"),
    (unpatchify, (torch.ones(2, 4, 12), 2, (1, 2, 2), 3), r"grid: got \(1, 2, 2\)"),
    (unpatchify, (torch.ones(2, 4, 12), 2, (2, 0), 3), "grid|a positive int"),
    (bias_gelu, (torch.ones(2, 4), torch.ones(5)), r"bias: got \(5,\).*allowed is \(4,\)"),
]


@pytest.mark.parametrize(("op", "args", "message"), WRONG)
def test_wrong_arguments_are_named(op, args, message):
    with pytest.raises(ValueError, match=message):
        op(*args)


@pytest.mark.parametrize("position", [1, 2, 3])
@pytest.mark.parametrize("value", [[1.0], 3.0])
def test_what_is_no_tensor_is_named(position, value):
    args = [IMAGE, KERNEL, None, None]
    args[position] = value
    name = ("x", "weight", "bias", "pos")[position]
    with pytest.raises(TypeError, match=f"{name}: got {type(value).__name__}, allowed is a tensor"):
        patch_embed(*args)
