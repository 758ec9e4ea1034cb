"""`fastdit.sample`: the published procedure in one call."""

from __future__ import annotations

import golden
import pytest
import torch

import fastdit
from fastdit import create_diffusion, sample


@pytest.fixture(scope="module")
def model():
    model = fastdit.DiT(
        input_size=4, hidden_size=24, depth=1, num_heads=2, num_classes=5, in_channels=4
    )
    golden.set_reference_weights(model, 1)
    return model.eval()


@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
def test_a_seed_gives_what_the_published_script_draws(model, solver):
    torch.manual_seed(7)
    y, null = torch.tensor([1, 3]), torch.tensor([5, 5])
    z = torch.randn(2, 4, 4, 4)
    diffusion = create_diffusion("6")
    loop = diffusion.p_sample_loop if solver == "ddpm" else diffusion.ddim_sample_loop
    kwargs = {"y": torch.cat([y, null]), "cfg_scale": 4.0}
    with torch.no_grad():
        expected = loop(
            model.forward_with_cfg,
            (4, 4, 4, 4),
            torch.cat([z, z]),
            clip_denoised=False,
            model_kwargs=kwargs,
            device="cpu",
        )[:2]
    got = sample(model, [1, 3], steps=6, solver=solver, seed=7)
    assert torch.equal(got, expected)


def test_the_callers_generator_is_left_alone(model):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    sample(model, [0], steps=2, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    sample(model, [0], steps=2)
    assert not torch.equal(torch.get_rng_state(), before)


def test_every_solver_and_its_options(model):
    runs = {
        (solver, eta, clip): sample(
            model, [0, 4], steps=4, solver=solver, eta=eta, clip_denoised=clip, seed=0
        )
        for solver, eta in [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 1.0), ("dpm++", 0.0)]
        for clip in (False, True)
    }
    assert all(out.shape == (2, 4, 4, 4) and out.isfinite().all() for out in runs.values())
    outs = list(runs.values())
    assert all(not torch.equal(a, b) for i, a in enumerate(outs) for b in outs[:i])
    assert all(out.abs().max() <= 1 for (s, _e, clip), out in runs.items() if clip and s == "dpm++")


def test_guidance_of_one_is_the_conditional_model(model):
    """Scale 1 runs B rows: no null half, and no extra draws."""
    torch.manual_seed(2)
    z = torch.randn(1, 4, 4, 4)
    with torch.no_grad():
        expected = create_diffusion("3").ddim_sample_loop(
            model, z.shape, z, clip_denoised=False, model_kwargs={"y": torch.tensor([2])}
        )
    got = sample(model, [2], steps=3, solver="ddim", cfg_scale=1, seed=2)
    assert torch.equal(got, expected)


def test_low_precision(model):
    import copy

    out = sample(copy.deepcopy(model).bfloat16(), [1], steps=3, seed=0)
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": [5]}, r"classes: got \[5\], allowed is 0 to 4"),
        ({"classes": [-1]}, "classes"),
        ({"classes": []}, "classes: .*non-empty"),
        ({"solver": "euler"}, "solver: got 'euler', allowed is 'ddpm', 'ddim'"),
        ({"eta": 0.5}, "eta: got 0.5, allowed is 0 with solver='ddpm'"),
        ({"steps": 0}, "0"),
        ({"guided_channels": 9}, "guided_channels: got 9"),
    ],
)
def test_wrong_arguments_are_named(model, changes, message):
    with pytest.raises(ValueError, match=message):
        sample(model, **{"classes": [0], "steps": 2, **changes})


def test_guidance_needs_a_null_class():
    plain = fastdit.DiT(
        input_size=4, hidden_size=24, depth=1, num_heads=2, class_dropout_prob=0
    ).eval()
    with pytest.raises(ValueError, match=r"cfg_scale: got 4\.0, allowed is 1"):
        sample(plain, [0], steps=2)
    assert sample(plain, [0], steps=2, cfg_scale=1).shape == (1, 4, 4, 4)
