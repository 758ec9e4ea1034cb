"""Weights that go between fastdit and diffusers: same outputs there and back."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint import assert_same, tiny

from fastdit.checkpoint import CheckpointError, load_model, save_model

diffusers = pytest.importorskip("diffusers")
WEIGHTS = "diffusion_pytorch_model.safetensors"
B0, B1 = "transformer_blocks.0.", "transformer_blocks.1."


@pytest.fixture(scope="module")
def theirs():
    """A random diffusers DiT whose blocks agree on the embedders, as published ones do."""
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=10,
    ).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    first, second = (block.norm1.emb for block in model.transformer_blocks)
    second.load_state_dict(first.state_dict())
    return model


@pytest.fixture
def folder(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "transformer")
    return tmp_path / "transformer"


def inputs(t: int):
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return x, torch.full((3,), t), torch.tensor([0, 9, 10])


def with_our_arithmetic(model):
    """Divide the exponents by 128, and 1e-6 in every norm: see `fastdit.diffusers_format`."""
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        block.norm3.eps = 1e-6
    return model


def difference(ours, theirs, t: int) -> float:
    x, t, y = inputs(t)
    with torch.no_grad():
        expected = theirs(x, timestep=t, class_labels=y).sample
        return ((ours(x, t, y) - expected).norm() / expected.norm()).item()


def test_diffusers_weights_give_diffusers_outputs(theirs, folder):
    ours = load_model(folder)
    assert (ours.config["num_heads"], ours.num_classes, ours.learn_sigma) == (4, 10, True)
    # At t = 0 all angles are 0, so that only the norm's 1e-5 differs.
    assert difference(ours, theirs, 0) < 2e-4
    assert difference(ours, theirs, 500) > 1e-3, "the exponents are known to differ"
    copy = with_our_arithmetic(diffusers.DiTTransformer2DModel.from_pretrained(folder))
    for t in (0, 7, 500, 999):
        assert difference(ours, copy, t) < 2e-6


def test_pipeline_folder_bin_and_lone_file(theirs, folder):
    (folder.parent / "model_index.json").write_text("{}")
    expected = load_model(folder)
    assert_same(expected, load_model(folder.parent))
    assert_same(expected, load_model(folder / WEIGHTS))
    (folder / WEIGHTS).unlink()
    theirs.save_pretrained(folder, safe_serialization=False)
    assert (folder / "diffusion_pytorch_model.bin").is_file()
    assert_same(expected, load_model(folder))
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="pass input_size="):
        load_model(folder, num_heads=4)
    assert_same(expected, load_model(folder, num_heads=4, input_size=8))
    wide = load_model(folder, num_heads=4, input_size=(8, 12))
    batch = torch.zeros(1, 4, 8, 12), torch.tensor([5]), torch.tensor([1])
    assert wide(*batch).shape == (1, 8, 8, 12)


def test_back_to_diffusers(theirs, folder, tmp_path):
    save_model(load_model(folder), tmp_path / "back", format="diffusers")
    back, info = diffusers.DiTTransformer2DModel.from_pretrained(
        tmp_path / "back", output_loading_info=True
    )
    assert not any(info.values()), info
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in back.state_dict().items())
    back.save_pretrained(tmp_path / "again")
    assert_same(load_model(folder), load_model(tmp_path / "again"))


@pytest.mark.parametrize(
    "changes",
    [{}, {"class_dropout_prob": 0.0, "num_classes": 11}, {"learn_sigma": False, "patch_size": 4}],
)
def test_our_weights_give_our_outputs_in_diffusers(tmp_path, changes):
    ours = tiny(**changes)
    save_model(ours, tmp_path, format="diffusers")
    model = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path)
    assert difference(ours, model, 0) < 2e-6
    assert difference(ours, with_our_arithmetic(model), 999) < 2e-6
    assert load_model(tmp_path).config == ours.config


@pytest.mark.parametrize(
    ("changes", "name"),
    [({"input_size": (8, 12)}, "input_size"), ({"mlp_ratio": 2.0}, "mlp_ratio")],
)
def test_what_diffusers_cannot_hold_is_refused(tmp_path, changes, name):
    with pytest.raises(ValueError, match=f"{name}: got"):
        save_model(tiny(**changes), tmp_path / "folder", format="diffusers")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_learned_positions_cannot_be_held(tmp_path):
    model = tiny()
    with torch.no_grad():
        model.pos_embed.add_(0.1)
    with pytest.raises(ValueError, match="pos_embed"):
        save_model(model, tmp_path / "folder", format="diffusers")


def change(folder, edit) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def test_diverged_embedders_are_named(folder):
    name = f"{B1}norm1.emb.class_embedder.embedding_table.weight"
    change(folder, lambda tensors: tensors[name][3].add_(1))
    with pytest.raises(CheckpointError, match=rf"block 1's copy .*{name}.*merge='first'"):
        load_model(folder)
    first = load_file(folder / WEIGHTS)[name.replace(B1, B0)]
    merged = load_model(folder, merge="first")
    assert torch.equal(merged.y_embedder.embedding_table.weight, first)
    with pytest.raises(ValueError, match="merge: got 'mean'"):
        load_model(folder, merge="mean")


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda t: t.pop(f"{B0}attn1.to_k.weight"), f"missing keys: {B0}attn1.to_k.weight"),
        (lambda t: t.update(new=torch.ones(1)), "unexpected keys: new"),
        (
            lambda t: t.update({f"{B1}attn1.to_v.bias": torch.ones(3)}),
            f"mis-shaped keys: {B1}attn1",
        ),
        (lambda t: t.update({"proj_out_1.bias": torch.ones(3)}), "final_layer.adaLN_modulation.1"),
    ],
)
def test_wrong_keys_are_named(folder, edit, said):
    change(folder, edit)
    with pytest.raises(CheckpointError, match=said):
        load_model(folder)


@pytest.mark.parametrize(
    ("name", "value"), [("activation_fn", "geglu"), ("norm_type", "ada_norm_single")]
)
def test_another_architecture_is_named(folder, name, value):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, name: value}))
    with pytest.raises(CheckpointError, match=f"config.json: {name}: got '{value}'"):
        load_model(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="allowed is an object"):
        load_model(folder)
