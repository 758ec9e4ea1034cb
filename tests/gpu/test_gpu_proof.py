"""`fastdit gpu-proof` without a GPU: the dry run, and the record with a fake timer."""

from __future__ import annotations

import contextlib
import json
import re

import pytest
import torch
from op_cases import case_ids

from fastdit import backends, cli, reference
from fastdit.commands import gpu_proof
from fastdit.workloads import workloads


@pytest.fixture(scope="module")
def calls():
    return workloads("S", batch=2, latent=8, device="meta")


def test_every_op_has_a_workload_whose_traffic_is_the_designs(calls):
    least = {call.op: call.least_bytes() for call in calls}
    assert set(least) == set(backends.OPS)
    stream, modulation, statistics = 2 * 16 * 384 * 2, 2 * 384 * 2, 2 * 2 * 16 * 4
    assert least["adaln"]["forward"] == 2 * stream + 2 * modulation + statistics
    assert least["gated_adaln"]["forward"] == 4 * stream + 3 * modulation + statistics
    assert least["bias_gelu"] == {
        "forward": 2 * 4 * stream + 4 * 384 * 2,
        "backward": 3 * 4 * stream + 2 * 4 * 384 * 2,
    }
    assert least["glu"] == {  # packed, with a bias: two thirds of four times the width
        "forward": 3 * 2 * 16 * 1024 * 2 + 2048 * 2,
        "backward": 5 * 2 * 16 * 1024 * 2 + 2 * 2048 * 2,
    }
    assert least["unpatchify"] == {"forward": 2 * 2 * 8 * 64 * 2, "backward": 2 * 2 * 8 * 64 * 2}
    assert "backward" not in least["diffusion_step"]
    with pytest.raises(ValueError, match="size: got 'XS', allowed are S, B, L, XL"):
        workloads("XS")


def test_dry_run_does_everything_but_launch(capsys):
    cli.main(["gpu-proof", "--dry-run", "--size", "S", "--batch", "2", "--gpu", "A100"])
    printed = capsys.readouterr().out
    (count,) = re.findall(r"tests that a GPU would run: (\d+)", printed)
    assert int(count) >= 8 * len(case_ids())  # these for every op and option, and others
    assert all(op in printed for op in backends.OPS)
    assert "modelled for a A100" in printed
    assert "stopped before the first launch" in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so():
    with pytest.raises(SystemExit, match="no CUDA device here; --dry-run does everything"):
        cli.main(["gpu-proof"])


def test_outside_a_checkout_it_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="run this in a checkout, or with --skip-tests"):
        cli.main(["gpu-proof", "--dry-run"])


def test_without_pytest_it_says_so_and_reports_no_tests(monkeypatch):
    monkeypatch.setattr(gpu_proof.importlib.util, "find_spec", lambda name: None)
    for collect_only in (True, False):
        with pytest.raises(ValueError, match=r"pytest is not installed.*--skip-tests"):
            gpu_proof.run_tests(collect_only)


def test_rows_hold_measured_beside_modelled():
    """On the CPU with a fake timer, and a fake kernel: everything runs once and is recorded."""
    times = iter(range(100, 200))

    def timer(function):
        function()
        at = float(next(times))
        return at - 1, at, at + 1

    call = next(c for c in workloads("S", 2, latent=8, device="cpu") if c.op == "bias_gelu")
    with backends.replaced("bias_gelu", "cpu", []):
        (plain, *_) = gpu_proof.measure(call, "H100", timer)
    assert plain["kernel"] is None
    assert "no kernel is registered" in plain["why_not"]
    with contextlib.ExitStack() as replaced:
        for name in ("bias_gelu", "bias_gelu_backward"):
            kernel = backends.Kernel(name, "cpu", "fake", getattr(reference, name))
            replaced.enter_context(backends.replaced(name, "cpu", [kernel]))
        forward, backward = gpu_proof.measure(call, "H100", timer)
    assert (forward["pass"], backward["pass"]) == ("forward", "backward")
    assert forward["kernel"] == "fake"
    native, eager = forward["measured_us"]["p50"], forward["eager_us"]
    assert forward["speedup"] == eager / native
    assert forward["measured_over_modelled"] == native / forward["modelled_us"]
    assert forward["terabytes_per_second"] == pytest.approx(forward["bytes"] / native / 1e6)


def test_a_run_writes_one_file(tmp_path, monkeypatch, capsys):
    """With a GPU to believe in: the tests' counts, the rows, versions and the file's name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(
        gpu_proof, "run_tests", lambda collect_only, seconds: {"passed": 3, "failed": 1}
    )
    on_cpu = workloads("S", 1, latent=4, device="cpu")[-2:]
    monkeypatch.setattr(gpu_proof, "workloads", lambda *_args, **_kwargs: on_cpu)
    monkeypatch.setattr(gpu_proof, "bench", lambda function: (function(), (1.0, 2.0, 3.0))[1])
    with pytest.raises(SystemExit) as exit_status:
        cli.main(["gpu-proof"])
    assert exit_status.value.code == 1  # a test failed
    (path,) = (tmp_path / "benchmarks" / "results").iterdir()
    assert path.name.startswith("gpu-proof-nvidia-h100-80gb-hbm3-")
    found = json.loads(path.read_text())
    assert found["tests"] == {"passed": 3, "failed": 1}
    assert found["data_sheet"] == "H100"
    assert [(r["op"], r["pass"]) for r in found["rows"]] == [
        ("unpatchify", "forward"),
        ("unpatchify", "backward"),
        ("diffusion_step", "forward"),
    ]
    assert all(r["eager_us"] == 2.0 and r["modelled_us"] > 0 for r in found["rows"])
    assert "wrote" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("device", "sheet"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("AMD Instinct MI300X", "MI300X"),
        ("Tesla V100-SXM2-16GB", None),
        ("NVIDIA GeForce RTX 4070", None),
    ],
)
def test_data_sheets_by_device_name(device, sheet):
    assert gpu_proof.data_sheet(device) == sheet
