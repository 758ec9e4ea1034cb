"""Raw research code: DiT, SiT, REPA, fast-DiT, LightningDiT, patched against themselves.

The bounds are in units in the last place of a tensor's largest entry, float32, two blocks deep.
"""

from __future__ import annotations

import copy

import compare
import golden
import pytest
import research
import torch

import fastdit
from fastdit.patching import native

OUTPUT_ULPS, GRADIENT_ULPS = 8, 32
BATCH = 64  # enough elements for the compiled kernels to run in training too

CASES = [(name, level) for name in research.FAMILIES for level in ("exact", "fast")]


def make(name="DiT", **changes):
    torch.manual_seed(0)
    model = research.FAMILIES[name](**{"hidden_size": 64, **changes})
    return compare.randomise(model).eval()


def caller(model, batch=2):
    """The call of a model on inputs of its dtype."""
    args = research.inputs(model, batch)

    def call(model):
        dtype = model.pos_embed.dtype
        return model(*(a.to(dtype) if a.is_floating_point() else a for a in args))

    return call


@pytest.mark.parametrize(("name", "level"), CASES)
def test_outputs_and_every_gradient(name, level):
    model = make(name).train()
    call = caller(model, BATCH)
    theirs = compare.run(model, call)
    before = compare.state(model)
    handle = fastdit.patch(model, level)
    assert compare.state(model) == before
    out, grad = compare.worst(compare.run(model, call), theirs)
    assert out <= OUTPUT_ULPS
    assert grad <= GRADIENT_ULPS
    handle.undo()
    assert all(torch.equal(v, theirs[k]) for k, v in compare.run(model, call).items())
    assert compare.state(model) == before
    assert not any("forward" in m.__dict__ for m in model.modules())


@pytest.mark.parametrize(("name", "level"), CASES)
def test_no_site_is_skipped_without_a_reason(name, level):
    report = fastdit.patch(make(name), level).report()
    skipped = {site.rule or site.module: site.reason for site in report.skipped}
    expected = {}
    if level == "fast" and name in ("REPA", "fast-DiT"):
        expected["class-conditional model"] = {
            "REPA": "its forward gives 2 results where 1 were expected",
            "fast-DiT": "its forward checkpoints activations; its blocks are replaced one by one",
        }[name]
    assert skipped == expected
    rules = {site.rule for site in report.replaced}
    least = {"patch embedding", "adaLN-Zero block", "packed attention", "final layer"}
    assert rules >= least
    for rule in ("rotary positions", "SwiGLU feed-forward"):
        assert (rule in rules) == ("Lightning" in name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["DiT", "LightningDiT", "LightningDiT, LayerNorm"])
@torch.no_grad()
def test_low_precision_is_nearer_to_float64(name, dtype):
    model = make(name).to(dtype)
    call = caller(model)
    exact = compare.in_float64(model, call)
    theirs = compare.error(model, call, exact)
    with fastdit.patched(model, "fast"):
        assert compare.error(model, call, exact) < theirs


@pytest.mark.parametrize("name", ["DiT", "LightningDiT"])
def test_autocast(name):
    model = make(name).train()
    args = research.inputs(model, BATCH)

    def call(model):
        with torch.autocast("cpu", torch.bfloat16):
            return model(*args)

    theirs = compare.run(model, call)
    with fastdit.patched(model, "fast"):
        ours = compare.run(model, call)
    assert ours["output 0"].dtype == theirs["output 0"].dtype
    assert {n: g.dtype for n, g in ours.items()} == {n: g.dtype for n, g in theirs.items()}
    exact = compare.in_float64(model, caller(model, BATCH))[0].detach()
    errors = [float((v["output 0"] - exact).norm()) for v in (ours, theirs)]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("level", ["exact", "fast"])
def test_a_patched_model_gives_the_published_outputs(level):
    data = golden.load("dit_patch4")
    config = golden.config(data, "config")
    source = fastdit.DiT(**config)
    golden.set_reference_weights(source, int(data["weight_seed"]))
    model = research.DiT(**config).eval()
    model.load_state_dict(source.state_dict())
    args = [torch.from_numpy(data[name]) for name in ("x", "t", "y")]
    with torch.no_grad():
        assert golden.relative_error(model(*args), data["out"]) < 2e-5  # the re-creation is one
        with fastdit.patched(model, level) as handle:
            assert len(handle.report().replaced) > 2 * config["depth"]
            assert golden.relative_error(model(*args), data["out"]) < 2e-5


