"""The handle: report, undo, nesting, hooks; and what a patched model survives."""

from __future__ import annotations

import copy
import inspect
import io

import compare
import pytest
import research
import torch
from test_research import caller, make
from torch import nn

import fastdit
from fastdit import patching
from fastdit.patching.table import RULES


def test_the_report_is_a_table_and_data():
    model = make("DiT")
    for block in model.blocks:
        block.mlp.act.approximate = "none"
    report = fastdit.patch(model).report()
    text = str(report)
    assert "blocks.*.attn" in text
    assert "bias_gelu is the tanh-GELU" in text
    assert {site.name for site in report.replaced} >= {"blocks.0", "blocks.1", "final_layer"}
    assert all(site.ops and site.rule for site in report.replaced)
    assert [site.name for site in report.skipped] == ["blocks.0.mlp", "blocks.1.mlp"]
    assert report.level == "exact"


def test_patching_twice_replaces_nothing_twice():
    model = make()
    first = fastdit.patch(model)
    forwards = {n: m.__dict__.get("forward") for n, m in model.named_modules()}
    second = fastdit.patch(model)
    assert second.report().replaced == first.report().replaced
    assert {n: m.__dict__.get("forward") for n, m in model.named_modules()} == forwards
    second.undo()
    assert model.blocks[0].__dict__["forward"] is forwards["blocks.0"]
    first.undo()
    first.undo()
    assert "forward" not in model.blocks[0].__dict__


def test_levels_nest():
    model = make()
    handle = fastdit.patch(model, "exact")
    with fastdit.patched(model, "fast"):
        assert "forward" in model.__dict__
    assert "forward" not in model.__dict__
    assert "forward" in model.blocks[0].__dict__
    handle.undo()


def test_undo_refuses_where_something_was_put_on_top():
    model = make()
    handle = fastdit.patch(model)
    ours = model.blocks[0].forward
    model.blocks[0].forward = lambda *args: ours(*args)
    with pytest.raises(RuntimeError, match=r"undo: blocks\.0 has another forward"):
        handle.undo()
    assert "forward" in model.blocks[1].__dict__
    model.blocks[0].forward = ours
    handle.undo()
    assert "forward" not in model.blocks[1].__dict__


def test_a_forward_put_there_by_a_hook_is_left_alone():
    model = make()
    model.blocks[0].forward = lambda *args: research.Block.forward(model.blocks[0], *args)
    skipped = {site.name: site.reason for site in fastdit.patch(model).report().skipped}
    assert "patch before adding hooks" in skipped["blocks.0"]
    assert set(skipped) == {"blocks.0", "blocks.0.norm1", "blocks.0.norm2"}


def test_patched_restores_after_an_error():
    model = make()
    with pytest.raises(ZeroDivisionError), fastdit.patched(model):
        raise ZeroDivisionError
    assert not any("forward" in m.__dict__ for m in model.modules())


@torch.no_grad()
@pytest.mark.parametrize("child", ["blocks.0", "blocks.1.norm2", "blocks.0.mlp.act", "final_layer"])
def test_hooks_see_what_they_saw(child):
    model = make()
    call = caller(model)

    def watch():
        seen = []
        hook = model.get_submodule(child).register_forward_hook(
            lambda module, args, out: seen.append((args[0].clone(), out.clone()))
        )
        call(model)
        hook.remove()
        (pair,) = seen
        return pair

    theirs = watch()
    with fastdit.patched(model, "fast"):
        ours = watch()
    assert all(compare.ulps(a, b) < 16 for a, b in zip(ours, theirs, strict=True))


@torch.no_grad()
def test_a_layer_swapped_after_patching_is_used():
    model = make()
    call = caller(model)
    with fastdit.patched(model, "fast"):
        plain = call(model)
        model.blocks[0].mlp.fc1 = nn.Sequential(model.blocks[0].mlp.fc1, nn.Identity())  # as LoRA
        assert compare.ulps(call(model), plain) < 16
        model.blocks[1].norm1 = nn.LayerNorm(64, eps=1e-2)
        swapped = call(model)
    assert torch.allclose(swapped, call(model), atol=1e-5)
    assert not torch.allclose(swapped, plain, atol=1e-3)


def test_signature_and_docstring_stay():
    model = make()
    before = inspect.signature(model.blocks[0].forward)
    fastdit.patch(model)
    assert inspect.signature(model.blocks[0].forward) == before


@pytest.mark.parametrize("level", ["exact", "fast"])
@torch.no_grad()
def test_copies_are_patched_and_apart(level):
    model = make()
    call = caller(model)
    expected = call(model)
    fastdit.patch(model, level)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    copies = [copy.deepcopy(model), torch.load(stored, weights_only=False)]
    for p in model.parameters():
        p.zero_()
    for other in copies:
        assert other.blocks[0].forward.args[0] is other.blocks[0]
        assert compare.ulps(call(other), expected) < 16
        patching.unpatch(other)
        assert torch.equal(call(other), expected)


@torch.no_grad()
def test_to_and_load_state_dict_after_patching():
    model, other = make(), compare.randomise(make(), seed=7)
    call = caller(model)
    expected = call(other)
    fastdit.patch(model, "fast")
    model.double().float().load_state_dict(other.state_dict())
    assert compare.ulps(call(model), expected) < 16
    model.to(torch.float64)
    assert compare.ulps(call(model), call(other.double())) < 1e4  # rotary and time are float32


@torch.no_grad()
def test_torch_compile_before_and_after():
    model = make(depth=1)
    call = caller(model)
    expected = call(model)
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert torch.equal(call_compiled(compiled, model), expected)
    with fastdit.patched(compiled) as handle:  # its guards notice
        assert handle.report().replaced
        assert compare.ulps(call_compiled(compiled, model), expected) < 16
        assert len(graphs) == 2
    assert torch.equal(call_compiled(compiled, model), expected)
    assert len(graphs) == 2


def call_compiled(compiled, model):
    return compiled(*research.inputs(model))


def test_wrong_arguments():
    with pytest.raises(ValueError, match="level: got 'medium', allowed are 'exact' and 'fast'"):
        fastdit.patch(make(), "medium")
    with pytest.raises(TypeError, match="model: got function"):
        fastdit.patch(make)
    with pytest.raises(TypeError, match=r"allowed is an nn\.Module in Python"):
        fastdit.patch(torch.jit.script(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="DataParallel"):
        fastdit.patch(nn.DataParallel(make()))


def test_fastdits_own_model_needs_nothing():
    model = fastdit.DiT(input_size=8, hidden_size=48, depth=1, num_heads=4)
    (site,) = fastdit.patch(nn.Sequential(model)).sites
    assert (site.name, site.reason) == ("0", "runs the ops already")


def test_a_norm_that_nothing_knows_is_said_to_be_unknown():
    class OddNorm(nn.Module):
        pass

    (site,) = fastdit.patch(nn.Sequential(OddNorm())).report().skipped
    assert site.reason == "no rule knows this normalisation"


def test_another_projects_class_of_the_same_name_is_left_alone():
    for name in {name for rule in RULES for name in getattr(rule.recognises, "names", ())}:
        foreign = type(name, (nn.Module,), {})()
        report = fastdit.patch(foreign, "fast").report()
        assert not report.replaced
        assert all(site.reason for site in report.skipped)


def test_meta_models_are_proved_without_their_weights():
    with torch.device("meta"):
        model = research.DiT()
    report = fastdit.patch(model, "fast").report()
    assert not report.skipped
    assert next(iter(model.parameters())).is_meta
