"""Every design: the paper's figures, PyTorch's own blocks, and one matrix of what all must do."""

from __future__ import annotations

import copy
import random
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from designs import TINY, VARIANTS, inputs, tiny
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastdit
from fastdit import cli, designs
from fastdit.commands.models import PAPER_DESIGNS, PAPER_SIZES
from fastdit.designs import Design

every = pytest.mark.parametrize("name", VARIANTS)


@pytest.fixture(scope="module")
def models():
    """A model of each variant; whoever changes one copies it."""
    return {name: tiny(**options) for name, options in VARIANTS.items()}


def meta(name: str, **options) -> fastdit.DiT:
    with torch.device("meta"):
        return fastdit.DiT_models[name](**options)


# The paper's figures


@pytest.mark.parametrize("size", PAPER_SIZES)
def test_gflops_of_the_twelve_models(size):
    for patch, paper in PAPER_SIZES[size][1].items():
        found = meta(f"DiT-{size}/{patch}").flops() / 1e9
        assert found == pytest.approx(paper, rel=2.5e-4, abs=0.0055)  # printed with two decimals


@pytest.mark.parametrize("conditioning", PAPER_DESIGNS)
def test_parameters_and_gflops_of_the_four_designs(conditioning):
    model = meta("DiT-XL/2", conditioning=conditioning)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    millions, gflops = PAPER_DESIGNS[conditioning]
    assert round(count / 1e6) == millions
    assert model.flops() / 1e9 == pytest.approx(gflops, rel=2e-4)


def test_the_command_prints_our_figures_beside_the_papers(capsys):
    cli.main(["models"])
    lines = [line.split("│") for line in capsys.readouterr().out.splitlines()]
    rows = {cells[1].strip(): [c.strip() for c in cells[2:6]] for cells in lines if len(cells) > 5}
    assert rows["DiT-XL/2"] == ["674.8", "675", "118.62", "118.64"]
    assert rows["cross_attention"] == ["598.0", "598", "137.60", "137.62"]
    assert rows["in_context"] == ["449.2", "449", "119.35", "119.37"]
    assert {"preset literal", "preset lightningdit"} < set(rows)


def test_gflops_of_512_pixels():
    assert meta("DiT-XL/2", input_size=64).flops() / 1e9 == pytest.approx(524.60, rel=2e-4)
    assert meta("DiT-XL/2", any_size=True).flops(64) == meta("DiT-XL/2", input_size=64).flops()


@every
def test_flops_are_what_pytorch_counts(name):
    """PyTorch counts two a multiply-add; without values it runs attention as two products."""
    with torch.device("meta"):
        model = fastdit.DiT(**{**TINY, **VARIANTS[name]})
    args = [None if a is None else a.to("meta") for a in inputs(model, 1)]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*args)
    assert counter.get_total_flops() == 2 * model.flops()


# PyTorch's own blocks


def copy_attention(theirs: nn.MultiheadAttention, qkv_weight, qkv_bias, proj) -> None:
    theirs.in_proj_weight.copy_(qkv_weight)
    theirs.in_proj_bias.copy_(qkv_bias)
    theirs.out_proj.load_state_dict(proj.state_dict())


