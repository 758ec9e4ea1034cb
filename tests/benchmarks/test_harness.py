"""The benchmarks' harness: turns, ratios, checks, results. Nothing here asserts a time."""

from __future__ import annotations

import importlib
import json
import math
from functools import partial
from pathlib import Path

import pytest
import timing
import torch
from harness import facts, measure, peers, results, running, suite
from harness.problem import COPY, EAGER, OURS, Absent, Case, Problem, chosen

from fastdit import backends

FOLDER = Path(timing.__file__).parent


def case_of(problem: Problem) -> Case:
    return Case("op", "toy", "size", "forward", lambda: problem, seconds=0.05)


def toy(**columns) -> Problem:
    x = torch.arange(1.0, 9.0)
    first = {EAGER: lambda: x * 2}
    return Problem({**first, **columns, OURS: lambda: x + x}, 1e-6, bytes=64, flops=8, images=2)


# ---- turns -----------------------------------------------------------------------------------


def test_columns_take_turns_in_alternating_order(monkeypatch):
    order = []
    monkeypatch.setattr(timing, "_turn", lambda f, count, clock: order.append(f()) or 1.0)
    functions = {name: partial(str, name) for name in "abc"}
    taken = timing.interleaved(functions, rounds=4, patience=0)
    assert {name: len(times) for name, times in taken.seconds.items()} == dict.fromkeys("abc", 4)
    assert "".join(order[-12:]) == "cbaabccbaabc"


def test_a_budget_ends_the_rounds_but_not_before_three():
    taken = timing.interleaved({"a": lambda: None}, rounds=50, budget=0.0, patience=0)
    assert len(taken.seconds["a"]) == 3


def test_turns_beside_other_processes_are_repeated_then_counted(monkeypatch):
    busy = iter(range(100))
    monkeypatch.setattr(timing, "_others", lambda: next(busy))
    monkeypatch.setattr(timing.time, "sleep", lambda seconds: None)
    calls = []
    patience = timing.Patience(1.0)
    patience.quiet_turn(lambda: calls.append(1), 1)
    assert len(calls) == 6  # 0.2 s of patience each, then taken as it is
    assert patience.disturbed == 1
    quiet = timing.Patience(1.0)
    monkeypatch.setattr(timing, "_others", lambda: 0.0)
    quiet.quiet_turn(lambda: calls.append(1), 1)
    assert len(calls) == 7
    assert quiet.disturbed == 0


def test_a_device_turn_flushes_the_cache_before_each_call_behind_a_backlog(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def elapsed_time(self, _end):
            return 2.0  # ms

    class Buffer:
        def zero_(self):
            log.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("backlog"), raising=False)
    seconds = timing._device_turn(lambda: log.append("call"), 2, Buffer())
    assert seconds == 2e-3
    one = ["flush", "event", "call", "event"]
    assert log == ["wait", "backlog", *one, *one, "wait"]


def test_ratios_are_the_turns_own():
    assert timing.ratios([2.0, 4.0, 9.0], [1.0, 4.0, 3.0]) == (2.0, 1.0, 3.0)


# ---- checks ----------------------------------------------------------------------------------


def test_a_wrong_peer_is_broken_and_not_timed():
    x = torch.arange(1.0, 9.0)
    problem = toy(wrong=lambda: x * 2.001, right=lambda: torch.arange(2, 18, 2))
    rows = measure.measure(case_of(problem))["columns"]
    assert rows["wrong"]["status"] == "broken"
    assert rows["wrong"]["error"] == pytest.approx(5e-4, rel=1e-2)
    assert "differs from eager by 5.0e-04 of its largest" in rows["wrong"]["reason"]
    assert "seconds" not in rows["wrong"]
    assert rows["right"]["status"] == rows[OURS]["status"] == "measured"


