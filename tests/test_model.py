"""DiT against the published implementation's outputs, gradients, names and sizes."""

from __future__ import annotations

import golden
import numpy as np
import pytest
import torch
from torch import nn

import fastdit
from fastdit import ops
from fastdit.embeddings import TimestepEmbedder, sincos_2d

PARAMETERS = {"S": 32_963_360, "B": 130_512_416, "L": 458_102_816, "XL": 675_129_632}
TINY = {"input_size": 8, "hidden_size": 48, "depth": 2, "num_heads": 4, "num_classes": 10}


def tiny(**changes) -> fastdit.DiT:
    """A small model whose output is not zero."""
    model = fastdit.DiT(**{**TINY, **changes})
    golden.set_reference_weights(model, 3)
    return model.eval()


def inputs(batch: int = 2, channels: int = 4, size: tuple[int, int] = (8, 8), seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, channels, *size, generator=generator)
    t = torch.randint(0, 1000, (batch,), generator=generator)
    return x, t, torch.randint(0, 10, (batch,), generator=generator)


@pytest.fixture(scope="module", params=["dit_hd72", "dit_patch4"])
def oracle(request):
    data = golden.load(request.param)
    model = fastdit.DiT(**golden.config(data, "config"))
    golden.set_reference_weights(model, int(data["weight_seed"]))
    return model.eval(), data, [torch.from_numpy(data[name]) for name in ("x", "t", "y")]


def test_forward_equals_the_published_model(oracle):
    model, data, (x, t, y) = oracle
    assert golden.relative_error(model(x, t, y), data["out"]) < 2e-5


def test_guidance_equals_the_published_model(oracle):
    model, data, (x, t, y) = oracle
    null = torch.full_like(y, model.num_classes)
    doubled = (torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null]))
    out = model.forward_with_cfg(*doubled, float(data["cfg_scale"]))
    assert golden.relative_error(out, data["cfg_out"]) < 2e-5


def test_every_gradient_equals_the_published_model(oracle):
    model, data, (x, t, y) = oracle
    model.zero_grad()
    loss = model(x, t, y).square().mean()
    loss.backward()
    assert loss.item() == pytest.approx(float(data["loss"]), rel=2e-5)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {f"gradnorm:{n}" for n in named} == {k for k in data if k.startswith("gradnorm:")}
    for name, parameter in named.items():
        norm = parameter.grad.double().norm().item()
        assert norm == pytest.approx(float(data[f"gradnorm:{name}"]), rel=2e-5), name


@pytest.mark.parametrize("name", fastdit.DiT_models)
def test_published_sizes(name):
    size, patch = name.removeprefix("DiT-").split("/")
    with torch.device("meta"):
        model = fastdit.DiT_models[name]()
    count = sum(p.numel() for p in model.parameters())
    width, tokens, rows = model.pos_embed.shape[-1], 32 // int(patch), 4 * int(patch) ** 2
    # What the patch size changes: positions, the patch projection and the final Linear.
    at_two = width * 256 + width * 16 + 32 * (width + 1)
    here = width * tokens**2 + width * rows + 2 * rows * (width + 1)
    assert count == PARAMETERS[size] - at_two + here


def test_published_names():
    keys = set(tiny().state_dict())
    assert len(keys) == 12 + 10 * 2
    assert {k for k in keys if k.startswith("blocks.1.")} == {
        f"blocks.1.{layer}.{kind}"
        for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
        for kind in ("weight", "bias")
    }


