"""The presets follow from the committed table of quality, and the docs print that table."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from fastdit import Sampler
from fastdit.digits import load_digits_model
from fastdit.sampler import PRESETS

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def quality():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import quality
    finally:
        sys.path.pop(0)
    return quality


@pytest.fixture(scope="module")
def rows(quality):
    found = json.loads(quality.RESULTS.read_text())["rows"]
    return [
        {**row, "recognised": np.mean(row["recognised"]), "frechet": np.mean(row["frechet"])}
        for row in found
    ]


def test_the_presets_are_the_tables_choice(quality, rows):
    (reference,) = (row for row in rows if quality.preset(row) == "reference")

    def within(points: float) -> list[dict]:
        return [row for row in rows if row["recognised"] >= reference["recognised"] - points / 100]

    near = [row for row in within(0.5) if row["frechet"] <= reference["frechet"]]
    cheapest = min(near, key=lambda row: (row["evaluations"], row["frechet"]))
    nearest = min(within(0.75), key=lambda row: row["frechet"])
    assert quality.preset(cheapest) == "fast"
    assert quality.preset(nearest) == "balanced"


def test_the_docs_print_the_table(quality):
    text = quality.DOCS.read_text()
    results = json.loads(quality.RESULTS.read_text())
    assert quality.documented(text, results) == text
    assert all(f"`{name}` |" in text for name in PRESETS)


def test_frechet_is_scipys(quality):
    linalg = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((200, 5)), rng.standard_normal((300, 5)) @ np.diag([1, 2, 3, 1, 1])
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    want = np.square(a.mean(0) - b.mean(0)).sum()
    want += np.trace(first + second - 2 * linalg.sqrtm(first @ second).real)
    assert quality.frechet(a, b) == pytest.approx(want)


@pytest.mark.parametrize("quality_name", PRESETS)
def test_a_quality_is_its_preset_and_yields_to_what_is_given(quality, rows, quality_name):
    model = load_digits_model()
    sampler = Sampler(model, quality=quality_name)
    (row,) = (row for row in rows if quality.preset(row) == quality_name)
    assert quality.evaluations(sampler) == row["evaluations"]
    assert len(Sampler(model, quality=quality_name, steps=3).plan) == 3


def test_an_unknown_quality_is_named():
    with pytest.raises(ValueError, match="quality: got 'best', allowed is 'fast', 'balanced'"):
        Sampler(load_digits_model(), quality="best")
