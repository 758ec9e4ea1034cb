"""A sampler's steps as graphs: captured when they must be, replayed for all the others."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import weakref

import pytest
import recorded_graphs
import torch
from recorded_graphs import CUDAGraph, Stream

from fastdit import Sampler, create_diffusion
from fastdit.diffusion import GaussianDiffusion
from fastdit.digits import load_digits_model
from fastdit.sampler import ahead, graphs, published

LABELS = [3, 8, 3, 1]


@pytest.fixture(scope="module")
def shipped():
    return load_digits_model()


@pytest.fixture
def model(shipped, monkeypatch):
    recorded_graphs.install(monkeypatch)
    monkeypatch.setattr(graphs, "capturable", lambda _device: True)
    monkeypatch.setattr(ahead, "stand_in", lambda model, *_options: model)  # no native forward
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


# ---- the published loops ----------------------------------------------------------------------

LOOPS = {
    "p_sample_loop": {},
    "ddim_sample_loop": {"eta": 0.5},
    "dpm_solver_sample_loop": {},
}
every_loop = pytest.mark.parametrize(("loop", "options"), LOOPS.items(), ids=LOOPS)


def asked(model, labels=LABELS, scale=2.0):
    """What the published script calls a loop with: both halves, and the model's guided method."""
    torch.manual_seed(4)
    z = torch.randn(len(labels), 1, 8, 8)
    y = torch.tensor([*labels, *[10] * len(labels)])
    kwargs = {"y": y, "cfg_scale": scale, "guided_channels": 1}
    return {
        "model": model.forward_with_cfg,
        "shape": (2 * len(labels), 1, 8, 8),
        "noise": torch.cat([z, z]),
        "model_kwargs": kwargs,
    }


def replays() -> list[int]:
    return [graph.replays for graph in CUDAGraph.made]


@every_loop
def test_a_published_loop_replays_its_steps(model, loop, options):
    diffusion = create_diffusion("6")
    run = functools.partial(getattr(diffusion, loop), **asked(model), **options)
    results, after = [], []
    for graph in (True, False, None):
        torch.manual_seed(5)
        results.append(run(graph=graph))
        after.append(torch.rand(()))
    assert replays() == [12]  # captured once; six steps of two loops
    assert (results[0] - results[1]).abs().max() <= 1e-5
    assert torch.equal(results[0], results[2])
    assert after[0] == after[1] == after[2]
    progressive = getattr(diffusion, f"{loop}_progressive")
    torch.manual_seed(5)
    captured = list(progressive(**asked(model), **options))
    torch.manual_seed(5)
    eager = list(progressive(**asked(model), **options, graph=False))
    assert replays() == [18]
    for ours, theirs in zip(captured, eager, strict=True):
        assert ours.keys() == theirs.keys() == {"sample", "pred_xstart"}
        for name, value in ours.items():
            torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("graphs_made", "changes"),
    [
        (1, {"labels": [5, 5, 6, 7]}),
        (2, {"scale": 3.0}),
        (2, {"eta": 0.5}),
        (2, {"clip_denoised": False}),
        (2, {"loop": "p_sample_loop"}),
        (2, {"labels": LABELS[:2]}),
        (2, {"owner": "another"}),
        (2, {"steps": "4"}),
    ],
    ids=str,
)
def test_a_published_loops_graph_is_that_of_what_it_was_asked_for(model, graphs_made, changes):
    """Other labels and noise are replayed; anything that is built into a step is captured."""
    diffusion = {"3": create_diffusion("3"), "4": create_diffusion("4")}
    owners = {"shipped": model, "another": copy.deepcopy(model)}

    def check(
        steps="3", loop="ddim_sample_loop", owner="shipped", labels=LABELS, scale=2.0, **more
    ):
        run = getattr(diffusion[steps], loop)
        given = asked(owners[owner], labels, scale) | more
        results = []
        for graph in (True, False):
            torch.manual_seed(1)
            results.append(run(**given, graph=graph))
        assert (results[0] - results[1]).abs().max() <= 1e-5

    check()
    check(**changes)
    assert len(CUDAGraph.made) == graphs_made


@every_loop
def test_a_consumer_changes_what_the_next_replay_starts_from(model, loop, options):
    """Put there, or written over in place; and what was yielded stays as it was."""
    diffusion = create_diffusion("4")

    def run(graph):
        torch.manual_seed(2)
        progressive = getattr(diffusion, f"{loop}_progressive")
        yielded, seen = [], []
        for step, out in enumerate(progressive(**asked(model), **options, graph=graph)):
            yielded.append((out["sample"], out["pred_xstart"]))
            seen.append([value.clone() for value in yielded[-1]])
            if step == 0:
                out["sample"] = out["sample"].clone().clamp(-0.5, 0.5)
            elif step == 1:
                out["sample"].mul_(0.5)
                seen[-1][0].mul_(0.5)
                out["pred_xstart"] = torch.ones_like(out["pred_xstart"])
        for now, then in zip(yielded, seen, strict=True):
            assert all(map(torch.equal, now, then))
        return seen[-1][0]

    assert (run(True) - run(False)).abs().max() <= 1e-5
    assert sum(replays()) == 4


