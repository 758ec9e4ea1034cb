"""The native forward is aware of every change of its model, and frank about what it cannot run."""

from __future__ import annotations

import threading

import pytest
import torch
from forward_models import error, inputs, load_library, small
from torch import nn

import fastdit
from fastdit.native_forward import NativeForward


@pytest.fixture(autouse=True)
def inference():
    load_library()
    with torch.no_grad():
        yield


CHANGES = {
    "in place": lambda m: m.blocks[0].attn.qkv.weight.mul_(2),
    "data": lambda m: setattr(m.blocks[1].mlp.fc2.weight, "data", torch.randn(36, 144)),
    "bias": lambda m: m.final_layer.linear.bias.add_(1),
    "positions": lambda m: m.pos_embed.mul_(2),
    "labels": lambda m: m.y_embedder.embedding_table.weight.add_(1),
    "modulation": lambda m: m.final_layer.adaLN_modulation[1].weight.add_(1),
    "load": lambda m: m.load_state_dict({k: v + 0.1 for k, v in m.state_dict().items()}),
    "assign": lambda m: m.load_state_dict(
        {k: v + 0.1 for k, v in m.state_dict().items()}, assign=True
    ),
    "parameter": lambda m: setattr(m.blocks[0].mlp.fc1, "bias", nn.Parameter(torch.randn(144))),
    "module": lambda m: setattr(m.blocks[0].attn, "proj", nn.Linear(36, 36)),
    "order": lambda m: m.blocks.__setitem__(0, m.blocks[1]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_packed_again(change):
    model = small()
    run, args = NativeForward(model), inputs(model)
    before = run(*args)
    CHANGES[change](model)
    assert error(run(*args), model(*args).double()) <= 1e-5
    assert run.reason is None
    assert not torch.allclose(run(*args), before, rtol=1e-2)


def test_another_input_size_is_packed_again():
    model = small()
    run = NativeForward(model)
    run(*inputs(model))
    model.set_input_size((2, 8))  # as many tokens, elsewhere
    args = inputs(model)
    assert error(run(*args), model(*args).double()) <= 1e-5
    assert run.reason is None


def test_refresh_sees_what_counts_no_change():
    model = small()
    run, args = NativeForward(model), inputs(model)
    run(*args)
    model.blocks[0].attn.qkv.weight.data.mul_(2)
    run.refresh()
    torch.testing.assert_close(run(*args), model(*args), rtol=1e-5, atol=1e-5)


def test_an_unchanged_model_is_packed_once():
    model = small()
    run, args = NativeForward(model), inputs(model)
    run(*args)
    packed = run._packed
    run(*args)
    assert run._packed is packed


class Lora(nn.Linear):
    pass


def _own_forward(m):
    m.blocks[0].mlp.forward = lambda x: x


UNFIT = {
    "hook": (lambda m: m.blocks[0].register_forward_hook(lambda *a: None), "hook"),
    "pre-hook": (lambda m: m.blocks[0].register_forward_pre_hook(lambda *a: None), "hook"),
    "LoRA": (lambda m: setattr(m.blocks[0].attn, "qkv", Lora(36, 108)), "attn.qkv is a Lora"),
    "own forward": (_own_forward, "has a forward of its own"),
    "float64": (lambda m: m.double(), "is torch.float64"),
    "bfloat16": (lambda m: m.bfloat16(), "is torch.bfloat16"),
    "training": (lambda m: m.train(), "training mode"),
    "no bias": (lambda m: setattr(m.blocks[0].attn.proj, "bias", None), "a layer has no bias"),
    "parametrised": (
        lambda m: nn.utils.parametrizations.weight_norm(m.blocks[0].mlp.fc1),
        "ParametrizedLinear",
    ),
}


@pytest.mark.parametrize("packed_before", [False, True])
@pytest.mark.parametrize("change", UNFIT)
def test_what_it_does_not_know_runs_the_model(change, packed_before):
    model = small()
    run, (x, t, y) = NativeForward(model), inputs(model)
    if packed_before:
        run(x, t, y)
    UNFIT[change][0](model)
    x = x.to(next(model.parameters()).dtype)
    torch.manual_seed(1)
    got = run(x, t, y)
    assert UNFIT[change][1] in run.reason
    assert run.reason in run.explain(x)
    torch.manual_seed(1)
    assert torch.equal(got, model(x, t, y))


DESIGNS = [
    {"conditioning": "in_context"},
    {"conditioning": "cross_attention"},
    {"conditioning": "adaln"},
    {"rope": True},
    {"norm": "rms"},
    {"qk_norm": "layer"},
    {"mlp": "swiglu"},
    {"residual": "normed"},
    {"scale_plus_one": False},
    {"any_size": True},
]


@pytest.mark.parametrize("design", DESIGNS, ids=str)
def test_other_designs_run_the_model(design):
    model = small(**design)
    run, args = NativeForward(model), inputs(model)
    assert torch.equal(run(*args), model(*args))
    assert next(iter(design)) in run.reason


def test_calls_that_others_must_see_run_the_model():
    model = small()
    run, (x, t, y) = NativeForward(model), inputs(model)
    with torch.enable_grad():
        run(x, t, y).sum().backward()
        assert "gradients of the parameters" in run.reason
        assert model.final_layer.linear.weight.grad is not None
        model.requires_grad_(False)
        run(x, t, y)
        assert run.reason is None
        run(x.clone().requires_grad_(), t, y)
        assert "gradient of an argument" in run.reason
    with fastdit.backend("reference"):
        run(x, t, y)
        assert "reference" in run.reason
    with torch.autocast("cpu"):
        assert run(x, t, y).dtype == torch.bfloat16
        assert "autocast" in run.reason
    torch.func.vmap(lambda one: run(one[None], t[:1], y[:1]))(x)
    assert "torch.func" in run.reason
    assert "native" in run.explain()


def test_wrong_arguments_get_the_model_s_errors():
    model = small()
    run, (x, t, y) = NativeForward(model), inputs(model)
    for args, name in (((x[:, :1], t, y), "x"), ((x, t[:1], y), "t"), ((x, None, y), "t")):
        with pytest.raises(ValueError, match=f"^{name}: got"):
            run(*args)
    with pytest.raises(ValueError, match=r"^conditioning: got"):
        run(x, None, None, conditioning=torch.zeros(2, 3))
    with pytest.raises(RuntimeError, match=r"y: got 6, allowed is 0 to 5"):
        run(x, t, torch.tensor([0, 6]))
    with pytest.raises(ValueError, match="x: got 3 rows"):
        run.forward_with_cfg(*inputs(model, 3), 2.0)


def test_labels_are_dropped_as_asked():
    model = small()
    run, (x, t, y) = NativeForward(model), inputs(model)
    drop = torch.tensor([1, 0])
    torch.testing.assert_close(run(x, t, y, drop), model(x, t, y, drop), rtol=1e-5, atol=1e-5)
    assert run.reason is None


def test_threads_share_one_forward():
    model = small()
    run, (x, t, y) = NativeForward(model), inputs(model)
    want, wrong = run(x, t, y), []

    def work():
        torch.set_grad_enabled(False)  # a setting of each thread
        for _ in range(20):
            if not torch.equal(run(x, t, y), want):
                wrong.append(1)

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_a_sampler_takes_it_where_it_fits():
    model = small(input_size=8, learn_sigma=True)
    options = {"steps": 3, "solver": "ddim", "cfg_scale": 2.0}
    plain = fastdit.Sampler(model, native=False, **options)([1, 3], seed=0)
    sampler = fastdit.Sampler(model, **options)
    assert error(sampler([1, 3], seed=0), plain.double()) < 2e-5
    assert sampler._forward.reason is None
    int8 = fastdit.Sampler(model, quantize="int8", **options)([1, 3], seed=0)
    assert 1e-5 < error(int8, plain.double()) < 0.1
    hook = model.blocks[0].register_forward_hook(lambda *_args: None)
    assert error(sampler([1, 3], seed=0), plain.double()) < 2e-5
    assert "hook" in sampler._forward.reason
    with pytest.raises(fastdit.BackendError, match=r"native=True: .* a module has a forward hook"):
        fastdit.Sampler(model, native=True, **options)([1])
    hook.remove()
    with pytest.raises(ValueError, match="native: got False with quantize='int8'"):
        fastdit.Sampler(model, native=False, quantize="int8")