@torch.no_grad()
def test_in_context_blocks_are_pytorchs_encoder_layers(models):
    model = models["in_context"]
    gelu = partial(F.gelu, approximate="tanh")
    options = {"activation": gelu, "batch_first": True, "norm_first": True, "layer_norm_eps": 1e-6}
    x, t, y = inputs(model)
    h = torch.cat([model.x_embedder(x, model.pos_embed), model.condition(t, y)], 1)
    for block in model.blocks:
        theirs = nn.TransformerEncoderLayer(24, 2, 96, dropout=0.0, **options).eval()
        attn, mlp = block.attn, block.mlp
        copy_attention(theirs.self_attn, attn.qkv.weight, attn.qkv.bias, attn.proj)
        pairs = {"linear1": mlp.fc1, "linear2": mlp.fc2, "norm1": block.norm1, "norm2": block.norm2}
        for layer, ours in pairs.items():
            getattr(theirs, layer).load_state_dict(ours.state_dict())
        h = theirs(h)
    h = F.layer_norm(h, (24,), *model.final_layer.norm_final.parameters(), 1e-6)
    rows = model.final_layer.linear(h[:, :4])
    torch.testing.assert_close(model(x, t, y), model.unpatchify(rows), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_cross_attention_blocks_are_pytorchs_decoder_layers(models):
    model = models["cross_attention"]
    gelu = partial(F.gelu, approximate="tanh")
    options = {"activation": gelu, "batch_first": True, "norm_first": True, "layer_norm_eps": 1e-6}
    x, t, y = inputs(model)
    h, c = model.x_embedder(x, model.pos_embed), model.condition(t, y)
    assert c.shape == (2, 2, 24)
    for block in model.blocks:
        theirs = nn.TransformerDecoderLayer(24, 2, 96, dropout=0.0, **options).eval()
        attn, cross, mlp = block.attn, block.cross_attn, block.mlp
        copy_attention(theirs.self_attn, attn.qkv.weight, attn.qkv.bias, attn.proj)
        weight = torch.cat([cross.q.weight, cross.kv.weight])
        bias = torch.cat([cross.q.bias, cross.kv.bias])
        copy_attention(theirs.multihead_attn, weight, bias, cross.proj)
        pairs = {"linear1": mlp.fc1, "linear2": mlp.fc2, "norm1": block.norm1}
        pairs |= {"norm2": block.norm_cross, "norm3": block.norm2}
        for layer, ours in pairs.items():
            getattr(theirs, layer).load_state_dict(ours.state_dict())
        h = theirs(h, c)
    h = F.layer_norm(h, (24,), *model.final_layer.norm_final.parameters(), 1e-6)
    expected = model.unpatchify(model.final_layer.linear(h))
    torch.testing.assert_close(model(x, t, y), expected, rtol=1e-4, atol=1e-4)


def rotated(x, cos, sin):
    """`(B, H, N, d)` with channels 2i, 2i + 1 turned, by complex numbers."""
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    turned = turned * torch.complex(cos[:, ::2], sin[:, ::2])
    return torch.view_as_real(turned).flatten(-2)


@torch.no_grad()
def test_lightningdit_is_its_layers_one_by_one(models):
    """RMSNorm, QK-norm, rotation, SwiGLU and modulation from PyTorch's own functions."""
    model = models["lightningdit"]
    x, t, y = inputs(model)
    h, c = model.x_embedder(x, model.pos_embed), model.condition(t, y)
    cos, sin = model.feat_rope.freqs_cos, model.feat_rope.freqs_sin

    def modulated(norm, h, shift, scale):
        normed = F.rms_norm(h, (24,), norm.weight, 1e-6)
        return normed * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)

    for block in model.blocks:
        parts = block.adaLN_modulation(c).chunk(6, 1)
        qkv = block.attn.qkv(modulated(block.norm1, h, *parts[:2]))
        q, k, v = qkv.view(2, 4, 3, 2, 12).permute(2, 0, 3, 1, 4)
        q, k = (
            rotated(n(z), cos, sin) for n, z in ((block.attn.q_norm, q), (block.attn.k_norm, k))
        )
        out = ((q @ k.mT) * 12**-0.5).softmax(-1) @ v
        h = h + parts[2].unsqueeze(1) * block.attn.proj(out.transpose(1, 2).flatten(2))
        gate, value = block.mlp.w12(modulated(block.norm2, h, *parts[3:5])).chunk(2, -1)
        h = h + parts[5].unsqueeze(1) * block.mlp.w3(F.silu(gate) * value)
    final = model.final_layer
    h = final.linear(modulated(final.norm_final, h, *final.adaLN_modulation(c).chunk(2, 1)))
    torch.testing.assert_close(model(x, t, y), model.unpatchify(h), rtol=1e-4, atol=1e-4)


