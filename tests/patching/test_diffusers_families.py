"""diffusers' Transformers, tiny and with random weights, patched against themselves.

Every op runs a kernel here (`backend("native")`), which attention, left to diffusers, does not
need. Bounds are in units in the last place of a tensor's largest entry, float32.
"""

from __future__ import annotations

import copy

import compare
import families
import pytest
import torch
from torch import nn

import fastdit
from fastdit.patching.leftover import UNEXPLAINED

OUTPUT_ULPS, GRADIENT_ULPS = 8, 32

LEFT_ALONE = (
    "attention stays with its processor, ",
    "belongs to the attention's processor",
    "its gates are channels of a convolution",
    "one kernel already; nothing around it was replaced that could take it in",
    "computes modulations, once a step; normalises nothing",
    "modulates without a normalisation, once a step",
    "embeds text and video together, once a step",
)
BLOCKS = {
    "DiT": 2, "PixArt-alpha": 2, "PixArt-Sigma": 2, "Latte": 2, "SD3": 2, "SD3.5": 2, "Flux": 2,
    "HunyuanDiT": 4, "Sana": 2, "CogVideoX": 2, "Wan": 2, "Wan 2.2": 2, "Lumina2": 4,
    "AuraFlow": 2, "Flux 2": 2, "Lumina-Next": 2, "ACE-Step": 2,
}  # fmt: skip


@pytest.mark.parametrize("name", families.FAMILIES)
def test_outputs_every_gradient_report_and_undo(name):
    model, call = families.make(name)
    model.train()
    theirs = compare.run(model, call)
    before = compare.state(model)
    handle = fastdit.patch(model, "fast")
    assert compare.state(model) == before
    with fastdit.backend("native"):
        ours = compare.run(model, call)
    out, grad = compare.worst(ours, theirs)
    assert 0 < out <= OUTPUT_ULPS
    assert grad <= GRADIENT_ULPS

    report = handle.report()
    assert sum(site.module.endswith("Block") for site in report.replaced) == BLOCKS[name]
    reasons = {site.reason for site in report.skipped}
    assert UNEXPLAINED not in reasons
    assert all(reason.startswith(LEFT_ALONE) for reason in reasons)

    handle.undo()
    assert all(torch.equal(v, theirs[k]) for k, v in compare.run(model, call).items())
    assert compare.state(model) == before


ROUND_TO_FLOAT32 = ("HunyuanDiT", "Wan", "Wan 2.2", "AuraFlow")
"""Their norms cast to float32, whatever the model's dtype: there is no float64 to compare with."""


@pytest.mark.parametrize("name", [n for n in families.FAMILIES if n not in ROUND_TO_FLOAT32])
def test_errors_against_float64_are_the_originals(name):
    model, call = families.make(name)
    exact = compare.run(copy.deepcopy(model).double(), call)
    theirs = compare.distance(compare.run(model, call), exact)
    with fastdit.patched(model), fastdit.backend("native"):
        assert compare.distance(compare.run(model, call), exact) <= 1.25 * theirs


@pytest.mark.parametrize("name", families.FAMILIES)
@torch.no_grad()
def test_bfloat16_is_as_near_to_float64(name):
    model, call = families.make(name)
    model.to(torch.bfloat16)
    if "Wan" in name:  # as from_pretrained does
        for part, module in model.named_modules():
            if any(kept in part for kept in model._keep_in_fp32_modules):
                module.float()
        for p in [model.scale_shift_table, *(b.scale_shift_table for b in model.blocks)]:
            p.data = p.data.float()
    exact = compare.in_float64(model, call)
    theirs = compare.outputs(model, call)
    with fastdit.patched(model, "fast"), fastdit.backend("native"):
        ours = compare.outputs(model, call)
    assert [t.dtype for t in ours] == [t.dtype for t in theirs]
    errors = [float((t[0].double() - exact[0]).norm()) for t in (ours, theirs)]
    assert errors[0] <= 1.1 * errors[1]


