"""Options that fit each other or are named, and inputs that do not fit the model."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from designs import VARIANTS, inputs, tiny

import fastdit
from fastdit import designs
from fastdit.designs import Design


@pytest.fixture(scope="module")
def models():
    names = ("unconditional", "vectors", "vectors_no_null", "signal", "any_size", "spectrogram")
    return {name: tiny(**VARIANTS[name]) for name in names}


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


def test_wrong_conditions_of_samples_are_named(models):
    for name, classes in (("unconditional", [1]), ("vectors", [1, 2]), ("signal", 3)):
        with pytest.raises(ValueError, match="classes: got"):
            fastdit.sample(models[name], classes, steps=2, cfg_scale=1)
