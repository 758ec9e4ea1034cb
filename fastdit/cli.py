"""The `fastdit` command."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

from fastdit._version import __version__

COMMANDS = {
    "demo": "fastdit.commands.demo",
    "sample": "fastdit.commands.sample",
    "train": "fastdit.commands.train",
    "models": "fastdit.commands.models",
    "inspect": "fastdit.commands.inspect",
    "profile": "fastdit.commands.profile",
    "build": "fastdit.commands.build",
    "doctor": "fastdit.commands.doctor",
    "bench": "fastdit.commands.bench",
    "gpu-proof": "fastdit.commands.gpu_proof",
}
"""Each sub-command and the module with its `SUMMARY`, `add_arguments` and `run`."""


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command and its sub-commands."""
    parser = argparse.ArgumentParser(
        prog="fastdit", description="Fast, exact Diffusion Transformers"
    )
    parser.add_argument("--version", action="version", version=f"fastdit {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, path in COMMANDS.items():
        module = importlib.import_module(path)
        sub = commands.add_parser(name, help=module.SUMMARY, description=module.__doc__)
        sub.formatter_class = argparse.RawDescriptionHelpFormatter
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run a sub-command; what the user can mend is one line, not a traceback."""
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"fastdit {args.command}: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
