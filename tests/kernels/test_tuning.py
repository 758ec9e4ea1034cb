"""Autotuning with a fake GPU and a fake timer: what is timed, kept, shared, and survived."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
from dataclasses import dataclass

import patch_cases
import pytest
import torch
import triton
from attention_cases import Case, fused, make
from patch_cases import seeded

from fastdit.kernels import (
    adaln,
    bias_gelu,
    gated_adaln,
    gated_residual,
    glu,
    patch_embed,
    tuning,
    unpatchify,
)


@dataclass(frozen=True)
class Row:
    block: int
    num_warps: int = 4


SLOW, FAST, BROKEN = Row(64), Row(128), Row(1 << 20)


class Timed:
    """Counts what is timed; 128 is the fastest, and 2^20 does not fit."""

    last: Row | None = None

    def __init__(self) -> None:
        self.ran: list[Row] = []

    def __call__(self, row: Row) -> None:
        self.ran.append(row)
        Timed.last = row
        if row == BROKEN:
            raise triton.runtime.errors.OutOfResources(1 << 20, 1 << 16, "shared memory")


def a_gpu(monkeypatch, tmp_path, name="NVIDIA H100 80GB HBM3"):
    """A GPU to believe in, an empty cache, autotuning on."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def benchmark(function):
        function()
        return 1.0 if Timed.last == FAST else 2.0

    monkeypatch.setattr(tuning, "benchmark", benchmark)
    monkeypatch.setitem(tuning._state, "enabled", True)
    forget(monkeypatch)


def forget(monkeypatch):
    """As in a new process."""
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(tuning, "_read", set())


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    a_gpu(monkeypatch, tmp_path)
    return tmp_path / "fastdit"


def choose(run, key=(1024, torch.bfloat16)):
    return tuning.choose("op", key, SLOW, [SLOW, FAST, BROKEN], run)


