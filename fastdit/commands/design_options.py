"""The command line's names for the fields of `fastdit.designs.Design`, and its presets."""

from __future__ import annotations

import argparse
from typing import Any

from fastdit.designs import PUBLISHED, VALUES, presets


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare `--preset` and an option for each choice; what is not given is the preset's."""
    group = parser.add_argument_group("design", "what the model may be besides the published one")
    group.add_argument("--preset", choices=presets, default="published", help="default published")
    for name, values in VALUES.items():
        option, shown = f"--{name.replace('_', '-')}", f"default {getattr(PUBLISHED, name)}"
        if all(isinstance(value, bool) for value in values):
            action = argparse.BooleanOptionalAction
            group.add_argument(option, action=action, default=None, help=shown)
        else:
            choices = [str(value).lower() for value in values]
            group.add_argument(option, choices=choices, help=shown)
    group.add_argument(
        "--frequency-dim", type=int, help=f"of the timestep (default {PUBLISHED.frequency_dim})"
    )


def options_from(args: argparse.Namespace) -> dict[str, Any]:
    """The preset's options with those given over them."""
    names = (*VALUES, "frequency_dim")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if given.get("qk_norm") == "none":
        given["qk_norm"] = None
    return {**presets[args.preset], **given}