def test_published_initialisation():
    torch.manual_seed(0)
    model = fastdit.DiT(input_size=16, hidden_size=256, depth=1, num_heads=4)
    x, t, y = inputs(size=(16, 16))
    assert model(x, t, y).abs().max() == 0
    qkv = model.blocks[0].attn.qkv.weight
    limit = (6 / (256 + 768)) ** 0.5
    assert 0.99 * limit < qkv.abs().max() <= limit
    conv = model.x_embedder.proj.weight
    assert 0.95 * (6 / (256 + 16)) ** 0.5 < conv.abs().max() <= (6 / (256 + 16)) ** 0.5
    for weight in (
        model.y_embedder.embedding_table.weight,
        model.t_embedder.mlp[0].weight,
        model.t_embedder.mlp[2].weight,
    ):
        assert weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert model.blocks[0].adaLN_modulation[1].weight.abs().max() == 0
    assert not model.pos_embed.requires_grad


def test_positions_encode_the_column_first():
    pos = sincos_2d(16, (2, 3))
    assert np.array_equal(pos[0, :8], pos[3, :8])  # same column, other row
    assert np.array_equal(pos[0, 8:], pos[2, 8:])  # same row, other column
    assert pos[1, 0] == pytest.approx(np.sin(1.0))
    assert pos[1, 4] == pytest.approx(np.cos(1.0))


def test_timestep_embedding_equals_diffusers():
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    t = torch.tensor([0, 1, 500, 999])
    ours = TimestepEmbedder.timestep_embedding(t, 257)
    theirs = embeddings.get_timestep_embedding(t, 257, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)  # their float32 angles
    torch.testing.assert_close(ours[:2], theirs[:2], rtol=0, atol=1e-6)


def test_blocks_called_one_by_one_give_the_deferred_chain():
    """A block called as the published one, (x, c), ends its own residual."""
    model = tiny()
    x, t, y = inputs()
    c, h = model.condition(t, y), model.x_embedder(x, model.pos_embed)
    for block in model.blocks:
        h = block(h, c)
    alone = model.unpatchify(model.final_layer(h, c))
    torch.testing.assert_close(alone, model(x, t, y), rtol=0, atol=1e-6)


def test_label_dropout_draws_as_published():
    model = tiny(class_dropout_prob=0.4).train()
    y = torch.arange(10).repeat(20)
    torch.manual_seed(5)
    dropped = model.y_embedder(y, train=True)
    torch.manual_seed(5)
    drop = torch.rand(len(y)) < 0.4
    expected = model.y_embedder.embedding_table(torch.where(drop, 10, y))
    assert torch.equal(dropped, expected)
    assert drop.any()
    assert not drop.all()


def test_force_drop_ids():
    model = tiny()
    x, t, y = inputs()
    forced = model(x, t, y, force_drop_ids=torch.tensor([1, 0]))
    null = model(x, t, torch.tensor([10, int(y[1])]))
    assert torch.equal(forced, null)
    with pytest.raises(ValueError, match="force_drop_ids"):
        tiny(class_dropout_prob=0)(x, t, y, force_drop_ids=torch.tensor([1, 0]))


@pytest.mark.parametrize("guided", [0, 3, 4, 8])
def test_guided_channels(guided):
    model = tiny()
    x, t, y = inputs()
    null = torch.full_like(y, 10)
    cond, uncond = model(x, t, y), model(x, t, null)
    doubled = (torch.cat([x, -x]), torch.cat([t, t]), torch.cat([y, null]))
    out = model.forward_with_cfg(*doubled, 2.5, guided_channels=guided)
    expected = uncond + 2.5 * (cond - uncond)
    torch.testing.assert_close(out[:2, :guided], expected[:, :guided])
    torch.testing.assert_close(out[2:, :guided], expected[:, :guided])
    torch.testing.assert_close(out[:2, guided:], cond[:, guided:])
    with pytest.raises(ValueError, match="guided_channels: got 9"):
        model.forward_with_cfg(*doubled, 2.5, guided_channels=9)


