"""adaln against torch.nn's layers written out, in every option, layout and precision."""

from __future__ import annotations

import pytest
import torch
from op_cases import B, D, N, random
from torch import nn

import fastdit
from fastdit.ops import adaln, gated_adaln, gated_residual


def plain(shape=(B, N, D), seed=0, dtype=torch.float32):
    return random(*shape, dtype=dtype, seed=seed, grad=False)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("affine", [False, True])
def test_equals_the_layers_of_torch(per_token, plus_one, norm, affine):
    x, weight, bias = plain(), plain((D,), 1), plain((D,), 2)
    shift, scale = (plain((B, N, D) if per_token else (B, 1, D), seed) for seed in (3, 4))
    if norm == "rms":
        layer, bias = nn.RMSNorm(D, eps=1e-5, elementwise_affine=affine), None
    else:
        layer = nn.LayerNorm(D, eps=1e-5, elementwise_affine=affine)
    if affine:
        layer.weight.data = weight
        if bias is not None:
            layer.bias.data = bias
    expected = layer(x) * ((1 if plus_one else 0) + scale) + shift
    options = {"norm": norm, "plus_one": plus_one}
    if affine:
        options |= {"weight": weight, "bias": bias}
    squeeze = (lambda t: t) if per_token else (lambda t: t.squeeze(1))
    out = adaln(x, squeeze(shift), squeeze(scale), 1e-5, **options)
    torch.testing.assert_close(out, expected.detach())


def test_without_modulation_it_is_layer_norm():
    x = plain() + 100
    exact = nn.functional.layer_norm(x.double(), (D,), eps=1e-6)
    eager = nn.functional.layer_norm(x, (D,), eps=1e-6)
    assert (adaln(x) - exact).abs().max() <= (eager - exact).abs().max() + 1e-6


def test_chunks_of_a_projection_are_read_in_place():
    x, projection = plain(), plain((B, 6 * D), 1)
    shift, scale = projection.chunk(6, -1)[3:5]
    assert not shift.is_contiguous()
    out = adaln(x, shift, scale)
    assert torch.equal(out, adaln(x, shift.clone(), scale.clone()))


def test_strided_input():
    x, shift = plain((N, B, D)).transpose(0, 1), plain((B, D), 1)
    assert torch.equal(adaln(x, shift, shift), adaln(x.contiguous(), shift, shift))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_stays_within_eager_rounding(dtype):
    x, shift, scale = plain(dtype=dtype), plain((B, D), 1, dtype), plain((B, D), 2, dtype)
    out = adaln(x, shift, scale)
    exact = adaln(x.double(), shift.double(), scale.double())
    assert out.dtype == dtype
    assert (out.double() - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max()


def test_autocast_leaves_a_float32_stream_in_float32():
    x, low = plain(), plain((B, D), 1).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = adaln(x, low, low)
        h, normed = gated_adaln(x, x.bfloat16(), low, low, low)
    assert out.dtype == h.dtype == normed.dtype == torch.float32
    torch.testing.assert_close(out, adaln(x, low, low))


def test_nan_and_inf_stay_in_their_row():
    x = plain()
    x[0, 1, 3], x[1, 2, 0] = float("nan"), float("inf")
    out = adaln(x, plain((B, D), 1), plain((B, D), 2))
    rows = torch.zeros(B, N, dtype=torch.bool)
    rows[0, 1] = rows[1, 2] = True
    assert torch.equal(out.isnan().any(-1), rows)


@pytest.mark.parametrize("shape", [(0, N, D), (B, 0, D)])
def test_empty(shape):
    x, modulation = torch.zeros(shape), torch.zeros(shape[0], D)
    assert adaln(x, modulation, modulation).shape == shape
    assert gated_residual(x, x, modulation).shape == shape
    assert gated_adaln(x, x, modulation)[1].shape == shape


def test_gated_ops_are_their_definition():
    x, y = plain(), plain(seed=1)
    gate, shift, scale = (plain((B, D), seed) for seed in (2, 3, 4))
    h = x + gate[:, None] * y
    torch.testing.assert_close(gated_residual(x, y, gate), h)
    got_h, out = gated_adaln(x, y, gate, shift, scale)
    torch.testing.assert_close(got_h, h)
    torch.testing.assert_close(out, adaln(h, shift, scale))
    tokens = plain(seed=5)
    torch.testing.assert_close(gated_residual(x, y, tokens), x + tokens * y)


def test_shapes_beyond_32_bit_indices():
    """2^33 elements in fake tensors: shapes and strides are computed without overflow."""
    with torch._subclasses.FakeTensorMode():
        x, modulation = torch.empty(2, 2**20, 4096), torch.empty(2, 4096)
        for out in (
            torch.ops.fastdit.adaln(x, modulation, modulation, None, None, 1e-6, "layer", True)[0],
            torch.ops.fastdit.gated_residual(x, x, modulation),
        ):
            assert out.numel() == 2**33
            assert out.stride() == (2**32, 4096, 1)


WRONG = [
    ({"x": torch.ones(2, 3)}, r"x: got \(2, 3\) float32 on cpu, allowed is .*\(B, N, D\)"),
    ({"x": torch.ones(2, 3, 4, dtype=torch.int64)}, "x: got .*int64"),
    ({"shift": torch.ones(3, 4)}, r"shift: got \(3, 4\).*allowed is \(2, 4\) per sample or"),
    ({"scale": torch.ones(2, 1, 4)}, r"scale: got \(2, 1, 4\)"),
    ({"scale": torch.ones(2, 4, device="meta")}, "scale: got .* on meta.* on cpu"),
    ({"eps": -1.0}, "eps: got -1.0, allowed is a number >= 0"),
    ({"eps": float("nan")}, "eps: got nan"),
    ({"norm": "batch"}, "norm: got 'batch', allowed is 'layer' or 'rms'"),
    ({"weight": torch.ones(3)}, r"weight: got \(3,\).*allowed is \(4,\)"),
    ({"weight": torch.ones(4, dtype=torch.float64)}, "weight: got .*float64.*allowed is .*float32"),
    ({"bias": torch.ones(4)}, "bias: got .*weight is given"),
    ({"bias": torch.ones(4), "weight": torch.ones(4), "norm": "rms"}, "bias: got .*norm='layer'"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_wrong_arguments_are_named(changes, message):
    modulation = torch.ones(2, 4)
    arguments = {"x": torch.ones(2, 3, 4), "shift": modulation, "scale": modulation}
    with pytest.raises(ValueError, match=message):
        adaln(**{**arguments, **changes})
    changes = dict(changes)
    x = changes.pop("x", arguments["x"])
    rest = {k: v for k, v in {**arguments, **changes}.items() if k != "x"}
    with pytest.raises(ValueError, match=message):
        gated_adaln(x, torch.ones(2, 3, 4), modulation, **rest)


def test_wrong_branches_are_named():
    x, gate = torch.ones(2, 3, 4), torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"y: got \(2, 3, 5\).*allowed is \(2, 3, 4\)"):
        gated_residual(x, torch.ones(2, 3, 5), gate)
    with pytest.raises(ValueError, match=r"gate: got \(2, 3\)"):
        gated_residual(x, x, torch.ones(2, 3))
    with pytest.raises(TypeError, match="gate: got float"):
        gated_residual(x, x, 0.5)
    with pytest.raises(TypeError, match="x: got list"):
        fastdit.ops.adaln([1.0])
