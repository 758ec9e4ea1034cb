"""Designs from their tensors alone, and from other people's checkpoints.

That our own format keeps every design is a column of tests/test_designs.py.
"""

from __future__ import annotations

import pytest
import torch
from designs import VARIANTS, assert_same, inputs, tiny

import fastdit
from fastdit.checkpoint import CheckpointError, load_model, save_model

UNTOLD = ("residual", "scale_plus_one", "any_size", "base_size", "position_scaling")
"""What no tensor tells."""


@pytest.mark.parametrize("name", [n for n in VARIANTS if n != "any_size"])
def test_tensors_tell_the_design(tmp_path, name):
    """All but what leaves no trace, the heads, and sizes that no positions tell. (`any_size` has an
    interpolated table, which the next test loads.)"""
    model = tiny(**VARIANTS[name])
    save_model(model, tmp_path / "m.pt", format="dit")
    told = {n: model.config[n] for n in UNTOLD if n in model.config}
    if name in ("sequence_positions", "spectrogram", "learned_any_size"):
        told["input_size"] = model.config["input_size"]
    if name == "adaln_zero_no_shift":
        told["conditioning"] = name
    if name == "learned_signal":
        told["patch_size"] = (4,)  # as it was written, instead of 4
    assert_same(model, load_model(tmp_path / "m.pt", num_heads=2, **told))


def test_an_interpolated_table_gives_the_same_outputs(tmp_path):
    model = tiny().set_input_size(8)
    save_model(model, tmp_path / "m.pt", format="dit")
    loaded = load_model(tmp_path / "m.pt", num_heads=2)
    assert loaded.design.positions == "learned_1d"
    args = inputs(model)
    assert torch.equal(model(*args), loaded(*args))
    named = load_model(tmp_path / "m.pt", num_heads=2, positions="sincos_2d", base_size=4)
    assert named.config == model.config


def test_swiglu_widths_of_any_ratio(tmp_path):
    for ratio in (4.0, 2.0, 3.7, 1.0, 8 / 3):
        model = tiny(mlp="swiglu", mlp_ratio=ratio)
        save_model(model, tmp_path / "m.pt", format="dit")
        loaded = load_model(tmp_path / "m.pt", num_heads=2)
        assert loaded.blocks[0].mlp.w12.weight.shape == model.blocks[0].mlp.w12.weight.shape


def test_lightningdits_training_checkpoints(tmp_path):
    """Its `{model, ema, opt, config}`, whose nested configuration has other meanings for our names;
    `wo_shift` is the one of its options that no shape tells."""
    options = {**fastdit.presets["lightningdit"], "qk_norm": "rms", "learn_sigma": False}
    for design in ("adaln_zero", "adaln_zero_no_shift"):
        model = tiny(**options, conditioning=design)
        state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
        told = {"use_rope": True, "wo_shift": design == "adaln_zero_no_shift", "num_heads": 2}
        config = {
            "model": told,
            "vae": {"norm": "group", "mlp": "none"},
            "data": {"num_classes": 5},
        }
        torch.save({"model": state, "ema": state, "opt": {}, "config": config}, tmp_path / "m.pt")
        assert_same(model, load_model(tmp_path / "m.pt"))


def test_rotary_tables_are_not_cast(tmp_path):
    model = tiny(rope=True)
    save_model(model, tmp_path / "m.safetensors")
    loaded = load_model(tmp_path / "m.safetensors", dtype=torch.bfloat16)
    assert loaded.feat_rope.freqs_cos.dtype == torch.float32
    assert loaded.blocks[0].attn.qkv.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("name", [n for n in VARIANTS if n != "published"])
def test_diffusers_format_refuses_what_it_cannot_hold(tmp_path, name):
    model = tiny(**VARIANTS[name])
    with pytest.raises(ValueError, match=r"^\w+: got .* in diffusers' format"):
        save_model(model, tmp_path / "folder", format="diffusers")
    assert not (tmp_path / "folder").exists()


def test_lost_tensors_are_named(tmp_path):
    model = tiny(conditioning="in_context")
    state = model.state_dict()
    del state["blocks.1.norm2.weight"]
    torch.save(state, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"missing keys: blocks\.1\.norm2\.weight"):
        load_model(tmp_path / "m.pt", num_heads=2)
    state = tiny().state_dict()
    del state["y_embedder.embedding_table.weight"]
    torch.save(state, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"num_classes: got 5, but missing keys: y_emb"):
        load_model(tmp_path / "m.pt", num_heads=2, num_classes=5)
    state = tiny(positions="none").state_dict()
    torch.save(state, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="input_size: no positions tell it"):
        load_model(tmp_path / "m.pt", num_heads=2)
    assert load_model(tmp_path / "m.pt", num_heads=2, input_size=4).design.positions == "none"
