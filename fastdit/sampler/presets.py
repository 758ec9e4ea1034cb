"""Samplers by quality, chosen from a table that docs/sampling.md prints."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"solver": "dpm++", "steps": 10, "spacing": "karras"},
    "balanced": {"solver": "dpm++", "steps": 20, "spacing": "karras"},
    "reference": {"solver": "ddpm", "steps": 250},
}
