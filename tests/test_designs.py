"""Every design, one matrix of what all must do: initialise, learn, compile, be sampled, be kept."""

from __future__ import annotations

import copy
import tempfile
from functools import partial

import pytest
import torch
from designs import VARIANTS, assert_same, inputs, tiny
from torch.utils.flop_counter import FlopCounterMode

import fastdit
from fastdit import designs

CHECKS = {}


def check(function):
    """A column of the matrix: called with a model of each design, which it leaves as it was."""
    CHECKS[function.__name__] = function
    return function


@check
def starts_as_zero_and_learns_at_once(model):
    """The initialised model predicts nothing, and its last layer has a gradient."""
    torch.manual_seed(0)
    model = fastdit.DiT(**model.config)
    out = model(*inputs(model))
    assert out.abs().max() == 0
    (out - 1).square().sum().backward()
    assert model.final_layer.linear.weight.grad.abs().max() > 0


@check
def conditioning_rows_replace_the_condition(model):
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


@check
def every_parameter_learns_with_and_without_checkpointing(model):
    model = copy.deepcopy(model).train()
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


@check
def kernels_and_eager_pytorch_agree(model):
    with torch.no_grad():
        out = model(*inputs(model))
        with fastdit.backend("reference"):
            torch.testing.assert_close(model(*inputs(model)), out, rtol=1e-4, atol=1e-4)
    assert out.shape == (2, model.out_channels, *model.input_size)


@check
def autocast_keeps_the_stream_in_float32(model):
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


@check
def guidance_with_the_null_condition(model):
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


@check
@torch.no_grad()
def patching_leaves_them_alone_and_says_so(model):
    args = inputs(model)
    expected = model(*args)
    handle = fastdit.patch(model)
    report = handle.report()
    assert not report.replaced
    assert [(site.module, site.reason) for site in report.skipped] == [
        ("DiT", "runs the ops already")
    ]
    assert torch.equal(model(*args), expected)
    handle.undo()


@check
@torch.no_grad()
def the_native_forward_runs_them_or_says_why_not(model):
    args = inputs(model)
    native = fastdit.NativeForward(model)
    torch.testing.assert_close(native(*args), model(*args), rtol=1e-4, atol=1e-4)
    if native.reason is not None and "compiler" not in native.reason:
        field = native.reason.split()[0]
        assert getattr(model.design, field) != getattr(designs.PUBLISHED, field), native.reason


@check
def samples_are_the_same_with_conditioning_ahead_and_in_the_step(model):
    """Of a diffusion and of a flow, guided where the model can be."""
    _x, _t, y = inputs(model)
    classes = 2 if y is None else y
    scale = 2.0 if model.guidable else 1.0
    for options in ({"solver": "ddim"}, {"transport": fastdit.create_transport(time_scale=1e3)}):
        sampler = partial(fastdit.Sampler, model, steps=2, cfg_scale=scale, **options)
        out = sampler()(classes, seed=0)
        assert out.shape == (2, model.in_channels, *model.input_size)
        assert out.isfinite().all()
        plain = sampler(conditioning_budget=0, native=False)(classes, seed=0)
        assert (out - plain).abs().max() <= 2e-5 * plain.abs().max()
    if not model.guidable:
        with pytest.raises(ValueError, match="cfg_scale: got 2"):
            fastdit.sample(model, classes, steps=3, cfg_scale=2)


@check
@torch.no_grad()
def a_checkpoint_keeps_them(model):
    with tempfile.TemporaryDirectory() as folder:
        fastdit.save_model(model, f"{folder}/m.safetensors")
        assert_same(model, fastdit.load_model(f"{folder}/m.safetensors"))


@check
def compiles_whole(model):
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    args = inputs(model)
    torch.testing.assert_close(compiled(*args), model(*args), rtol=1e-4, atol=1e-4)


@check
def runs_on_meta_and_empty_batches(model):
    with torch.no_grad():
        assert model(*inputs(model, 0)).shape[0] == 0
    with torch.device("meta"):
        model = fastdit.DiT(**model.config)
    args = [None if a is None else a.to("meta") for a in inputs(model)]
    assert model(*args).shape == (2, model.out_channels, *model.input_size)


@check
def flops_are_what_pytorch_counts(model):
    """PyTorch counts two a multiply-add; without values it runs attention as two products."""
    with torch.device("meta"):
        model = fastdit.DiT(**model.config)
    args = [None if a is None else a.to("meta") for a in inputs(model, 1)]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*args)
    assert counter.get_total_flops() == 2 * model.flops()


@pytest.fixture(scope="module")
def models():
    return {name: tiny(**options) for name, options in VARIANTS.items()}


@pytest.mark.parametrize("must", CHECKS)
@pytest.mark.parametrize("name", VARIANTS)
def test_designs(models, name, must):
    CHECKS[must](models[name])