@pytest.mark.parametrize(
    "got", [torch.full((8,), math.nan), torch.ones(7), [torch.ones(8), torch.ones(8)]], ids=str
)
def test_nan_another_shape_or_another_count_is_broken(got):
    assert measure.checked(toy(peer=lambda: got))["peer"]["status"] == "broken"


def test_one_wrong_gradient_among_right_ones_is_broken():
    """What torch.compile did to chained modulated normalisations: everything right but dscale."""
    right = [torch.ones(4, 4), torch.full((4,), 1e-3)]
    wrong = [torch.ones(4, 4), torch.full((4,), 2e-3)]
    columns = {EAGER: lambda: right, "torch.compile": lambda: wrong, OURS: lambda: right}
    assert measure.checked(Problem(columns, 1e-2))["torch.compile"]["status"] == "broken"


def test_fastdits_own_error_ends_the_case():
    problem = toy()
    problem.columns[OURS] = lambda: torch.zeros(8)
    with pytest.raises(measure.WrongResult, match="fastdit: differs from eager"):
        measure.measure(case_of(problem))


def test_absent_and_failing_peers_are_named():
    def fails():
        raise RuntimeError("no kernel for this\nand a long tail")

    rows = measure.checked(toy(gone=Absent("flash-attn is not installed"), fails=fails))
    assert rows["gone"] == {"status": "absent", "reason": "flash-attn is not installed"}
    assert rows["fails"] == {"status": "failed", "reason": "RuntimeError: no kernel for this"}


def test_a_copy_is_not_compared():
    assert measure.checked(toy(**{COPY: lambda: torch.zeros(3)}))[COPY]["status"] == "measured"


# ---- facts -----------------------------------------------------------------------------------


def test_a_result_holds_shares_of_the_ceilings_and_the_spread():
    found = measure.measure(case_of(toy()), {"copy": 128.0, "gemm_fp32": 4.0})
    row = found["columns"][OURS]
    middle = row["seconds"]["median"]
    assert row["share_of_copy"] == pytest.approx(64 / middle / 128)
    assert row["share_of_gemm"] == pytest.approx(8 / middle / 4)
    assert row["images_per_second"] == pytest.approx(2 / middle)
    assert row["seconds"]["least"] <= middle <= row["seconds"]["most"]
    assert row["launches"] == 1
    eager = found["columns"][EAGER]["turns"]
    assert row["speedup"]["median"] == timing.ratios(eager, row["turns"])[0]
    assert found["columns"][EAGER]["speedup"] == {"median": 1.0, "least": 1.0, "most": 1.0}


def test_memory_is_the_allocators_and_what_autograd_keeps():
    x = torch.ones(1000, requires_grad=True)
    assert facts.saved_bytes(lambda: (x * 2).exp().sum()) == 4000  # exp keeps its result
    y = torch.ones(1000)
    assert facts.saved_bytes(lambda: x * y) == 4000
    assert facts.saved_bytes(lambda: x * y, [y]) == 0
    # `+ 1` makes a tensor of the number for a moment.
    assert 8000 <= facts.peak_bytes(lambda: torch.ones(1000) + 1, "cpu") <= 8016


