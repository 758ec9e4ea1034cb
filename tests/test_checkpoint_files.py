"""Writes that cannot destroy, and the folders and hubs that checkpoints come from."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from test_checkpoint import FILES, assert_same, tiny

from fastdit import checkpoint_files
from fastdit.checkpoint import (
    CheckpointError,
    atomic_write,
    load_model,
    save_model,
)


@pytest.mark.parametrize("format", FILES)
def test_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch, format):
    path = tmp_path / FILES[format]
    old = tiny(1)
    save_model(old, path, format=format)
    before = sorted(tmp_path.rglob("*"))

    def disk_full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint_files.os, "fsync", disk_full)
    with pytest.raises(OSError, match="no space left"):
        save_model(tiny(2), path, format=format)
    assert_same(old, load_model(path, num_heads=4))
    assert sorted(tmp_path.rglob("*")) == before


def test_atomic_write_keeps_the_old_until_the_new_is_whole(tmp_path):
    target = tmp_path / "new" / "file"
    atomic_write(target, lambda path: path.write_bytes(b"old"))

    def half(path):
        path.write_bytes(b"ne")
        assert target.read_bytes() == b"old"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic_write(target, half)
    assert target.read_bytes() == b"old"
    link = tmp_path / "link"
    link.symlink_to(target)
    with open(target, "rb") as reader:
        atomic_write(link, lambda path: path.write_bytes(b"new"))
        assert reader.read() == b"old", "a new file, so that who reads the old one still can"
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert list(target.parent.iterdir()) == [target]


def test_files_get_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    for format in ("fastdit", "dit"):
        save_model(tiny(), tmp_path / FILES[format], format=format)
        assert (tmp_path / FILES[format]).stat().st_mode == (tmp_path / "plain").stat().st_mode


# The hub


def hub(monkeypatch, folder: Path | None) -> list[tuple]:
    calls = []

    def snapshot_download(repo_id, allow_patterns):
        calls.append((repo_id, allow_patterns))
        if folder is None:
            raise OSError("404")
        return str(folder)

    module = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return calls


def test_hub_id(tmp_path, monkeypatch):
    save_model(tiny(), tmp_path / "hub" / "transformer", format="diffusers")
    (tmp_path / "hub" / "model_index.json").write_text("{}")
    calls = hub(monkeypatch, tmp_path / "hub")
    monkeypatch.chdir(tmp_path)
    assert_same(tiny(), load_model("facebook/DiT-XL-2-256"))
    assert calls[0][0] == "facebook/DiT-XL-2-256"
    assert "transformer/*" in calls[0][1]
    save_model(tiny(3), tmp_path / "facebook" / "DiT-XL-2-256")
    assert_same(tiny(3), load_model("facebook/DiT-XL-2-256"))
    assert len(calls) == 1, "a local path wins"


def test_hub_failures_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub(monkeypatch, None)
    with pytest.raises(FileNotFoundError, match=r"no local path, .*404"):
        load_model("someone/absent")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="pip install huggingface_hub"):
        load_model("facebook/DiT-XL-2-256")
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        load_model("results/0050000.pt")


def test_sharded_folder(tmp_path):
    save_model(tiny(), tmp_path, format="diffusers")
    whole = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, keys in shards.items():
        save_file({k: tensors[k] for k in keys}, tmp_path / file)
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {k: f for f, ks in shards.items() for k in ks}}))
    assert_same(tiny(), load_model(tmp_path))
    index.write_text(json.dumps({"weight_map": {"x": "../a.safetensors"}}))
    with pytest.raises(CheckpointError, match="outside its folder"):
        load_model(tmp_path)
