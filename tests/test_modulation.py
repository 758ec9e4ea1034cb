"""One product for all modulations: the same values, whatever was done to the model before."""

import copy

import pytest
import torch
from torch import nn

import fastdit
from fastdit import modulation


def small(**kwargs) -> fastdit.DiT:
    torch.manual_seed(0)
    shape = {"input_size": 4, "hidden_size": 16, "depth": 3, "num_heads": 2, "num_classes": 5}
    model = fastdit.DiT(**{**shape, **kwargs})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def layers(model) -> list[nn.Module]:
    return [layer.adaLN_modulation for layer in (*model.blocks, model.final_layer)]


T, Y = torch.tensor([3, 900]), torch.tensor([1, 5])


def one_by_one(model) -> torch.Tensor:
    c = model.condition(T, Y)
    return torch.cat([layer(c) for layer in layers(model)], dim=1)


@torch.no_grad()
def assert_packed(model) -> None:
    assert modulation.packed(layers(model))
    torch.testing.assert_close(model.conditioning(T, Y), one_by_one(model), rtol=1e-6, atol=1e-6)


def reloaded(model, assign):
    other = small(learn_sigma=True)
    other.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=assign)
    return other


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m,
        copy.deepcopy,
        lambda m: m.double().float(),
        lambda m: m.to("meta").to_empty(device="cpu").requires_grad_(False),
        lambda m: reloaded(m, assign=False),
        lambda m: reloaded(m, assign=True),
        lambda m: m.share_memory(),
    ],
    ids=["new", "deepcopy", "cast", "meta", "loaded", "assigned", "shared"],
)
def test_stays_packed(change):
    model = change(small())
    with torch.no_grad():
        for parameter in model.parameters():  # from here on, values move with the parameters
            parameter.normal_(std=0.2)
    assert_packed(model)


def test_parameters_keep_identity_and_values():
    model = small()
    before = dict(model.named_parameters())
    values = {name: p.clone() for name, p in before.items()}
    model.bfloat16().float()
    for name, parameter in model.named_parameters():
        assert parameter is before[name]
        assert torch.equal(parameter, values[name].bfloat16().float())
    assert values.keys() == model.state_dict().keys()


@torch.no_grad()
def test_forward_takes_rows():
    model = small()
    x = torch.randn(2, 4, 4, 4)
    rows = model.conditioning(T, Y)
    assert torch.equal(model(x, T, Y), model(x, None, None, conditioning=rows))
    guided = model.forward_with_cfg(x, T, Y, 2.0)
    assert torch.equal(guided, model.forward_with_cfg(x, None, None, 2.0, conditioning=rows))


def test_gradients_flow_through_given_rows():
    model = small()
    x = torch.randn(2, 4, 4, 4)
    parameters = [p for p in model.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(model(x, T, Y).square().sum(), parameters)
    rows = model.conditioning(T, Y)
    found = torch.autograd.grad(model(x, None, None, conditioning=rows).square().sum(), parameters)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_hooks_and_replaced_layers_are_called():
    model, x = small(), torch.randn(2, 4, 4, 4)
    plain = model(x, T, Y)
    calls = []
    hook = (
        model.blocks[1].adaLN_modulation[1].register_forward_hook(lambda *_: calls.append("hook"))
    )
    torch.testing.assert_close(model(x, T, Y), plain, rtol=1e-5, atol=1e-5)
    assert calls == ["hook"]
    hook.remove()
    model.blocks[1].adaLN_modulation[1] = nn.utils.parametrizations.weight_norm(
        model.blocks[1].adaLN_modulation[1]
    )
    assert not modulation.packed(layers(model))
    torch.testing.assert_close(model(x, T, Y), plain, rtol=1e-4, atol=1e-4)


def test_wrong_rows_are_named():
    model = small()
    with pytest.raises(ValueError, match=r"conditioning: got \(2, 3\), allowed is \(2, 320\)"):
        model(torch.randn(2, 4, 4, 4), None, None, conditioning=torch.randn(2, 3))
    with pytest.raises(ValueError, match=r"t: got None, allowed is \(2,\)"):
        model(torch.randn(2, 4, 4, 4), None, Y)
