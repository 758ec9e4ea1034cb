"""A sampler's CUDA graphs on a real GPU: `pytest -m gpu`."""

from __future__ import annotations

import pytest
import torch

from fastdit import Sampler, create_diffusion
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


@pytest.mark.parametrize(
    ("loop", "options"),
    [("p_sample_loop", {}), ("ddim_sample_loop", {"eta": 0.5}), ("dpm_solver_sample_loop", {})],
)
def test_a_published_loop_replays_the_eager_steps(model, loop, options):
    """From the same draws; a progressive run goes on from what its consumer has put there."""
    diffusion, device = create_diffusion("50"), model.x_embedder.proj.weight.device
    y = torch.tensor([*LABELS, *[10] * 4], device=device)
    torch.manual_seed(1)
    z = torch.randn(4, 1, 8, 8, device=device)
    asked = {
        "model": model.forward_with_cfg,
        "shape": (8, 1, 8, 8),
        "noise": torch.cat([z, z]),
        "model_kwargs": {"y": y, "cfg_scale": 2.0, "guided_channels": 1},
        **options,
    }
    results, after = [], []
    for graph in (True, False, None):
        torch.manual_seed(4)
        results.append(getattr(diffusion, loop)(**asked, graph=graph))
        after.append(torch.rand((), device=device))
    assert (results[0] - results[1]).abs().max() <= 1e-4
    assert torch.equal(results[0], results[2])
    assert after[0] == after[1] == after[2]
    halved = []
    for graph in (True, False):
        torch.manual_seed(4)
        for step, out in enumerate(getattr(diffusion, f"{loop}_progressive")(**asked, graph=graph)):
            if step == 25:
                out["sample"] = out["sample"] / 2
        halved.append(out["sample"])
    assert (halved[0] - halved[1]).abs().max() <= 1e-4
    assert (halved[0] - results[0]).abs().max() > 1e-3


def test_no_step_of_a_published_loop_synchronises(model):
    device = model.x_embedder.proj.weight.device
    kwargs = {"y": torch.tensor(LABELS, device=device)}
    for call in (model, lambda x, t, y: model(x, t, y)):
        steps = create_diffusion("8").p_sample_loop_progressive(
            call, (4, 1, 8, 8), model_kwargs=kwargs, device=device
        )
        next(steps)
        torch.cuda.set_sync_debug_mode("error")
        try:
            assert len(list(steps)) == 7
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_a_model_on_another_gpu_than_the_current_one_is_captured_there():
    there = load_digits_model("cuda:1")
    options = {"steps": 8, "cfg_scale": 2.0}
    captured = Sampler(there, **options)(LABELS, seed=3)
    assert captured.device == torch.device("cuda:1")
    assert (captured - Sampler(there, graph=False, **options)(LABELS, seed=3)).abs().max() <= 1e-4


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
