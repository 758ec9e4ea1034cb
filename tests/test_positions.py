"""Positions: their values, other resolutions, and what becomes of a model that changes its own."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from designs import inputs, tiny

import fastdit
from fastdit import positions
from fastdit.embeddings import rope_2d, sincos_1d, sincos_2d

CPU = torch.device("cpu")


def table(kind: str, grid, base=None, scaling: str = "interpolate", width: int = 24):
    return positions.initial_table(kind, grid, base or grid, scaling, width)[0].double()


def test_computed_tables_are_the_published_formula():
    assert torch.equal(
        table("sincos_2d", (3, 5)), torch.from_numpy(sincos_2d(24, (3, 5))).float().double()
    )
    flat = torch.from_numpy(sincos_1d(24, np.arange(15)))
    torch.testing.assert_close(table("sincos_1d", (3, 5)), flat, rtol=0, atol=1e-6)
    torch.testing.assert_close(table("sincos_1d", (15,)), flat, rtol=0, atol=1e-6)


def test_other_grids_interpolate_or_count_on():
    """Twice the resolution has the known positions at every other token; half as much, every other
    of the known; counting on, the first of a longer axis are the known ones."""
    known = table("sincos_2d", (4, 6)).view(4, 6, 24)
    fine = table("sincos_2d", (8, 12), (4, 6)).view(8, 12, 24)
    torch.testing.assert_close(fine[::2, ::2], known, rtol=0, atol=1e-6)
    coarse = table("sincos_2d", (2, 3), (4, 6)).view(2, 3, 24)
    torch.testing.assert_close(coarse, known[::2, ::2], rtol=0, atol=1e-6)
    longer = table("sincos_2d", (8, 6), (4, 6), "extrapolate").view(8, 6, 24)
    torch.testing.assert_close(longer[:4], known, rtol=0, atol=1e-6)
    line = table("sincos_1d", (4, 6)).view(4, 6, 24)
    torch.testing.assert_close(
        table("sincos_1d", (8, 12), (4, 6)).view(8, 12, 24)[::2, ::2], line, rtol=0, atol=1e-6
    )


def test_rotary_tables():
    rope = positions.RotaryPositions(8, (3, 5), (3, 5), "interpolate")
    for ours, theirs in zip(rope((3, 5)), rope_2d(8, (3, 5)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    fine = rope((6, 10))[0].view(6, 10, 8)
    torch.testing.assert_close(fine[::2, ::2].flatten(0, 1), rope((3, 5))[0])
    cos, sin = rope((3, 5), extra=2)
    assert cos.shape == (17, 8)
    assert (cos[15:] == 1).all()
    assert (sin[15:] == 0).all()
    line = positions.RotaryPositions(8, (7,), (7,), "extrapolate")
    angles = torch.arange(7.0)[:, None] * 10000.0 ** -(torch.arange(4) / 4)
    torch.testing.assert_close(line((7,))[1][:, ::2], angles.sin())


def test_rotary_tables_stay_float32():
    model = tiny(rope=True).bfloat16()
    assert model.feat_rope.freqs_cos.dtype == torch.float32
    assert torch.equal(model.feat_rope.freqs_cos, tiny(rope=True).feat_rope.freqs_cos)
    x, t, y = inputs(model)
    assert model(x.bfloat16(), t, y).dtype == torch.bfloat16
    assert model.to("meta").feat_rope.freqs_sin.is_meta


def test_rotation_makes_scores_depend_on_distance_alone():
    """All tokens counted from 3 instead of 0: nothing changes; counted backwards, it does."""
    options = {"input_size": (12,), "positions": "none", "rope": True, "any_size": True}
    model = tiny(position_scaling="extrapolate", **options)
    x, t, y = inputs(model)
    expected = model(x, t, y)
    from_three = [table[3:] for table in model.feat_rope((9,))]
    for change, same in ((lambda table: table, True), (lambda table: table.flip(0), False)):
        model.feat_rope.freqs_cos, model.feat_rope.freqs_sin = map(change, from_three)
        assert torch.allclose(model(x, t, y), expected, rtol=1e-4, atol=1e-4) == same


def test_learned_tables_are_resampled():
    grid = torch.randn(1, 24, 6)
    assert positions.resampled(grid, (4, 6), (4, 6)) is grid
    fine = positions.resampled(grid, (4, 6), (8, 12))
    image = grid.transpose(1, 2).reshape(1, 6, 4, 6)
    expected = F.interpolate(image, (8, 12), mode="bicubic", antialias=True)
    torch.testing.assert_close(fine, expected.flatten(2).transpose(1, 2))
    line = positions.resampled(grid, (24,), (6,))
    assert line.shape == (1, 6, 6)
    constant = positions.resampled(torch.ones(1, 24, 6), (4, 6), (3, 5))
    torch.testing.assert_close(constant, torch.ones(1, 15, 6))


def test_learned_rows_and_columns_are_added():
    model = tiny(positions="learned_2d", input_size=(4, 6))
    pos = positions.table_for(model, (2, 3))[0].view(2, 3, 24)
    assert torch.equal(pos[1, 2], model.pos_rows[0, 1] + model.pos_columns[0, 2])
    assert "pos_embed" not in model.state_dict()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rope": True, "positions": "none"},
        {"positions": "sincos_1d", "position_scaling": "extrapolate"},
        {"positions": "learned_1d"},
        {"positions": "learned_2d", "conditioning": "in_context", "rope": True},
    ],
)
def test_a_resized_model_is_the_one_that_takes_any_size(options, tmp_path):
    """Changing the model's size, and handing a model of any size an input of it, are the same; a
    checkpoint keeps the change; going back undoes it."""
    flexible, model = tiny(any_size=True, **options), tiny(**options)
    original = copy.deepcopy(model)
    x, t, y = inputs(model)
    big = torch.randn(2, 4, 8, 6)
    with pytest.raises(ValueError, match=r"x: got \(2, 4, 8, 6\)"):
        model(big, t, y)
    with torch.no_grad():
        assert model.set_input_size((8, 6)) is model
        expected = flexible(big, t, y)
        torch.testing.assert_close(model(big, t, y), expected, rtol=1e-4, atol=1e-4)
        fastdit.save_model(model, tmp_path / "m.safetensors")
        loaded = fastdit.load_model(tmp_path / "m.safetensors")
        assert loaded.config == model.config
        assert torch.equal(loaded(big, t, y), model(big, t, y))
        assert loaded.flops() == flexible.flops((8, 6)) > flexible.flops()
        model.set_input_size(4)
        assert model.config == original.config
        torch.testing.assert_close(model(x, t, y), original(x, t, y), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="input_size: got 5, allowed is a multiple of the patch"):
        model.set_input_size(5)


def test_resizing_in_the_model_s_precision():
    model = tiny(rope=True).double()
    model.set_input_size(8)
    x = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    assert model(x, torch.tensor([3]), torch.tensor([1])).dtype == torch.float64
    assert model.pos_embed.dtype == torch.float64
    assert not model.pos_embed.requires_grad


@pytest.mark.parametrize("side", [32, 48, 64, 128, 512])
def test_many_tokens(side):
    """From 32x32 to 512x512 latents: shapes alone."""
    with torch.device("meta"):
        model = fastdit.DiT_models["DiT-S/8"](any_size=True, rope=True)
        out = model(torch.empty(1, 4, side, side), torch.empty(1), torch.empty(1, dtype=torch.long))
    assert out.shape == (1, 8, side, side)
    assert model.flops(side) > 0
