"""`fastdit build`: compile the C++ and CUDA library now, instead of at the first use."""

from __future__ import annotations

import argparse

from fastdit import native
from fastdit._build import BuildError

SUMMARY = "compile the C++ and CUDA kernels"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add = parser.add_argument
    add("--cuda", action=argparse.BooleanOptionalAction, help="default: if nvcc is found")
    add("--force", action="store_true", help="compile again even if it is built")
    add("--jobs", type=int, help="compilers at once (default: MAX_JOBS, else the processors)")
    add("--verbose", action="store_true", help="show every command")


def run(args: argparse.Namespace) -> None:
    """Build, print the path."""
    try:
        path, seconds = native.build(
            args.cuda, force=args.force, jobs=args.jobs, verbose=args.verbose
        )
    except BuildError as error:
        raise SystemExit(f"fastdit build: {error}") from None
    print(f"{path}: {'already built' if seconds is None else f'built in {seconds:.1f} s'}")
