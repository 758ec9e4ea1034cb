"""Counts committed for one version of Triton: another lays code out differently."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import triton

TRITON = "3.8"


def hold_instructions(found: Mapping | Sequence, committed: Mapping | Sequence) -> None:
    """Warp instructions within 3 % of those committed, both ways: fewer want a new baseline.

    Call it last: on another version of Triton it skips what is left of the test.
    """
    if not triton.__version__.startswith(f"{TRITON}."):
        pytest.skip(f"instructions are committed for Triton {TRITON}, got {triton.__version__}")
    assert found == pytest.approx(committed, rel=0.03), f"{found}, committed are {committed}"
