"""Every format in, three out; and files that are damaged, foreign or hostile."""

from __future__ import annotations

import argparse
import math
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fastdit
from fastdit.checkpoint import (
    CheckpointError,
    load_model,
    read_metadata,
    save_model,
)

TINY = {"input_size": 8, "hidden_size": 48, "depth": 2, "num_heads": 4, "num_classes": 10}
FILES = {"fastdit": "m.safetensors", "dit": "m.pt", "diffusers": "folder"}


def tiny(seed: int = 0, **changes) -> fastdit.DiT:
    """A small model whose every weight but the positions is random."""
    generator = torch.Generator().manual_seed(seed)
    model = fastdit.DiT(**{**TINY, **changes}).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "pos_embed":
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def assert_same(model: fastdit.DiT, other: fastdit.DiT) -> None:
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert theirs[name].dtype == tensor.dtype, name
        assert torch.equal(theirs[name], tensor), name


def published(tmp_path: Path, state: dict, name: str = "published.pt") -> Path:
    torch.save(state, tmp_path / name)
    return tmp_path / name


# Round trips


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", FILES)
def test_round_trip_is_exact(tmp_path, format, dtype):
    model = tiny().to(dtype)
    save_model(model, tmp_path / FILES[format], format=format)
    loaded = load_model(tmp_path / FILES[format], num_heads=4)
    assert_same(model, loaded)
    assert loaded.config == model.config
    assert not loaded.training
    assert not loaded.pos_embed.requires_grad
    assert loaded.blocks[0].attn.qkv.weight.requires_grad


@pytest.mark.parametrize(
    "changes",
    [
        {"input_size": (8, 12), "patch_size": 4, "mlp_ratio": 2.5},
        {"class_dropout_prob": 0.0, "learn_sigma": False, "in_channels": 1},
        {"depth": 0},
    ],
)
def test_our_format_keeps_any_configuration(tmp_path, changes):
    model = tiny(**changes)
    save_model(model, tmp_path / "m.safetensors")
    loaded = load_model(tmp_path / "m.safetensors")
    assert loaded.config == model.config
    assert_same(model, loaded)


def test_mixed_dtypes_stay_and_dtype_casts(tmp_path):
    model = tiny()
    model.blocks.bfloat16()
    save_model(model, tmp_path / "m.safetensors")
    assert_same(model, load_model(tmp_path / "m.safetensors"))
    cast = load_model(tmp_path / "m.safetensors", dtype=torch.float16)
    assert {p.dtype for p in cast.parameters()} == {torch.float16}
    with pytest.raises(ValueError, match=r"dtype: got torch\.int64"):
        load_model(tmp_path / "m.safetensors", dtype=torch.int64)