@torch.no_grad()
def test_one_embedder_serves_all_blocks_while_they_are_equal():
    model, call = families.make("DiT")
    first, *others = [block.norm1.emb for block in model.transformer_blocks]
    for other in others:
        other.load_state_dict(first.state_dict())
    calls = []
    for embedder in (first, *others):
        embedder.class_embedder.forward = counted(embedder.class_embedder, calls)
    expected = call(model)
    assert len(calls) == 3
    calls.clear()
    for embedder in (first, *others):
        del embedder.class_embedder.forward
    with fastdit.patched(model, "fast"):
        assert compare.ulps(call(model), expected) < OUTPUT_ULPS
        first.class_embedder.forward = counted(first.class_embedder, calls)
        assert compare.ulps(call(model), expected) < OUTPUT_ULPS
        assert len(calls) == 1
        others[0].timestep_embedder.linear_1.bias.add_(1)  # an optimiser, a loaded checkpoint
        changed = call(model)
        assert len(calls) == 3
    assert compare.ulps(changed, call(model)) < OUTPUT_ULPS
    assert not torch.allclose(changed, expected, atol=1e-3)


def counted(module, calls):
    return lambda *args: calls.append(1) or type(module).forward(module, *args)


def test_gradients_of_the_copies_stay_apart():
    model, call = families.make("DiT")
    first, second = [block.norm1.emb for block in model.transformer_blocks]
    second.load_state_dict(first.state_dict())
    theirs = compare.run(model, call)
    with fastdit.patched(model, "fast"):
        ours = compare.run(model, call)
    weights = [b.norm1.emb.timestep_embedder.linear_1.weight for b in model.transformer_blocks]
    assert not torch.equal(weights[0].grad, weights[1].grad)
    assert compare.worst(ours, theirs)[1] <= GRADIENT_ULPS


@pytest.mark.parametrize("name", ["DiT", "SD3", "Wan"])
def test_gradient_checkpointing(name):
    model, call = families.make(name)
    theirs = compare.run(model, call)
    model.train().enable_gradient_checkpointing()
    if name == "DiT":
        for block in model.transformer_blocks:
            block.norm1.emb.class_embedder.dropout_prob = 0.0
    with fastdit.patched(model):
        out, grad = compare.worst(compare.run(model, call), theirs)
    assert (out <= OUTPUT_ULPS, grad <= GRADIENT_ULPS) == (True, True)


@pytest.mark.parametrize("name", ["DiT", "Flux", "Wan", "Lumina2"])
def test_autocast(name):
    model, call = families.make(name)

    def amp(model):
        with torch.autocast("cpu", torch.bfloat16):
            return call(model)

    theirs = compare.run(model, amp)
    with fastdit.patched(model):
        ours = compare.run(model, amp)
    assert {k: v.dtype for k, v in ours.items()} == {k: v.dtype for k, v in theirs.items()}
    exact = compare.run(copy.deepcopy(model).double(), call)
    assert compare.distance(ours, exact) <= 1.1 * compare.distance(theirs, exact)


@torch.no_grad()
def test_chunked_feed_forward_runs_the_original_block():
    model, call = families.make("SD3")
    model.enable_forward_chunking(chunk_size=1, dim=0)
    expected = call(model)
    with fastdit.patched(model):
        assert compare.ulps(call(model), expected) <= OUTPUT_ULPS


@torch.no_grad()
def test_fused_projections_and_processors_still_apply():
    model, call = families.make("SD3")
    expected = call(model)
    with fastdit.patched(model):
        model.fuse_qkv_projections()
        assert compare.ulps(call(model), expected) <= OUTPUT_ULPS
        model.unfuse_qkv_projections()


@torch.no_grad()
def test_a_hook_on_a_fused_norm_fires():
    model, call = families.make("PixArt-Sigma")
    seen = []
    with fastdit.patched(model):
        model.transformer_blocks[0].norm2.register_forward_hook(lambda *_: seen.append(1))
        call(model)
    assert seen == [1]


def test_blocks_without_modulation_are_left_alone_with_a_reason():
    from diffusers.models.attention import BasicTransformerBlock

    block = BasicTransformerBlock(32, 2, 16, norm_type="layer_norm", activation_fn="geglu")
    report = fastdit.patch(nn.Sequential(block)).report()
    assert [site.rule for site in report.replaced] == ["GEGLU projection"]
    reasons = [site.reason for site in report.skipped]
    assert all(reason.startswith(LEFT_ALONE) for reason in reasons)
