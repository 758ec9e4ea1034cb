"""Samplers by quality, chosen from the table that docs/sampling.md prints.

The table is of the digits model that ships with fastdit (`python benchmarks/quality.py`): the share
of samples that a classifier recognises, and the Frechet distance of their pixels to real ones,
against evaluations of the model. `reference` is the published sampler. `fast` has the fewest
evaluations of those that are no farther from the real digits than it and recognised within half a
point of it. `balanced` is the nearest to the real digits of those within three quarters of a point.
"""

from __future__ import annotations

from typing import Any

from fastdit.ops._checks import fail

_DPM = {"solver": "dpm++", "spacing": "karras", "guidance_interval": (100, 700)}

PRESETS: dict[str, dict[str, Any]] = {
    "fast": {**_DPM, "steps": 10},
    "balanced": {**_DPM, "steps": 20},
    "reference": {"solver": "ddpm", "steps": 250},
}


def preset(quality: str) -> dict[str, Any]:
    """The options of a quality.

    Raises:
        ValueError: there is none of this name.
    """
    if quality not in tuple(PRESETS):
        fail("quality", repr(quality), ", ".join(map(repr, PRESETS)))
    return PRESETS[quality]