def files(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def test_off_by_default_nothing_is_timed():
    run = Timed()
    assert choose(run) == SLOW
    assert run.ran == []


def test_the_fastest_is_chosen_once_and_stored(gpu, monkeypatch):
    run = Timed()
    assert choose(run) == FAST
    assert run.ran == [SLOW, FAST, BROKEN]
    assert choose(run) == FAST
    assert len(run.ran) == 3
    name = f"autotune-nvidia-h100-80gb-hbm3-triton-{triton.__version__}.json"
    assert files(gpu) == [name]
    (row,) = json.loads((gpu / name).read_text())["op"].values()
    assert row == {"config": {"block": 128, "num_warps": 4}, "microseconds": 1.0}
    forget(monkeypatch)  # another process
    assert choose(run) == FAST
    assert len(run.ran) == 3


def test_another_shape_dtype_device_or_version_is_timed_anew(gpu, monkeypatch):
    run = Timed()
    for key in ((1024, torch.bfloat16), (2048, torch.bfloat16), (1024, torch.float32)):
        choose(run, key)
    assert len(run.ran) == 9
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA B200")
    choose(run)
    monkeypatch.setattr(triton, "__version__", "9.9.9")
    choose(run)
    assert len(run.ran) == 15
    assert len(files(gpu)) == 3


def test_shape_classes():
    assert [tuning.shape_class(n) for n in (1, 5, 8, 8193)] == [1, 8, 8, 16384]


def test_a_choice_that_the_table_no_longer_has_is_timed_again(gpu, monkeypatch):
    choose(Timed())
    forget(monkeypatch)
    run = Timed()
    assert tuning.choose("op", (1024, torch.bfloat16), SLOW, [Row(32)], run) == SLOW
    assert run.ran == [SLOW, Row(32)]


def test_where_nothing_can_run_the_default_tells_why(gpu):
    assert tuning.choose("op", (), BROKEN, [], Timed()) == BROKEN
    assert not gpu.exists()


def test_capturing_a_graph_times_nothing(gpu, monkeypatch):
    run = Timed()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose(run) == SLOW
    assert run.ran == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    choose(run)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose(run) == FAST


@pytest.mark.parametrize("content", ["", '{"op": {"k', "[1, 2]", '{"op": 3}', '{"op": {"k": 4}}'])
def test_a_corrupt_file_is_reported_and_replaced(gpu, monkeypatch, content):
    choose(Timed())
    (name,) = files(gpu)
    (gpu / name).write_text(content)
    forget(monkeypatch)
    with pytest.warns(
        RuntimeWarning, match="autotune: cannot read .*; its choices are timed again"
    ):
        assert choose(Timed()) == FAST
    assert "op" in json.loads((gpu / name).read_text())
    assert files(gpu) == [name]


def test_a_write_that_is_cut_off_leaves_the_old_file(gpu, monkeypatch):
    choose(Timed())
    (name,) = files(gpu)
    before = (gpu / name).read_text()

    def cut_off(*_args, **_kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", cut_off)
    with pytest.warns(RuntimeWarning, match="cannot write .*no space left.*as this process"):
        assert choose(Timed(), (2048, torch.bfloat16)) == FAST
    assert (gpu / name).read_text() == before
    assert files(gpu) == [name]  # and no half-written file beside it
    run = Timed()
    assert choose(run, (2048, torch.bfloat16)) == FAST
    assert run.ran == []


def test_a_directory_that_cannot_be_made(gpu, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match="autotune: cannot (read|write)"):
        assert choose(Timed()) == FAST


def _another_process(path, barrier, number):
    with pytest.MonkeyPatch.context() as patch:
        a_gpu(patch, path)
        barrier.wait()
        for index in range(5):
            choose(Timed(), (number, index))


def test_two_processes_lose_nothing_of_each_other(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    workers = [
        context.Process(target=_another_process, args=(tmp_path, barrier, n)) for n in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    (path,) = (tmp_path / "fastdit").glob("*.json")
    assert len(json.loads(path.read_text())["op"]) == 10


def test_without_a_gpu_it_is_refused_or_ignored_with_the_reason(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="autotune: there is no GPU to time on"):
        tuning.enable()
    monkeypatch.setitem(tuning._state, "enabled", True)  # as by FASTDIT_AUTOTUNE=1
    run = Timed()
    with pytest.warns(RuntimeWarning, match="no GPU to time on; the tables of heuristics stand"):
        assert choose(run) == SLOW
    assert run.ran == []


def test_enable_and_disable(gpu):
    tuning.disable()
    assert choose(Timed()) == SLOW
    tuning.enable()
    assert choose(Timed()) == FAST


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return seeded(*shape, seed=seed)


def adaln_both():
    x, dout, (shift, scale) = rows(2, 3, 72), rows(2, 3, 72, seed=1), rows(2, 2, 72).unbind(0)
    modulation, options = (shift, scale, None, None), ("layer", True)
    out, mean, rstd = adaln.adaln(x, *modulation, 1e-6, *options)
    return out, *adaln.adaln_backward(dout, x, mean, rstd, *modulation, *options)


def gated_adaln_both():
    x, y, dout = (rows(2, 3, 72, seed=seed) for seed in range(3))
    gate, shift, scale = rows(3, 2, 72).unbind(0)
    modulation, options = (shift, scale, None, None), ("layer", True)
    h, out, mean, rstd = gated_adaln.gated_adaln(x, y, gate, *modulation, 1e-6, *options)
    gradients = gated_adaln.gated_adaln_backward(
        dout, dout, h, mean, rstd, y, gate, *modulation, *options
    )
    return h, out, *gradients


def gated_residual_both():
    x, y, gate = rows(2, 3, 72), rows(2, 3, 72, seed=1), rows(2, 72)
    h = gated_residual.gated_residual(x, y, gate)
    return h, *gated_residual.gated_residual_backward(h, y, gate)


def attention_both():
    call = make(Case(16, 1, 40, torch.float32))
    return tuple(fused(call).values())


def bias_gelu_both():
    x, bias, dout = rows(40, 96), rows(96, seed=1), rows(40, 96, seed=2)
    return bias_gelu.bias_gelu(x, bias), *bias_gelu.bias_gelu_backward(dout, x, bias)


def glu_both():
    x, bias, dout = rows(40, 192), rows(192, seed=1), rows(40, 96, seed=2)
    args = (x, None, bias, "silu", True)
    return glu.glu(*args), *glu.glu_backward(dout, *args)


def patch_embed_both():
    args, dtokens = patch_cases.patch_inputs((3, 2, (4, 4), (2, 2), 40), torch.float32)
    back = patch_embed.patch_embed_backward
    return patch_embed.patch_embed(*args), *back(dtokens, *args, patch_cases.ALL)


def unpatchify_both():
    sizes = ([2, 2], [1, 64], 16)
    image = unpatchify.unpatchify(rows(1, 64, 64), *sizes)
    return image, unpatchify.unpatchify_backward(image, *sizes)


LAUNCHERS = {
    adaln_both: ("adaln", "adaln_backward"),
    gated_adaln_both: ("gated_adaln", "gated_adaln_backward"),
    gated_residual_both: ("gated_residual", "gated_residual_backward"),
    attention_both: ("attention", "attention_backward_dq", "attention_backward_dkv"),
    bias_gelu_both: ("bias_gelu", "bias_gelu_backward"),
    glu_both: ("glu", "glu_backward"),
    patch_embed_both: ("patch_embed", "patch_embed_backward"),
    unpatchify_both: ("unpatchify", "unpatchify_backward"),
}


class Compared:
    """Runs a candidate in place of timing it, and holds what it writes against what those before it
    wrote: to the same tensor, or to one of the same kernel, argument and shape."""

    def __init__(self, gpu: patch_cases.VirtualGPU) -> None:
        self.gpu, self.written, self.compared = gpu, {}, []
        self.times = itertools.count(1000, -1)  # the last candidate is the fastest

    def __call__(self, run, row) -> float:
        before = len(self.gpu.launches)
        run(row)
        stored = [
            (launch.name, name, launch.arguments[name])
            for launch in self.gpu.launches[before:]
            for name in launch.trace.stored
        ]
        self.compared.append(sum(self.compare(run, *one) for one in stored))
        for _, _, tensor in stored:  # or the next candidate could leave it as it is
            tensor.fill_(float("nan"))
        return float(next(self.times))

    def compare(self, run, *written) -> bool:
        kernel, name, tensor = written
        places = (run, tensor.data_ptr()), (run, kernel, name, tensor.shape)
        known = [self.written[place] for place in places if place in self.written]
        for _, before in known:
            torch.testing.assert_close(tensor.reshape(before.shape), before, rtol=1e-5, atol=2e-6)
        # The tensors are kept, lest another takes their address.
        self.written.update(dict.fromkeys(places, (tensor, tensor.clone())))
        return bool(known)


@pytest.mark.parametrize("both", LAUNCHERS, ids=lambda both: both.__name__)
def test_every_launcher_tunes(gpu, monkeypatch, both):
    """Every candidate runs within bounds and computes the same, also the one that is chosen."""
    tuning.disable()
    default, _ = patch_cases.run(both)
    tuning.enable()
    with patch_cases.VirtualGPU("sm_90") as virtual:
        compared = Compared(virtual)
        monkeypatch.setattr(tuning, "_time", compared)
        tuned = both()
    for got, want in zip(tuned, default, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-6)
    (name,) = files(gpu)
    stored = json.loads((gpu / name).read_text())
    assert set(stored) == set(LAUNCHERS[both])
    assert compared.compared.count(0) == len(stored)  # the first of each launcher
    assert len(compared.compared) >= 2 * len(stored)
