"""`fastdit build`: compile the C++ and CUDA library now, instead of at the first use."""

from __future__ import annotations

import argparse

from fastdit import native
from fastdit._build import BuildError, CompileError

SUMMARY = "compile the C++ and CUDA kernels"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add = parser.add_argument
    add("--cuda", action=argparse.BooleanOptionalAction, help="default: if nvcc is found")
    add("--force", action="store_true", help="compile everything even if it is built")
    add("--jobs", type=int, help="compilers at once (default: MAX_JOBS, else the processors)")
    add("--verbose", action="store_true", help="show every command")


def run(args: argparse.Namespace) -> None:
    """Build; print the path, how long it took, what is in it."""
    if args.jobs is not None and args.jobs < 1:
        raise ValueError(f"--jobs: got {args.jobs}, allowed is 1 or more")
    try:
        path, seconds = native.build(
            args.cuda, force=args.force, jobs=args.jobs, verbose=args.verbose
        )
    except CompileError as error:
        raise SystemExit(f"{error.output}\nfastdit build: {error}") from None
    except BuildError as error:
        raise SystemExit(f"fastdit build: {error}") from None
    took = "already built" if seconds is None else f"built in {seconds:.1f} s"
    print(f"{path}: {took}, {path.stat().st_size / 1e6:.1f} MB")