def test_without_a_gpu_there_is_no_energy(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    meter = facts.Meter()
    assert meter.reason == "no CUDA device"
    assert meter.joules(lambda: None) is None
    assert meter.clocks() == {}


def test_runtimes_that_are_not_installed_say_so(monkeypatch):
    def missing(name):
        return Absent(f"{name} is not installed")

    monkeypatch.setattr(peers, "absent", missing)
    linear, x = torch.nn.Linear(2, 2), torch.ones(1, 2)
    assert peers.openvino(linear, (x,)) == missing("openvino")
    assert peers.onnx_runtime(linear, (x,)) == missing("onnxruntime")
    assert peers.diffusers_dit(None) == missing("diffusers")


# ---- the cases -------------------------------------------------------------------------------


def test_every_op_has_a_benchmark_on_every_device():
    for device in ("cpu", "cuda"):
        cases = suite.all_cases(device)
        assert len({c.id for c in cases}) == len(cases)
        assert {c.level for c in cases} == set(suite.LEVELS)
        ops = {c.name.partition(",")[0] for c in cases if c.level == "op"}  # "glu, no bias"
        assert ops == set(backends.OPS) - {"diffusion_step"}
        assert {c.dtype for c in cases if c.level == "op"} >= (
            {"fp32"} if device == "cpu" else {"bf16", "fp16"}
        )


def test_subsets_grow_and_unknown_ones_are_errors():
    cases = suite.all_cases("cpu")
    sizes = [len(chosen(cases, subset)) for subset in ("quick", "standard", "full")]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 3
    with pytest.raises(ValueError, match="subset: got 'all', allowed are quick, standard, full"):
        chosen(cases, "all")
    with pytest.raises(ValueError, match="--level: got 'ops', allowed are op, block"):
        suite.select("cpu", "quick", ["ops"])
    with pytest.raises(ValueError, match="no case fits"):
        suite.select("cpu", "quick", [], ["nonesuch"])


@pytest.mark.parametrize(
    ("module", "what"),
    [("bench_diffusion_step", "ddpm, noise given"), ("bench_diffusion_step", "ddim")],
)
def test_the_published_steps_are_fastdits_and_diffusers(module, what):
    case = next(c for c in importlib.import_module(module).cases("cpu") if c.what == what)
    problem = case.build()
    problem.columns.pop("torch.compile", None)
    assert {r["status"] for r in measure.checked(problem).values()} <= {"measured", "absent"}


def test_the_plain_model_is_fastdits_and_diffusers():
    bench = importlib.import_module("bench_model")
    problem = bench.problem(bench.models.DIGITS, 2, "fp32", "cpu")
    columns = (EAGER, OURS, bench.NATIVE, "diffusers")
    problem.columns = {k: problem.columns[k] for k in columns if k in problem.columns}
    for name, row in measure.checked(problem).items():
        assert row["status"] == "absent" or row.get("error", 0) <= 1e-5, name
    model, plain = bench.models.pair(bench.models.DIGITS, torch.float32, "cpu")
    x, t, y = bench.models.inputs(model, 2)
    assert plain(x, t, y).abs().max() > 0.01, "a model of zeros agrees with anything"


# ---- running ---------------------------------------------------------------------------------


def test_a_failed_case_does_not_end_a_run_and_is_named(monkeypatch):
    monkeypatch.setattr(suite.machine, "ceilings", lambda *_: {})

    def broken():
        raise RuntimeError("out of luck")

    cases = [
        Case("op", "a", "s", "forward", broken),
        Case("op", "b", "s", "forward", toy, seconds=0.05),
        Case("op", "c", "s", "forward", toy, seconds=0.05),
    ]
    seen = []
    run = suite.run(cases, "cpu", each=lambda c: seen.append(c.name), with_model=False)
    assert run["failed"] == {"a, forward: s, fp32": "RuntimeError: out of luck"}
    assert [r["name"] for r in run["results"]] == ["b", "c"]
    assert seen == ["a", "b", "c"]
    late = suite.run(cases[1:], "cpu", deadline=-1.0, with_model=False)
    assert late["left_out"] == [c.id for c in cases[1:]]
    assert late["results"] == []
    json.dumps(run, allow_nan=False)


def test_turns_are_replayed_to_pytest_benchmark():
    clock = running.Replay()
    clock.turns = iter([0.5, 0.25])
    clock.play()
    assert clock() == 0.5
    clock.play()
    assert clock() == 0.75


def test_numbers_for_readers():
    assert [results.significant(v) for v in (0, 1234.5, 12.345, 0.012345)] == [
        "0",
        "1230",
        "12.3",
        "0.0123",
    ]
    assert [results.in_units(s) for s in (2.5, 0.0123, 4.2e-6)] == ["2.5 s", "12.3 ms", "4.2 µs"]
