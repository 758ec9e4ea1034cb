"""`fastdit profile`: a run's time, split."""

from __future__ import annotations

import json

import pytest

from fastdit import Sampler, cli
from fastdit.digits import load_digits_model
from fastdit.profiling import CATEGORIES, category, gemm_peak, profile


@pytest.mark.parametrize(
    ("name", "ancestors", "expected"),
    [
        ("aten::addmm", ["aten::linear"], "matrix products"),
        ("aten::addmm", ["aten::linear", "conditioning"], "conditioning"),
        ("sm90_xmma_gemm_bf16", [], "matrix products"),
        ("fastdit::attention", [], "attention"),
        ("aten::_scaled_dot_product_flash_attention", [], "attention"),
        ("fastdit::gated_adaln", [], "fastdit's ops"),
        ("fastdit_native::diffusion_step", [], "update"),
        ("fastdit_native::dit_forward", [], "native forward"),
        ("aten::index_select", [], "conditioning"),
        ("aten::cat", [], "other ops"),
    ],
)
def test_categories(name, ancestors, expected):
    assert category(name, ancestors) == expected


def test_the_parts_are_the_whole(tmp_path):
    model = load_digits_model()
    sampler = Sampler(model, steps=4, cfg_scale=2.0, native=False)
    found = profile(sampler, [1, 2, 3], tmp_path / "a" / "trace.json")
    assert sum(found.seconds.values()) == pytest.approx(found.wall, rel=0.05)
    assert set(found.seconds) <= set(CATEGORIES)
    spent = ("matrix products", "attention", "fastdit's ops", "conditioning", "update")
    assert all(found.seconds[name] > 0 for name in spent)
    assert found.calls["update"] == 4 + 1  # the start noise is drawn by the same op
    assert found.calls["attention"] >= 4 * 3
    assert found.flops == 2 * model.flops() * 3 * 2 * 4
    assert found.launches == sum(found.calls.values()) / 4
    trace = json.loads((tmp_path / "a" / "trace.json").read_text())
    assert any(event.get("name") == "conditioning" for event in trace["traceEvents"])


def test_the_command(tmp_path, capsys):
    trace = tmp_path / "trace.json"
    cli.main(["profile", "--ckpt", "digits", "--steps", "2", "--trace", str(trace)])
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("share", "conditioning", "update", "GFLOP/s of"))
    assert trace.stat().st_size > 1000


def test_the_peak_is_a_rate():
    parameter = next(load_digits_model().parameters())
    assert 1e8 < gemm_peak(parameter.device, parameter.dtype) < 1e15
