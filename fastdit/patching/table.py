"""All rules, in the order in which they are asked."""

from __future__ import annotations

from fastdit.patching import published, published_model
from fastdit.patching.rules import Rule

RULES: tuple[Rule, ...] = (*published_model.RULES, *published.RULES)


def rules_for(level: str) -> tuple[Rule, ...]:
    """The rules that a level installs."""
    return tuple(rule for rule in RULES if level == "fast" or rule.level == "exact")