def test_lightningdits_tensors():
    """LightningDiT-XL/1's names and shapes, as its released configuration builds them."""
    with torch.device("meta"):
        model = fastdit.DiT(
            16, 1, 32, learn_sigma=False, **fastdit.presets["lightningdit"], qk_norm="rms"
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes["feat_rope.freqs_cos"] == shapes["feat_rope.freqs_sin"] == (256, 72)
    assert shapes["pos_embed"] == (1, 256, 1152)
    assert shapes["final_layer.norm_final.weight"] == (1152,)
    assert {n.removeprefix("blocks.3."): s for n, s in shapes.items() if "blocks.3." in n} == {
        "norm1.weight": (1152,),
        "norm2.weight": (1152,),
        "attn.qkv.weight": (3456, 1152),
        "attn.qkv.bias": (3456,),
        "attn.q_norm.weight": (72,),
        "attn.k_norm.weight": (72,),
        "attn.proj.weight": (1152, 1152),
        "attn.proj.bias": (1152,),
        "mlp.w12.weight": (6144, 1152),
        "mlp.w12.bias": (6144,),
        "mlp.w3.weight": (1152, 3072),
        "mlp.w3.bias": (1152,),
        "adaLN_modulation.1.weight": (6912, 1152),
        "adaLN_modulation.1.bias": (6912,),
    }


@torch.no_grad()
def test_the_literal_document(models):
    """h = AdaLN(x) + branch(AdaLN(x)) with AdaLN(x) = γ∘LN(x) + β, γ and β of MLPs on [t, y]."""
    model = models["literal"]
    x, t, y = inputs(model)
    c = torch.cat([model.t_embedder(t), model.y_embedder(y, False)], 1)

    def adaln(layer, h, scale, shift):
        mlps = layer.adaLN_modulation
        return mlps[scale](c).unsqueeze(1) * F.layer_norm(h, (24,), eps=1e-6) + mlps[shift](
            c
        ).unsqueeze(1)

    h = model.x_embedder(x, model.pos_embed)
    for block in model.blocks:
        h = adaln(block, h, "scale_msa", "shift_msa")
        h = h + block.attn(h)
        h = adaln(block, h, "scale_mlp", "shift_mlp")
        h = h + block.mlp(h)
    rows = model.final_layer.linear(adaln(model.final_layer, h, "scale", "shift"))
    torch.testing.assert_close(model(x, t, y), model.unpatchify(rows), rtol=1e-4, atol=1e-4)
    assert model.t_embedder.mlp[0].in_features == 128
    assert [type(m) for m in model.blocks[0].adaLN_modulation["scale_msa"]] == [
        nn.Linear,
        nn.SiLU,
        nn.Linear,
    ]


# What all must do


@every
def test_starts_as_zero_and_learns_at_once(name):
    """The initialised model predicts nothing, and its last layer has a gradient."""
    torch.manual_seed(0)
    model = fastdit.DiT(**{**TINY, **VARIANTS[name]})
    out = model(*inputs(model))
    assert out.abs().max() == 0
    (out - 1).square().sum().backward()
    assert model.final_layer.linear.weight.grad.abs().max() > 0


@every
def test_conditioning_rows_replace_the_condition(models, name):
    model = models[name]
    x, t, y = inputs(model)
    with torch.no_grad():
        rows = model.conditioning(t, y)
        assert rows.shape == (2, sum(model.rows_widths))
        expected = model(x, t, y)
        torch.testing.assert_close(model(x, None, None, conditioning=rows), expected)
        with pytest.raises(ValueError, match="conditioning: got"):
            model(x, None, None, conditioning=torch.cat([rows, rows], 1))
    used = [p for n, p in model.named_parameters() if p.requires_grad and n != "y_embedder.null"]
    wanted = torch.autograd.grad(model(x, t, y).square().sum(), used)
    given = model(x, None, None, conditioning=model.conditioning(t, y))
    found = torch.autograd.grad(given.square().sum(), used)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@every
def test_every_parameter_learns_with_and_without_checkpointing(models, name):
    model = copy.deepcopy(models[name]).train()
    x, t, y = inputs(model)
    drop = None if model.y_embedder is None else torch.tensor([1, 0])
    if drop is not None and model.y_embedder.dropout_prob == 0:
        model.eval()
        drop = None
    gradients = []
    for enabled in (False, True):
        model.gradient_checkpointing = enabled
        model.zero_grad()
        model(x, t, y, drop).square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for parameter, gradient in gradients[0].items():
        assert gradient is not None, parameter
        assert gradient.isfinite().all(), parameter
        # A constant added to every key changes no softmax.
        assert gradient.abs().max() > 0 or parameter.endswith("k_norm.bias"), parameter
        torch.testing.assert_close(gradients[1][parameter], gradient, rtol=1e-5, atol=1e-5)


@every
def test_kernels_and_eager_pytorch_agree(models, name):
    model = models[name]
    with torch.no_grad():
        out = model(*inputs(model))
        with fastdit.backend("reference"):
            torch.testing.assert_close(model(*inputs(model)), out, rtol=1e-4, atol=1e-4)
    assert out.shape == (2, model.out_channels, *model.input_size)


@every
def test_autocast_keeps_the_stream_in_float32(models, name):
    model = models[name]
    x, t, y = inputs(model)
    seen = []
    hook = model.blocks[1].register_forward_hook(lambda m, args, out: seen.append(out[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, t, y)
    hook.remove()
    expected = torch.float32 if model.design.residual == "x" else out.dtype
    assert seen in ([torch.float32], [expected])
    exact = model(x, t, y)
    assert 0 < (out.float() - exact).abs().max() < 0.15 * exact.abs().max()


@every
def test_guidance_with_the_null_condition(models, name):
    model = models[name]
    x, t, y = inputs(model)
    if model.y_embedder is None or model.y_embedder.dropout_prob == 0:
        with pytest.raises(ValueError, match="null_condition"):
            model.null_condition(2)
        return
    null = model.null_condition(2)
    with torch.no_grad():
        dropped = model(x, t, y, force_drop_ids=torch.tensor([1, 1]))
        torch.testing.assert_close(model(x, t, null), dropped)
        doubled = (torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null]))
        channels = model.in_channels
        out = model.forward_with_cfg(*doubled, 2.0, guided_channels=channels)[:2, :channels]
        expected = dropped + 2 * (model(x, t, y) - dropped)
    torch.testing.assert_close(out, expected[:, :channels], rtol=1e-4, atol=1e-4)


@every
@torch.no_grad()
def test_patching_leaves_them_alone_and_says_so(models, name):
    model, args = models[name], inputs(models[name])
    expected = model(*args)
    handle = fastdit.patch(model)
    report = handle.report()
    assert not report.replaced
    assert [(site.module, site.reason) for site in report.skipped] == [
        ("DiT", "runs the ops already")
    ]
    assert torch.equal(model(*args), expected)
    handle.undo()


@every
@torch.no_grad()
def test_the_native_forward_runs_them_or_says_why_not(models, name):
    model, args = models[name], inputs(models[name])
    native = fastdit.NativeForward(model)
    torch.testing.assert_close(native(*args), model(*args), rtol=1e-4, atol=1e-4)
    if native.reason is not None and "compiler" not in native.reason:
        field = native.reason.split()[0]
        assert getattr(model.design, field) != getattr(designs.PUBLISHED, field), native.reason


@every
def test_samples_of_every_design(models, name):
    model = models[name]
    _x, _t, y = inputs(model)
    classes = 2 if y is None else y
    scale = 2.0 if model.guidable else 1.0
    out = fastdit.sample(model, classes, steps=3, solver="dpm++", seed=0, cfg_scale=scale)
    assert out.shape == (2, model.in_channels, *model.input_size)
    assert out.isfinite().all()
    if not model.guidable:
        with pytest.raises(ValueError, match="cfg_scale: got 2"):
            fastdit.sample(model, classes, steps=3, cfg_scale=2)


def test_wrong_conditions_of_samples_are_named(models):
    for name, classes in (("unconditional", [1]), ("vectors", [1, 2]), ("signal", 3)):
        with pytest.raises(ValueError, match="classes: got"):
            fastdit.sample(models[name], classes, steps=2, cfg_scale=1)


@every
def test_compiles_whole(models, name):
    torch.compiler.reset()
    model = models[name]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    args = inputs(model)
    torch.testing.assert_close(compiled(*args), model(*args), rtol=1e-4, atol=1e-4)


def random_options(rng: random.Random) -> dict:
    options = {name: rng.choice(values) for name, values in designs.VALUES.items()}
    options |= {"num_classes": rng.choice([0, 5]), "condition_dim": rng.choice([0, 0, 3])}
    options["input_size"] = rng.choice([4, (4, 8), (8,)])
    options["base_size"] = rng.choice([None, None, 8])
    changed = rng.sample(sorted(options), 5)
    return {name: options[name] for name in changed}


def test_every_combination_works_or_names_what_is_wrong():
    rng, built = random.Random(0), 0
    for _ in range(40):
        options = random_options(rng)
        try:
            model = tiny(**options)
        except ValueError as error:
            name, _, rest = str(error).partition(": got ")
            assert name in (*designs.NAMES, "hidden_size"), options
            assert ", allowed is " in rest, options
            continue
        built += 1
        x, t, y = inputs(model, 1)
        with torch.no_grad():
            rows = model.conditioning(t, y)
            torch.testing.assert_close(model(x, t, y), model(x, None, conditioning=rows))
    assert built > 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"conditioning": "film"}, "conditioning: got 'film', allowed is 'adaln_zero', 'adaln'"),
        ({"rope": 1}, "rope: got 1, allowed is False, True"),
        ({"frequency_dim": 33}, "frequency_dim: got 33, allowed is an even int >= 2"),
        ({"condition_dim": -1}, "condition_dim: got -1, allowed is an int >= 0"),
        ({"condition_dim": 4}, "condition_dim: got 4 with num_classes=5, allowed is num_classes=0"),
        ({"conditioning": "in_context", "modulation": "mlp"}, "modulation: got 'mlp' with cond"),
        ({"positions": "sincos_2d", "input_size": (8,)}, "positions: got 'sincos_2d' for a signal"),
        ({"positions": "learned_1d", "position_scaling": "extrapolate"}, "position_scaling: got"),
        ({"rope": True, "hidden_size": 12}, "rope: got True with hidden_size/num_heads = 6"),
        ({"patch_size": (2, 3)}, r"patch_size: got \(2, 3\), allowed is a divisor of input_size"),
        ({"patch_size": (2,)}, r"patch_size: got \(2,\), allowed is a positive int or two of them"),
        ({"base_size": 5}, r"base_size: got 5, allowed is a multiple of the patch \(2, 2\)"),
        ({"input_size": ()}, r"input_size: got \(\), allowed is a positive int or one or two"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)