def test_metadata_comes_back_and_bad_metadata_is_refused(tmp_path):
    save_model(tiny(), tmp_path / "m.safetensors", metadata={"step": "400000"})
    assert read_metadata(tmp_path / "m.safetensors") == {"step": "400000"}
    for bad in ({"step": 1}, {"fastdit": "{}"}):
        with pytest.raises(ValueError, match="metadata"):
            save_model(tiny(), tmp_path / "n.safetensors", metadata=bad)
    with pytest.raises(ValueError, match="metadata"):
        save_model(tiny(), tmp_path / "n.pt", format="dit", metadata={"step": "1"})
    with pytest.raises(ValueError, match="format: got 'onnx'"):
        save_model(tiny(), tmp_path / "n.onnx", format="onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_wrapped_models_save_under_plain_names(tmp_path):
    model = tiny()
    save_model(nn.DataParallel(model), tmp_path / "m.safetensors")
    assert_same(model, load_model(tmp_path / "m.safetensors"))
    with pytest.raises(ValueError, match="model: got Linear"):
        save_model(nn.Linear(2, 2), tmp_path / "n.safetensors")


def test_loaded_weights_do_not_depend_on_the_file(tmp_path):
    for format in ("fastdit", "dit"):
        path = tmp_path / FILES[format]
        save_model(tiny(), path, format=format)
        loaded = load_model(path, num_heads=4)
        size = path.stat().st_size
        with open(path, "r+b") as file:
            file.write(b"\xff" * size)
        assert_same(tiny(), loaded)


# The published formats


def test_published_file_sizes_follow_from_shapes(tmp_path):
    model = tiny(hidden_size=384, num_heads=6, depth=1, patch_size=4, mlp_ratio=2.0)
    loaded = load_model(published(tmp_path, model.state_dict()))
    assert loaded.config == model.config
    assert_same(model, loaded)


def test_an_mlp_width_that_no_ratio_of_floats_gives(tmp_path):
    model = tiny(hidden_size=28, mlp_ratio=math.nextafter(61 / 28, 3))
    assert len(model.blocks[0].mlp.fc1.weight) == 61 > int(28 * (61 / 28))
    assert_same(model, load_model(published(tmp_path, model.state_dict()), num_heads=4))


def test_old_serialisation_is_read(tmp_path):
    path = tmp_path / "old.pt"
    torch.save(tiny().state_dict(), path, _use_new_zipfile_serialization=False)
    assert_same(tiny(), load_model(path, num_heads=4))


def test_unknown_heads_must_be_given(tmp_path):
    path = published(tmp_path, tiny().state_dict())
    with pytest.raises(CheckpointError, match="num_heads: unknown for hidden_size 48"):
        load_model(path)
    assert load_model(path, num_heads=12).config["num_heads"] == 12
    with pytest.raises(CheckpointError, match="num_heads: got 5"):
        load_model(path, num_heads=5)
    with pytest.raises(ValueError, match="heads: not an argument of DiT"):
        load_model(path, heads=5)


def test_null_row_is_assumed_unless_told(tmp_path):
    path = published(tmp_path, tiny(class_dropout_prob=0.0).state_dict())
    assert load_model(path, num_heads=4).num_classes == 9
    assert load_model(path, num_heads=4, class_dropout_prob=0.0).num_classes == 10
    told = load_model(path, num_heads=4, num_classes=10)
    assert told.config["class_dropout_prob"] == 0.0
    with pytest.raises(CheckpointError, match=r"num_classes: got 12 .* 10 rows"):
        load_model(path, num_heads=4, num_classes=12)
    one = published(tmp_path, tiny(num_classes=1, class_dropout_prob=0.0).state_dict())
    assert load_model(one, num_heads=4).num_classes == 1


def test_non_square_needs_its_size(tmp_path):
    path = published(tmp_path, tiny(input_size=(8, 12)).state_dict())
    with pytest.raises(CheckpointError, match="input_size: the 24 tokens"):
        load_model(path, num_heads=4)
    with pytest.raises(CheckpointError, match="input_size: got 16"):
        load_model(path, num_heads=4, input_size=16)
    loaded = load_model(path, num_heads=4, input_size=(8, 12))
    assert_same(tiny(input_size=(8, 12)), loaded)


@pytest.mark.parametrize(
    "extra",
    [
        {"args": argparse.Namespace(model="DiT-S/2", num_heads=4, num_classes=10)},
        {"args": argparse.Namespace(num_heads=4, results_dir=Path("results"))},
        {"config": {"model": {"num_heads": 4}, "data": {"num_classes": 10}}},
    ],
)
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_training_checkpoints(tmp_path, extra, prefix):
    last, average = tiny(1), tiny(2)
    optimiser = torch.optim.AdamW(last.parameters())
    saved = {
        "model": {prefix + k: v for k, v in last.state_dict().items()},
        "ema": average.state_dict(),
        "opt": optimiser.state_dict(),
        **extra,
    }
    path = published(tmp_path, saved)
    assert_same(average, load_model(path))
    assert_same(last, load_model(path, ema=False))


def test_missing_average_is_not_replaced_in_silence(tmp_path):
    path = published(tmp_path, {"model": tiny().state_dict()})
    with pytest.raises(CheckpointError, match="has no 'ema'; ema=False"):
        load_model(path)
    assert_same(tiny(), load_model(path, ema=False, num_heads=4))


# Damage


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
@pytest.mark.parametrize("format", ["fastdit", "dit"])
def test_truncated_files_are_named(tmp_path, format, kept):
    path = tmp_path / FILES[format]
    save_model(tiny(), path, format=format)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(CheckpointError, match=rf"{path.name}: .*(truncated|empty)"):
        load_model(path, num_heads=4)


def test_files_of_another_kind_are_refused(tmp_path):
    for content, said in [
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<html>not found</html>", r"not a PyTorch file \(Unsupported operand 60\)$"),
        (pickle.dumps([1, 2], protocol=2), "not a PyTorch file|got a list"),
    ]:
        (tmp_path / "m.pt").write_bytes(content)
        with pytest.raises(CheckpointError, match=said):
            load_model(tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="not a DiT's weights: missing keys: pos_embed"):
        load_model(published(tmp_path, nn.Linear(2, 2).state_dict()))
    with pytest.raises(FileNotFoundError, match=r"absent\.pt"):
        load_model(tmp_path / "absent.pt")
    with pytest.raises(CheckpointError, match="no weights in"):
        load_model(tmp_path)


def test_wrong_keys_are_all_named(tmp_path):
    state = tiny().state_dict()
    del state["blocks.0.attn.qkv.bias"], state["t_embedder.mlp.2.weight"]
    state["blocks.1.attn.q_norm.weight"] = torch.ones(12)
    state["blocks.1.mlp.fc2.bias"] = torch.ones(7)
    with pytest.raises(CheckpointError) as caught:
        load_model(published(tmp_path, state), num_heads=4)
    for name in (
        "missing keys: t_embedder.mlp.2.weight, blocks.0.attn.qkv.bias",
        "unexpected keys: blocks.1.attn.q_norm.weight",
        "mis-shaped keys: blocks.1.mlp.fc2.bias (7,) instead of (48,)",
    ):
        assert name in str(caught.value)
    with pytest.raises(CheckpointError, match=r"unexpected keys: blocks\.1\.attn"):
        load_model(published(tmp_path, tiny().state_dict()), num_heads=4, depth=1)
    with pytest.raises(CheckpointError, match="and 12 more"):
        load_model(published(tmp_path, tiny().state_dict()), num_heads=4, depth=4)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pos_embed", torch.ones(16)),
        ("final_layer.linear.weight", torch.ones(5, 48)),
        ("x_embedder.proj.weight", torch.ones(48, 4, 2, 3)),
        ("blocks.0.attn.proj.bias", torch.ones(48, dtype=torch.int64)),
        ("blocks.0.attn.proj.bias", "text"),
    ],
)
def test_a_wrong_tensor_is_named(tmp_path, name, value):
    path = published(tmp_path, {**tiny().state_dict(), name: value})
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        load_model(path, num_heads=4)


def test_a_foreign_configuration_inside_is_refused(tmp_path):
    for config in ("{", '{"rope": true}', '{"depth": "two"}'):
        save_file(tiny().state_dict(), tmp_path / "m.safetensors", {"fastdit": config})
        with pytest.raises(CheckpointError, match=r"configuration inside|depth|num_heads"):
            load_model(tmp_path / "m.safetensors")


class Bomb:
    """Unpickled by the ordinary unpickler, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        import os

        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["flat", "args"])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, zipped, place):
    bomb = Bomb(tmp_path / "ran")
    state = tiny().state_dict()
    saved = {**state, "x": bomb} if place == "flat" else {"ema": state, "args": bomb}
    path = tmp_path / "bomb.pt"
    torch.save(saved, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"refused: the file wants to run posix\.mkdir"):
        load_model(path)
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists(), "the bomb was a dud"
