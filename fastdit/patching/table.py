"""All rules, in the order in which they are asked."""

from __future__ import annotations

from fastdit.patching import (
    ace_step,
    auraflow,
    cogvideox,
    diffusers_basic,
    diffusers_dit,
    diffusers_norms,
    f5_tts,
    flux,
    flux2,
    gated,
    hunyuan,
    lumina2,
    lumina_next,
    published,
    published_model,
    sana,
    sd3,
    wan,
)
from fastdit.patching.rules import Rule

FAMILIES = (
    published_model,
    published,
    diffusers_basic,
    diffusers_dit,
    sd3,
    flux,
    flux2,
    hunyuan,
    sana,
    cogvideox,
    wan,
    lumina2,
    lumina_next,
    auraflow,
    ace_step,
    f5_tts,
    gated,
    diffusers_norms,
)
RULES: tuple[Rule, ...] = tuple(rule for family in FAMILIES for rule in family.RULES)


def rules_for(level: str) -> tuple[Rule, ...]:
    """The rules that a level installs."""
    return tuple(rule for rule in RULES if level == "fast" or rule.level == "exact")