def test_gradient_checkpointing_changes_nothing_but_memory():
    model, (x, t, y) = tiny(), inputs()
    grads = []
    for enabled in (False, True):
        model.gradient_checkpointing = enabled
        model.zero_grad()
        model(x, t, y).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_non_square():
    """A wide model is the square model's function of its own positions: check it token by token."""
    model = tiny(input_size=(4, 8))
    x, t, y = inputs(size=(4, 8))
    out = model(x, t, y)
    assert out.shape == (2, 8, 4, 8)
    c = model.condition(t, y)
    conv = nn.functional.conv2d(x, model.x_embedder.proj.weight, model.x_embedder.proj.bias, 2)
    h = conv.flatten(2).transpose(1, 2) + torch.from_numpy(sincos_2d(48, (2, 4))).float()
    for block in model.blocks:
        h = block(h, c)
    rows = model.final_layer(h, c)
    patch = rows[1, 1 * 4 + 3].view(2, 2, 8)  # row 1, column 3
    torch.testing.assert_close(out[1, :, 2:4, 6:8], patch.permute(2, 0, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(dtype):
    model, (x, t, y) = tiny(), inputs()
    exact = model.double()(x.double(), t, y)
    out = model.to(dtype)(x.to(dtype), t, y)
    assert out.dtype == dtype
    assert (out.double() - exact).abs().max() < 40 * torch.finfo(dtype).eps * exact.abs().max()


def test_autocast_keeps_the_residual_stream_in_float32():
    model, (x, t, y) = tiny(), inputs()
    seen = []
    hook = model.blocks[1].register_forward_hook(lambda m, args, out: seen.append(out[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, t, y)
    hook.remove()
    assert seen == [torch.float32]
    assert out.dtype == torch.bfloat16
    exact = model(x, t, y)
    assert 0 < (out - exact).abs().max() < 0.05 * exact.abs().max()


def test_compiles_whole_for_any_batch():
    torch.compiler.reset()
    model = tiny()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 3, 5):
        args = inputs(batch)
        torch.testing.assert_close(compiled(*args), model(*args))


def test_only_ops_and_matrix_products(monkeypatch):
    """The model reaches normalisation, attention, GELU and patches through `fastdit.ops` alone."""
    called = []
    for name in ops.__all__:
        original = getattr(ops, name)
        monkeypatch.setattr(
            ops, name, lambda *a, _f=original, _n=name, **k: (called.append(_n), _f(*a, **k))[1]
        )
    with torch.no_grad():
        tiny()(*inputs())
    block = ["attention", "gated_adaln", "bias_gelu", "gated_adaln"]
    assert called == ["patch_embed", "adaln", *block, *block, "unpatchify"]


def test_empty_batch():
    x, t, y = inputs(0)
    assert tiny()(x, t, y).shape == (0, 8, 8, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "num_heads: got 5, allowed is a divisor of hidden_size = 48"),
        ({"hidden_size": 50, "num_heads": 5}, "hidden_size: got 50"),
        ({"patch_size": 3}, "patch_size: got 3"),
        ({"input_size": (8, 8, 8)}, "input_size: got"),
        ({"depth": -1}, "depth: got -1"),
        ({"class_dropout_prob": 1.5}, "class_dropout_prob: got 1.5"),
        ({"num_classes": -1}, "num_classes: got -1"),
    ],
)
def test_wrong_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_wrong_inputs():
    model, (x, t, y) = tiny(), inputs()
    with pytest.raises(ValueError, match=r"x: got \(2, 3, 8, 8\)"):
        model(x[:, :3], t, y)
    with pytest.raises(ValueError, match=r"t: got \(1,\)"):
        model(x, t[:1], y)
    with pytest.raises(ValueError, match="x: got 3 rows"):
        model.forward_with_cfg(*inputs(3), 2.0)


def test_runs_on_meta_tensors():
    """Shapes alone, as launch counters and memory planners use a model; meta has no autocast."""
    with torch.device("meta"):
        model = fastdit.DiT(input_size=4, hidden_size=24, depth=1, num_heads=2, num_classes=3)
        out = model(torch.empty(2, 4, 4, 4), torch.empty(2), torch.empty(2, dtype=torch.long))
    assert out.is_meta
    assert out.shape == (2, 8, 4, 4)
