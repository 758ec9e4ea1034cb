"""Attention maps and filmstrips: the numbers in them, and the command that draws them."""

from __future__ import annotations

import golden
import pytest
import torch
from PIL import Image

import fastdit
from fastdit import cli, reference
from fastdit.digits import load_digits_model, weights_path
from fastdit.embeddings import rope_2d
from fastdit.flow import load_transport
from fastdit.inspection import Frame, attention_map, attention_maps, trajectory


@pytest.mark.parametrize("tokens", [3, 8, 9, 20])
@pytest.mark.parametrize("rope", [False, True])
def test_an_attention_map_is_the_softmax_of_the_scores(tokens, rope):
    qkv = torch.randn(2, tokens, 3 * 16, generator=torch.Generator().manual_seed(0))
    q, k, _v = reference.split_heads(qkv, 2)
    options = {}
    if rope:
        cos, sin = rope_2d(8, (1, tokens))
        options["rope"] = cos, sin
        q, k = (x * cos + reference.rotate(x, True) * sin for x in (q, k))
    expected = torch.softmax(q @ k.mT / 8**0.5, -1)
    torch.testing.assert_close(attention_map(qkv, 2, **options), expected)


@pytest.mark.parametrize(
    ("design", "tokens"),
    [
        ({}, 16),
        ({"conditioning": "in_context"}, 18),
        ({"conditioning": "cross_attention", "qk_norm": "layer"}, 16),
        ({"qk_norm": "rms", "rope": True, "positions": "none"}, 16),
    ],
)
def test_the_maps_are_those_of_the_call(design, tokens):
    """P·V through the projection is the block's attention."""
    sizes = {"hidden_size": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
    model = fastdit.DiT(input_size=8, **sizes, **design)
    golden.set_reference_weights(model, 1, std=0.3)
    model.eval()
    inputs: list = []
    for block in model.blocks:
        block.attn.register_forward_hook(lambda _m, args, out: inputs.append((args[0], out)))
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    maps = attention_maps(model, Frame(250.0, x, x), torch.tensor([0, 2, 4]))
    assert maps.shape == (2, 3, 2, tokens, tokens)
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 3, 2, tokens))
    assert len(inputs) == 2
    for block, weights, (given, out) in zip(model.blocks, maps, inputs, strict=True):
        values = reference.split_heads(block.attn.qkv(given), 2)[2]
        expected = block.attn.proj((weights @ values).transpose(1, 2).flatten(2))
        torch.testing.assert_close(out, expected)
    attention_maps(model, Frame(0.0, x, x), torch.tensor([0, 2, 4]))
    assert len(inputs) == 4  # our hooks stay, the maps' own are gone
    assert not model.blocks[0].attn._forward_pre_hooks


@pytest.mark.parametrize("objective", ["diffusion", "flow"])
def test_a_trajectory_ends_in_the_sample(objective):
    model = load_digits_model(objective=objective)
    transport = load_transport(weights_path(objective))
    solver = "ddim" if transport is None else "euler"
    options = {"steps": 10, "solver": solver, "seed": 0, "cfg_scale": 2.0, "transport": transport}
    frames = trajectory(model, [3, 8], **options)
    assert len(frames) == 11
    assert torch.equal(frames[-1].x, fastdit.sample(model, [3, 8], **options))
    times = [frame.time for frame in frames]
    assert times == sorted(times, reverse=transport is None)
    assert times[0] == (999 if transport is None else 0)
    # Predictions come closer to the sample all the way, and the last one is it.
    away = [float((frame.data - frames[-1].x).square().mean()) for frame in frames]
    assert away[-2] < 1e-10 < away[5] < away[1]


def test_the_command(tmp_path, capsys):
    out = tmp_path / "a.png"
    common = ["inspect", "--steps", "4", "--out", str(out)]
    cli.main([*common, "--blocks", "0,2", "--heads", "1", "--query", "0,3", "--at", "1"])
    assert f"wrote {out}" in capsys.readouterr().out.replace("\n", "")
    few = Image.open(out).size
    cli.main(common)
    assert Image.open(out).size > few
    strip = ["--filmstrip", "--frames", "3", "--classes", "1,2"]
    for ckpt in ("digits", "digits-flow"):
        cli.main([*common, *strip, "--ckpt", ckpt])
        assert Image.open(out).size == (34 + 3 * 66 + 2, 20 + 2 * 66 + 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--blocks", "3"], "--blocks: got .3., allowed is 0 to 2"),
        (["--heads", "4"], "--heads: got .4., allowed is 0 to 3"),
        (["--query", "4,0"], "--query: got .4, 0., allowed is row,column in 4x4"),
        (["--query", "1"], "--query: got .1."),
        (["--at", "2"], "--at: got 2.0, allowed is 0 to 1"),
        (["--frames", "0"], "--frames: got 0"),
        (["--out", "x.gif"], "--out: got 'x.gif', allowed is a .png file"),
        (["--solver", "heun"], "solver: got 'heun', allowed is 'ddpm'"),
    ],
)
def test_mistakes(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        cli.main(["inspect", "--steps", "2", *options])
