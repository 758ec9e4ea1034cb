"""A sampler's steps as graphs: captured when they must be, replayed for all the others."""

from __future__ import annotations

import copy

import pytest
import recorded_graphs
import torch
from recorded_graphs import CUDAGraph, Stream

from fastdit import Sampler
from fastdit.digits import load_digits_model
from fastdit.sampler import graphs

LABELS = [3, 8, 3, 1]


@pytest.fixture(scope="module")
def shipped():
    return load_digits_model()


@pytest.fixture
def model(shipped, monkeypatch):
    recorded_graphs.install(monkeypatch)
    monkeypatch.setattr(graphs, "capturable", lambda _device: True)
    return shipped


def both(model, labels=LABELS, seed=None, **options):
    """The samples of replayed steps and of eager ones, from the same draws."""
    results = []
    for graph in (True, False):
        torch.manual_seed(4)
        sampler = Sampler(
            model, native=False, graph=graph, cfg_scale=2.0, clip_denoised=True, **options
        )
        results.append(sampler(labels, seed=seed))
    return results


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize(
    "options",
    [
        {"solver": "ddpm"},
        {"solver": "ddim", "eta": 1.0},
        {"solver": "dpm++"},
        {"solver": "dpm++", "chunk": 2},
        {"solver": "ddpm", "chunk": 1, "conditioning_budget": 2 * 1920 * 4 * 4},
        {"solver": "ddpm", "conditioning_budget": 0},
        {"solver": "dpm++", "guidance_interval": (200, 700)},
    ],
)
def test_replayed_steps_give_the_eager_samples(model, options, seed):
    replayed, eager = both(model, steps=6, seed=seed, **options)
    assert (replayed - eager).abs().max() <= 1e-6
    chunks = len(LABELS) // options.get("chunk", len(LABELS))
    assert sum(graph.replays for graph in CUDAGraph.made) == 6 * chunks
    assert len(CUDAGraph.made) == 1 + ("guidance_interval" in options)


def test_a_graph_serves_other_labels_seeds_and_values(model):
    changing = copy.deepcopy(model)
    sampler = Sampler(changing, native=False, steps=3)
    eager = Sampler(changing, native=False, steps=3, graph=False)
    for labels, seed in ((LABELS, 0), ([5, 5, 6, 7], 9)):
        assert (sampler(labels, seed=seed) - eager(labels, seed=seed)).abs().max() <= 1e-5
    with torch.no_grad():
        changing.final_layer.linear.bias.add_(0.25)
        changing.blocks[0].adaLN_modulation[1].weight.mul_(1.5)
    assert (sampler(LABELS, seed=1) - eager(LABELS, seed=1)).abs().max() <= 1e-5
    assert len(CUDAGraph.made) == 1


def test_it_is_captured_again_where_it_must_be(model):
    changing = copy.deepcopy(model)
    sampler = Sampler(changing, native=False, steps=2)
    sampler(LABELS, seed=0)
    sampler(LABELS[:2], seed=0)  # another shape
    assert len(CUDAGraph.made) == 2
    sampler(LABELS, seed=0)  # which did not forget the first
    assert len(CUDAGraph.made) == 2
    sampler(LABELS)  # noise from another place
    assert len(CUDAGraph.made) == 3
    changing.load_state_dict(copy.deepcopy(changing.state_dict()), assign=True)
    moved = sampler(LABELS, seed=0)  # other storage
    assert len(CUDAGraph.made) == 4
    assert torch.equal(moved, Sampler(changing, native=False, steps=2, graph=False)(LABELS, seed=0))
    assert sampler._captures._runs.keys() == {*list(sampler._captures._runs)[-1:]}
    changing.bfloat16()
    assert sampler(LABELS, seed=0).dtype == torch.bfloat16
    assert len(CUDAGraph.made) == 5


def test_previews_and_the_generator_are_those_of_eager_steps(model):
    seen: dict[bool, list] = {True: [], False: []}
    after = []
    for graph, previews in seen.items():
        torch.manual_seed(2)
        Sampler(model, native=False, steps=4, graph=graph)(LABELS, callback=previews.append)
        after.append(torch.rand(()))
    assert after[0] == after[1]
    for replayed, eager in zip(seen[True], seen[False], strict=True):
        assert torch.allclose(replayed.x, eager.x, atol=1e-5)
        assert torch.allclose(replayed.x0, eager.x0, rtol=1e-4, atol=1e-4)


def test_warming_up_is_on_a_stream_of_its_own_that_is_waited_for(model):
    Sampler(model, native=False, steps=2)(LABELS, seed=0)
    (side, main), (waiting, waited_for) = Stream.waits
    assert side is waited_for
    assert main is waiting
    assert side is not main


def test_off_is_off(model):
    Sampler(model, native=False, steps=2, graph=False)(LABELS, seed=0)
    assert not CUDAGraph.made