def test_options_that_there_are_not():
    with pytest.raises(TypeError, match="gate: not an argument of DiT; allowed are conditioning"):
        tiny(gate=True)
    assert Design().options() == {}
    assert set(fastdit.presets) == {"published", "literal", "lightningdit"}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("unconditional", lambda x, t, y: (x, t, t), r"y: got \(2,\), allowed is None"),
        ("vectors", lambda x, t, y: (x, t, t), r"y: got \(2,\), allowed is \(2, 7\)"),
        ("vectors", lambda x, t, y: (x, t, None), r"y: got None, allowed is \(2, 7\)"),
        ("signal", lambda x, t, y: (x[..., None], t, y), r"x: got .* \(B, 4, 12\)"),
        ("signal", lambda x, t, y: (x[..., :9], t, y), r"x: got \(2, 4, 9\)"),
        ("any_size", lambda x, t, y: (x[..., :3], t, y), r"x: got .*\(B, 4, h·2, w·2\)"),
        ("spectrogram", lambda x, t, y: (x.mT, t, y), r"x: got \(2, 1, 6, 8\)"),
    ],
)
def test_wrong_inputs_are_named(models, name, change, message):
    with pytest.raises(ValueError, match=message):
        models[name](*change(*inputs(models[name])))


def test_vectors_and_models_without_null_refuse_dropping(models):
    x, t, y = inputs(models["vectors_no_null"])
    with pytest.raises(ValueError, match="force_drop_ids"):
        models["vectors_no_null"](x, t, y, torch.tensor([1, 0]))
    x, t, y = inputs(models["unconditional"])
    with pytest.raises(ValueError, match="force_drop_ids"):
        models["unconditional"](x, t, y, torch.tensor([1, 0]))


def test_vectors_are_dropped_as_labels_are(models):
    model = copy.deepcopy(models["vectors"]).train()
    model.y_embedder.dropout_prob = 0.5
    y = torch.randn(40, 7)
    torch.manual_seed(3)
    embedded = model.y_embedder(y, train=True)
    torch.manual_seed(3)
    drop = torch.rand(40) < 0.5
    expected = model.y_embedder.mlp(torch.where(drop[:, None], model.y_embedder.null, y))
    assert torch.equal(embedded, expected)
    assert 5 < drop.sum() < 35


@every
def test_runs_on_meta_and_empty_batches(models, name):
    with torch.no_grad():
        assert models[name](*inputs(models[name], 0)).shape[0] == 0
    with torch.device("meta"):
        model = fastdit.DiT(**{**TINY, **VARIANTS[name]})
    args = [None if a is None else a.to("meta") for a in inputs(models[name])]
    assert model(*args).shape == (2, model.out_channels, *model.input_size)
