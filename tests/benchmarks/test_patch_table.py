"""docs/patching.md has a row for every family that benchmarks/bench_patch.py measures."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import bench_patch


def test_every_family_has_a_row():
    table = bench_patch.TABLE.search(bench_patch.DOCS.read_text(encoding="utf-8")).group(0)
    names = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()[3:-1]]
    assert tuple(names) == bench_patch.wide_families.NAMES


def test_the_table_is_written_from_rows():
    rows = [["DiT", *"abcdefgh"]]
    assert bench_patch.markdown(rows).splitlines()[2] == "| DiT | a | b | c | d | e | f | g | h |"
    assert bench_patch.spread([2.0, 1.0, 1.5]) == "1.50 (1.00–2.00)"
