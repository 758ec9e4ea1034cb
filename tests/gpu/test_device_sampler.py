"""A sampler's CUDA graphs on a real GPU: `pytest -m gpu`."""

from __future__ import annotations

import pytest
import torch

from fastdit import Sampler
from fastdit.digits import load_digits_model, weights_path
from fastdit.flow import SDE, load_transport

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
LABELS = [3, 8, 3, 1]


@pytest.fixture(scope="module")
def model():
    return load_digits_model("cuda")


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize(
    "options",
    [
        {"solver": "ddpm"},
        {"solver": "ddim", "eta": 1.0, "chunk": 2},
        {"solver": "dpm++", "guidance_interval": (200, 700)},
        {"solver": "ddpm", "conditioning_budget": 0},
    ],
)
def test_replayed_steps_give_the_eager_samples(model, options, seed):
    results = []
    for graph in (True, False):
        torch.manual_seed(4)
        sampler = Sampler(model, steps=50, graph=graph, clip_denoised=True, **options)
        results.append(sampler(LABELS, seed=seed))
        torch.manual_seed(4)
        assert torch.equal(sampler(LABELS, seed=seed), results[-1])
    assert (results[0] - results[1]).abs().max() <= 1e-4


@pytest.mark.parametrize("solver", ["euler", "heun", "sde", SDE("Heun", last_step="Tweedie")])
@pytest.mark.parametrize("seed", [None, 5])
def test_replayed_steps_of_a_flow_give_the_eager_samples(solver, seed):
    model, transport = load_digits_model("cuda", "flow"), load_transport(weights_path("flow"))
    options = {"transport": transport, "solver": solver, "guidance_interval": (0.2, 0.8)}
    results = []
    for graph in (True, False):
        torch.manual_seed(4)
        sampler = Sampler(model, steps=20, graph=graph, **options)
        results.append(sampler(LABELS, seed=seed))
    assert (results[0] - results[1]).abs().max() <= 1e-4


def test_no_step_synchronises(model):
    sampler = Sampler(model, steps=8)
    run = sampler.iterate(LABELS, seed=1)
    next(run)  # captures
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(7):
            next(run)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_seed_is_the_same_image_on_a_cpu(model):
    options = {"steps": 20, "clip_denoised": True, "cfg_scale": 2.0}
    here = Sampler(model, **options)(LABELS, seed=3).cpu()
    there = Sampler(load_digits_model(), **options)(LABELS, seed=3)
    assert (here - there).abs().max() <= 1e-2