def test_runs_that_take_turns_do_not_share_a_graph(model):
    diffusion = create_diffusion("4")
    progressive = diffusion.ddim_sample_loop_progressive
    questions = [asked(model), asked(model, [1, 2, 4, 9]), asked(model, [7, 6, 5, 0])]
    alone = [[out["sample"] for out in progressive(**q, graph=False)] for q in questions]
    for _again in range(2):
        turns = [progressive(**q, graph=True) for q in questions]
        for outs in zip(*turns, *alone, strict=True):
            for out, expected in zip(outs[:3], outs[3:], strict=True):
                assert (out["sample"] - expected).abs().max() <= 1e-5
    for budget in (2**30, 0):
        sampler = Sampler(model, native=False, steps=4, solver="ddim", conditioning_budget=budget)
        calls = (LABELS, LABELS[::-1])
        alone = [[p.x for p in sampler.iterate(labels, seed=0)] for labels in calls]
        turns = [sampler.iterate(labels, seed=0) for labels in calls]
        for one, other, *want in zip(*turns, *alone, strict=True):
            assert torch.equal(one.x, want[0])
            assert torch.equal(other.x, want[1])


def test_a_run_that_was_left_gives_its_graph_back(model):
    diffusion = create_diffusion("4")
    next(diffusion.ddim_sample_loop_progressive(**asked(model), graph=True))
    steps = diffusion.ddim_sample_loop_progressive(**asked(model), graph=True)
    next(steps)
    steps.close()
    diffusion.ddim_sample_loop(**asked(model), graph=True)
    assert replays() == [6]


def test_a_run_that_was_left_early_captures_its_other_steps_later(model):
    options = {"steps": 4, "native": False, "cfg_scale": 2.0, "guidance_interval": (0, 500)}
    sampler = Sampler(model, **options)
    next(sampler.iterate(LABELS, seed=0))
    replayed = sampler(LABELS, seed=0)
    assert (replayed - Sampler(model, graph=False, **options)(LABELS, seed=0)).abs().max() <= 1e-5
    assert replays() == [3, 2]


def test_a_graph_keeps_neither_the_model_nor_the_diffusion(model):
    diffusion, passing = create_diffusion("2"), copy.deepcopy(model)
    diffusion.p_sample_loop(**asked(passing), graph=True)
    (captures,) = [c for d, c in published._captures.items() if d is diffusion]
    (run,) = captures._runs.values()
    gone = [weakref.ref(passing), weakref.ref(run), weakref.ref(captures)]
    del passing, run
    gc.collect()
    assert gone[0]() is None
    assert gone[1]() is None
    del diffusion, captures
    gc.collect()
    assert gone[2]() is None


@pytest.mark.parametrize("conditioning", [2**30, 0])
def test_a_graph_captured_in_inference_mode_serves_outside_of_it(model, conditioning):
    sampler = Sampler(model, native=False, steps=2, conditioning_budget=conditioning)
    diffusion = create_diffusion("2")
    with torch.inference_mode():
        sampler(LABELS, seed=0)
        diffusion.dpm_solver_sample_loop(**asked(model))
    sampler(LABELS, seed=0)
    diffusion.dpm_solver_sample_loop(**asked(model))
    with torch.inference_mode():
        sampler(LABELS, seed=0)
        diffusion.dpm_solver_sample_loop(**asked(model))
    assert replays() == [6, 6]


class Overriding(GaussianDiffusion):
    def p_mean_variance(self, *args, **kwargs):
        return super().p_mean_variance(*args, **kwargs)


def hooked(model):
    return model.blocks[1].register_forward_hook(lambda *_args: None)


EAGER = {
    "denoised_fn": ({"denoised_fn": lambda x0: x0}, "denoised_fn is called in every step"),
    "cond_fn": ({"cond_fn": lambda x, _t, **_kw: x}, "cond_fn is called in every step"),
    "noise_fn": ({"noise_fn": torch.randn_like}, "noise_fn is called in every step"),
    "a lambda": ({"model": lambda x, t, **_kw: x.repeat(1, 2, 1, 1)}, "the model is a function"),
    "a tensor": ({"cfg_scale": torch.tensor(2.0)}, "an option of the model is no number"),
    "a method": ({}, "Overriding.p_mean_variance is not fastdit's"),
    "autocast": ({}, "autocast is on"),
    "a hook": ({}, "a module has a forward hook"),
    "a layout": ({}, "the noise is not contiguous"),
}


@pytest.mark.parametrize("why", EAGER)
def test_what_a_replay_cannot_do_is_done_step_by_step_and_asking_for_it_says_why(model, why):
    changes, message = EAGER[why]
    question, diffusion = asked(model), create_diffusion("2")
    if why == "a tensor":
        question["model_kwargs"] |= changes
    else:
        question |= changes
    if why == "a method":
        diffusion = Overriding([0.1, 0.2])
    if why == "a layout":
        question["noise"] = question["noise"].transpose(2, 3)
    with contextlib.ExitStack() as around:
        if why == "autocast":
            around.enter_context(torch.autocast("cpu", torch.bfloat16))
        if why == "a hook":
            around.callback(hooked(model).remove)
        with pytest.raises(
            ValueError, match=f"graph: got True, allowed is None or False: {message}"
        ):
            diffusion.p_sample_loop(**question, graph=True)
        diffusion.p_sample_loop(**question)
        assert not CUDAGraph.made
        if why in ("autocast", "a hook"):
            with pytest.raises(
                ValueError, match=f"graph: got True, allowed is False or None: {message}"
            ):
                Sampler(model, native=False, steps=2, graph=True)(LABELS)
            Sampler(model, native=False, steps=2)(LABELS)
            assert not CUDAGraph.made
