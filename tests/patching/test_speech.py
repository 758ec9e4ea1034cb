"""F5-TTS's blocks, patched against themselves."""

from __future__ import annotations

import compare
import pytest
import torch
from speech import Speech
from test_research import GRADIENT_ULPS, OUTPUT_ULPS

import fastdit

SITES = {
    "DiTBlock": {"AdaLayerNorm": 2, "AdaLayerNorm_Final": 1, "DiTBlock": 2, "Sequential": 2},
    "MMDiTBlock": {"AdaLayerNorm": 3, "AdaLayerNorm_Final": 2, "MMDiTBlock": 2, "Sequential": 3},
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", SITES)
def test_outputs_every_gradient_report_and_undo(kind, masked):
    model = compare.randomise(Speech(kind))
    generator = torch.Generator().manual_seed(0)
    x, c, t = (torch.randn(*s, generator=generator) for s in ((2, 9, 32), (2, 5, 32), (2, 32)))
    mask = torch.arange(9) < torch.tensor([[9], [6]]) if masked else None

    def call(model):
        dtype = next(model.parameters()).dtype
        return model(x.to(dtype), c.to(dtype), t.to(dtype), mask)

    theirs = compare.run(model, call)
    before = compare.state(model)
    handle = fastdit.patch(model)
    with fastdit.backend("native"):
        out, grad = compare.worst(compare.run(model, call), theirs)
    assert 0 < out <= OUTPUT_ULPS
    assert grad <= GRADIENT_ULPS
    report = handle.report()
    replaced = [site.module for site in report.replaced]
    assert {name: replaced.count(name) for name in replaced} == SITES[kind]
    reasons = {site.reason for site in report.skipped}
    assert reasons == {"attention with projections apart; the op takes them packed"}
    handle.undo()
    assert all(torch.equal(v, theirs[k]) for k, v in compare.run(model, call).items())
    assert compare.state(model) == before
