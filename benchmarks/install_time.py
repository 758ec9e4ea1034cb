"""How long installing fastdit takes, and its first use, in fresh environments.

    python benchmarks/install_time.py [--repeats 3] [--cuda]

Every row is a new virtual environment in which the dependencies are installed already (links to
those of this Python; torch alone would take longer than all that is measured), a new copy of the
checkout and an empty cache. `pip install -e .` builds in isolation, as it does for users; what pip
needs for that comes from its cache. Then the first call of an op, in a new process, after the
imports. Seconds on the clock and, in brackets, of all processors: medians of the repeats.
"""

from __future__ import annotations

import argparse
import os
import shutil
import site
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OURS = ("fastdit", "__editable__", "pip", "setuptools", "pkg_resources", "_distutils_hack")
TOOLS = ("c++", "g++", "clang++", "nvcc")
FIRST_CALL = """
import time, torch, fastdit
x = torch.randn(2, 3, 8)
start = time.perf_counter(), sum(__import__('os').times()[:4])
fastdit.ops.adaln(x)
print(time.perf_counter() - start[0], sum(__import__('os').times()[:4]) - start[1])
print(fastdit.explain('adaln', x)[0].runs)
"""


@dataclass(frozen=True)
class Row:
    """What is there, and how it is told to pip and to the first use."""

    name: str
    compiler: bool = True
    pip: dict[str, str] = field(default_factory=dict)


ROWS = (
    Row("a compiler"),
    Row("a compiler, FASTDIT_BUILD=0 in pip", pip={"FASTDIT_BUILD": "0"}),
    Row("no compiler", compiler=False),
)


def copy_checkout(to: Path) -> None:
    """The files that git knows, as they are now."""
    names = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in filter(None, names.split("\0")):
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, to / name)


def link_dependencies(to: Path, cuda: bool) -> None:
    """Every package of this Python but fastdit and pip's own, and NVIDIA's only if `cuda`."""
    for folder in (Path(path) for path in sys.path if path.endswith("site-packages")):
        for entry in folder.iterdir():
            skipped = entry.name.startswith(OURS) or entry.suffix == ".pth"
            if skipped or (entry.name.startswith("nvidia") and not cuda):
                continue
            if not (to / entry.name).exists():
                (to / entry.name).symlink_to(entry)


def path_without(tools: tuple[str, ...], to: Path) -> str:
    """A PATH of links to all that this one finds but `tools`."""
    to.mkdir()
    for folder in os.environ["PATH"].split(os.pathsep):
        for entry in Path(folder).glob("*") if Path(folder).is_dir() else ():
            if entry.name not in tools and not (to / entry.name).exists():
                (to / entry.name).symlink_to(entry)
    return str(to)


def timed(command: list[str], folder: Path, environment: dict[str, str]) -> tuple[float, float]:
    """Seconds on the clock and of processors."""
    before, start = os.times(), time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    wall, after = time.perf_counter() - start, os.times()
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    spent = after.children_user + after.children_system
    return wall, spent - before.children_user - before.children_system


def measure(row: Row, cuda: bool) -> tuple[tuple[float, float], tuple[float, float], str]:
    """The install, the first call, and what that said and ran."""
    with tempfile.TemporaryDirectory(prefix="fastdit-install-") as name:
        folder = Path(name)
        venv.create(folder / "venv", with_pip=True)
        python = folder / "venv" / "bin" / "python"
        packages = site.getsitepackages([str(folder / "venv")])[0]
        link_dependencies(Path(packages), cuda)
        copy_checkout(folder / "checkout")
        hidden = ("CXX", "CUDA_HOME", "CUDA_PATH", "FASTDIT_BUILD", "PYTHONPATH", "PYTHONHOME")
        environment = {key: value for key, value in os.environ.items() if key not in hidden}
        environment["FASTDIT_CACHE"] = str(folder / "cache")
        missing = TOOLS if not row.compiler else () if cuda else ("nvcc",)
        environment["PATH"] = path_without(missing, folder / "bin")
        install = [str(python), "-m", "pip", "install", "-q", "-e", "."]
        installed = timed(install, folder / "checkout", {**environment, **row.pip})
        first = subprocess.run(
            [str(python), "-c", FIRST_CALL],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
        )
        if first.returncode:
            raise SystemExit(first.stderr)
        times, runs = first.stdout.splitlines()
        wall, spent = map(float, times.split())
        said = first.stderr.strip().replace(name, "…").splitlines()
        return installed, (wall, spent), f"{runs}; {len(said)} lines: {' / '.join(said)}"


def seconds(found: list[tuple[float, float]]) -> str:
    wall, spent = (statistics.median(numbers) for numbers in zip(*found, strict=True))
    return f"{wall:.1f} s ({spent:.1f} s)" if wall >= 0.1 else f"{1000 * wall:.1f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=3, help="of each row (default 3)")
    parser.add_argument("--cuda", action="store_true", help="leave nvcc where it is")
    options = parser.parse_args()
    print(f"{'':36} {'pip install -e .':>18} {'first call':>18}   it ran; stderr")
    for row in ROWS:
        found = [measure(row, options.cuda) for _ in range(options.repeats)]
        installs, firsts, said = zip(*found, strict=True)
        print(
            f"{row.name:36} {seconds(installs):>18} {seconds(firsts):>18}   {said[-1]}", flush=True
        )


if __name__ == "__main__":
    main()
