"""Break every kernel on purpose and see that its tests notice.

    python tests/mutate_kernels.py                 # every list of mutations
    python tests/mutate_kernels.py patch rows      # tests/kernels/mutations_{patch,rows}.py

A list is a module `tests/kernels/mutations_*.py` with

    TESTS: dict[str, tuple[str, ...]]      # of each file, the test files that must fail
    MUTATIONS: list[tuple[str, str, str]]  # file, text that occurs in it once, replacement

All paths are relative to the repository, the file is one of `kernels/`. Each mutation is applied to
a copy of the repository in a temporary directory, where its tests run until the first failure, in a
fork of this process, which has imported the package but for its kernels; first of all they run
unbroken. Exits with 1 if a mutation survives or its tests cannot run.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("fastdit", "kernels", "tests")
# pytest's exit status when tests fail, or its end by a wild address, which an offset of too few
# bits is outside the traced interpreter. 0 is passed; any other could not run the tests.
KILLED = (1, -signal.SIGSEGV)


@dataclass(frozen=True)
class Mutation:
    """One change of one file, and the test files that must notice it."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def apply(self, root: Path) -> str:
        """Change the file under `root`; returns its text before.

        Raises:
            ValueError: the text to change is not there exactly once, or would not change.
        """
        path = root / self.file
        before = path.read_text()
        times = before.count(self.old)
        if times != 1 or self.old == self.new or not self.file.startswith("kernels/"):
            raise ValueError(
                f"{self.file}: got {self.old!r} {times} times, allowed is a change of 1 in kernels/"
            )
        path.write_text(before.replace(self.old, self.new))
        return before


def mutations(path: Path) -> list[Mutation]:
    """The mutations of one list."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return [Mutation(*change, tests=module.TESTS[change[0]]) for change in module.MUTATIONS]


def copy_of_the_tree(to: Path) -> None:
    """The package as an import finds it, without installing: `kernels` inside `fastdit` too."""
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "build")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, to / folder, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", to)
    (to / "fastdit" / "kernels").symlink_to(to / "kernels")


def preload(root: Path) -> None:
    """Import the copy under `root`, but no kernel of it."""
    os.environ.update(OPENBLAS_NUM_THREADS="1", TRITON_CACHE_DIR=str(root / ".triton"))
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(root))
    package, _ = importlib.import_module("fastdit"), importlib.import_module("fastdit.testing")
    assert Path(package.__file__).is_relative_to(root)
    assert "fastdit.kernels" not in sys.modules


def run_tests(root: Path, tests: list[str]) -> tuple[int, str]:
    """pytest's exit status under `root`, and the line of its first failure."""
    output = root / "output.txt"
    fork = multiprocessing.get_context("fork").Process(target=_run, args=(root, tests, output))
    fork.start()
    fork.join()
    lines = output.read_text().strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return fork.exitcode, (failed or lines or ["no output"])[-1]


def _run(root: Path, tests: list[str], output: Path) -> None:
    os.chdir(root)
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests])))


def main(argv: list[str] | None = None) -> int:
    """Apply every mutation, print the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("lists", nargs="*", help="names of lists; default: all")
    chosen = parser.parse_args(argv).lists
    paths = sorted((ROOT / "tests" / "kernels").glob("mutations_*.py"))
    paths = [p for p in paths if not chosen or p.stem.removeprefix("mutations_") in chosen]
    todo = [mutation for path in paths for mutation in mutations(path)]
    if not todo:
        parser.error(f"lists: got {chosen}, allowed are the names of tests/kernels/mutations_*.py")
    table = Table("file", "change", "result", title="Mutations", title_justify="left")
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        copy_of_the_tree(root)
        preload(root)
        tests = sorted({test for mutation in todo for test in mutation.tests})
        print("running the tests unbroken ...", flush=True)
        status, line = run_tests(root, tests)
        if status != 0:
            print(f"the tests fail unbroken: {line}")
            return 1
        for mutation in tqdm(todo, unit="mutation"):
            before = mutation.apply(root)
            status, line = run_tests(root, list(mutation.tests))
            (root / mutation.file).write_text(before)
            killed = status in KILLED
            bad += not killed
            result = "killed" if killed else "SURVIVED" if status == 0 else f"BROKEN: {line}"
            if not killed:
                tqdm.write(f"{result} {mutation.file}: {mutation.old} → {mutation.new}")
            table.add_row(mutation.file, f"{mutation.old}\n→ {mutation.new}", result)
    Console().print(table)
    print(f"{len(todo) - bad} of {len(todo)} killed")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
