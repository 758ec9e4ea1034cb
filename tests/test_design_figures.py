"""The paper's figures: parameters and Gflops of its sizes and designs, and of its resolutions."""

from __future__ import annotations

import pytest
import torch

import fastdit
from fastdit import cli
from fastdit.commands.models import PAPER_DESIGNS, PAPER_SIZES


def meta(name: str, **options) -> fastdit.DiT:
    with torch.device("meta"):
        return fastdit.DiT_models[name](**options)


# The paper's figures


@pytest.mark.parametrize("size", PAPER_SIZES)
def test_gflops_of_the_twelve_models(size):
    for patch, paper in PAPER_SIZES[size][1].items():
        found = meta(f"DiT-{size}/{patch}").flops() / 1e9
        assert found == pytest.approx(paper, rel=2.5e-4, abs=0.0055)  # printed with two decimals


@pytest.mark.parametrize("conditioning", PAPER_DESIGNS)
def test_parameters_and_gflops_of_the_four_designs(conditioning):
    model = meta("DiT-XL/2", conditioning=conditioning)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    millions, gflops = PAPER_DESIGNS[conditioning]
    assert round(count / 1e6) == millions
    assert model.flops() / 1e9 == pytest.approx(gflops, rel=2e-4)


def test_the_command_prints_our_figures_beside_the_papers(capsys):
    cli.main(["models"])
    lines = [line.split("│") for line in capsys.readouterr().out.splitlines()]
    rows = {cells[1].strip(): [c.strip() for c in cells[2:6]] for cells in lines if len(cells) > 5}
    assert rows["DiT-XL/2"] == ["674.8", "675", "118.62", "118.64"]
    assert rows["cross_attention"] == ["598.0", "598", "137.60", "137.62"]
    assert rows["in_context"] == ["449.2", "449", "119.35", "119.37"]
    assert {"preset literal", "preset lightningdit"} < set(rows)


def test_gflops_of_512_pixels():
    assert meta("DiT-XL/2", input_size=64).flops() / 1e9 == pytest.approx(524.60, rel=2e-4)
    assert meta("DiT-XL/2", any_size=True).flops(64) == meta("DiT-XL/2", input_size=64).flops()