def test_a_gelu_that_is_not_tanh_stays():
    model = make()
    model.blocks[0].mlp.act.approximate = "none"
    report = fastdit.patch(model).report()
    (skipped,) = report.skipped
    assert skipped.name == "blocks.0.mlp"
    assert "bias_gelu is the tanh-GELU" in skipped.reason


def test_dropout_in_attention_runs_the_original_in_training():
    model = make().train()
    for block in model.blocks:
        block.attn.attn_drop.p = 0.5
        block.mlp.drop1.p = 0.5
    call = caller(model)
    theirs = compare.run(model, call)
    with fastdit.patched(model):
        out, grad = compare.worst(compare.run(model, call), theirs)
    assert out <= OUTPUT_ULPS
    assert grad <= GRADIENT_ULPS


class Fork(research.Block):
    """A fork with the same children that computes something else."""

    def forward(self, x, c):
        return super().forward(x, c) + 1e-3 * self.norm1(x)


def test_a_fork_with_another_forward_is_left_alone():
    model = make()
    fork = Fork(64, 4)
    fork.load_state_dict(model.blocks[1].state_dict())
    model.blocks[1] = fork
    for level in ("exact", "fast"):
        report = fastdit.patch(model, level).report()
        (why,) = [s.reason for s in report.skipped if s.name == "blocks.1"]
        assert "its forward gives a relative difference" in why
        assert "blocks.0" in [s.name for s in report.replaced]
        assert level == "exact" or "" in [s.name for s in report.skipped]


@torch.no_grad()
def test_checkpointing_switched_on_later_keeps_the_models_own_forward():
    model = make("LightningDiT")
    model.use_checkpoint = False
    seen = []
    fastdit.patch(model, "fast")
    original = type(model).forward
    type(model).forward = lambda self, *a: seen.append(1) or original(self, *a)
    try:
        caller(model)(model)
        assert not seen
        model.use_checkpoint = True
        caller(model)(model)
        assert seen == [1]
    finally:
        type(model).forward = original


@torch.no_grad()
def test_a_dit_to_the_letter_is_one_compiled_call():
    model = make()
    call = caller(model)
    expected = call(model)
    handle = fastdit.patch(model, "fast")
    assert compare.ulps(call(model), expected) <= 2 * OUTPUT_ULPS
    run = native._runs[model][1]
    assert run.reason is None
    assert "native" in run.explain()
    model.blocks[0].mlp.fc1.weight.mul_(2)  # seen, and packed again
    changed = call(model)
    handle.undo()
    assert compare.ulps(changed, call(model)) <= 2 * OUTPUT_ULPS
    assert not torch.allclose(changed, expected, atol=1e-3)


@torch.no_grad()
def test_eight_bits_are_asked_for_by_name():
    model = make()
    call = caller(model)
    expected = call(model)
    handle = fastdit.patch(model, "fast", quantize="int8")
    assert "int8" in str(handle.report())
    error = (call(model) - expected).norm() / expected.norm()
    assert 1e-5 < error < 0.02  # eight bits, and not much else
    twin = copy.deepcopy(model)
    assert torch.equal(caller(twin)(twin), call(model))
    handle.undo()
    assert torch.equal(call(model), expected)


@pytest.mark.parametrize(
    ("name", "level", "how", "allowed"),
    [
        ("DiT", "fast", "int4", "None or 'int8'"),
        ("DiT", "exact", "int8", "where no whole model is replaced"),
        ("LightningDiT", "fast", "int8", "that is not a DiT to the letter"),
    ],
)
def test_eight_bits_that_cannot_be_are_refused(name, level, how, allowed):
    model = make(name)
    with pytest.raises(ValueError, match=f"quantize: got '{how}', allowed is .*{allowed}"):
        fastdit.patch(model, level, quantize=how)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("change", ["eps", "hook", "lora", "act"])
@torch.no_grad()
def test_a_model_that_is_not_a_dit_to_the_letter_runs_op_by_op(change):
    model = make()
    call = caller(model)
    with fastdit.patched(model, "fast"):
        call(model)
        seen = []
        if change == "eps":
            model.blocks[1].norm2.eps = 1e-2
        elif change == "hook":
            model.blocks[0].attn.qkv.register_forward_hook(lambda *_: seen.append(1))
        elif change == "lora":
            linear = model.final_layer.linear
            model.final_layer.linear = torch.nn.Sequential(linear, torch.nn.Tanh())
        else:
            model.blocks[0].mlp.act = torch.nn.ReLU()
        ours = call(model)
        assert len(seen) == (change == "hook")
    assert compare.ulps(ours, call(model)) <= OUTPUT_ULPS
