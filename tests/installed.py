"""A copy of the package with a small csrc/ and a cache of its own, for tests of the build."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

import forked
import pytest

ROOT = Path(__file__).resolve().parent.parent
COMPILER = shutil.which("c++")
USE = """
import torch, fastdit
x = torch.randn(2, 3, 8)
expected = torch.nn.functional.layer_norm(x, (8,), eps=1e-6)
if not torch.allclose(fastdit.ops.adaln(x), expected, atol=1e-5):
    raise SystemExit("wrong")
fastdit.ops.adaln(x)
try:
    print("library", torch.ops.fastdit_native.build_info())
except (AttributeError, RuntimeError):
    print("reference")
"""
NEEDS = [
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="written for Linux"),
]


class Installed:
    """A copy of the package with a csrc/ of library.cpp alone, a cache and compilers of its own."""

    def __init__(self, folder: Path) -> None:
        self.site, self.cache = folder / "site", folder / "cache"
        self.package, self.csrc = self.site / "fastdit", self.site / "fastdit" / "csrc"
        ignored = shutil.ignore_patterns("*.so", "weights")
        shutil.copytree(ROOT / "fastdit", self.package, ignore=ignored)
        shutil.copytree(ROOT / "kernels", self.package / "kernels", ignore=ignored)
        (self.csrc / "cpu" / "isa").mkdir(parents=True)
        (self.csrc / "cuda").mkdir()
        shutil.copy(ROOT / "csrc" / "library.cpp", self.csrc)
        (self.package / "native_kernels" / "__init__.py").write_text("MODULES = ()\n")
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "PYTHONPATH": str(self.site),
            "FASTDIT_CACHE": str(self.cache),
        }
        self.folder = folder

    def compiler(self, script: str) -> None:
        """Compile with one that runs `script`, then the real one; its version is always told."""
        path = self.folder / "compiler"
        real = f'exec {COMPILER} "$@"'
        path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && {real}\n{script}\n{real}\n')
        path.chmod(0o755)
        self.environment["CXX"] = str(path)

    def start(self, code: str = USE) -> forked.Process:
        return forked.Process(code, self.folder, self.environment)

    def run(self, code: str = USE) -> tuple[int, str, str]:
        """Exit status, standard output and standard error of Python running `code`."""
        return self.start(code).wait()

    def build(self):
        """The copy's `_build`, loaded by its path as setup.py does, for this process."""
        name = f"build_of_{id(self)}"
        path = self.package / "_build" / "__init__.py"
        spec = importlib.util.spec_from_file_location(
            name, path, submodule_search_locations=[str(path.parent)]
        )
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def libraries(self) -> list[Path]:
        return sorted(self.cache.glob("*-torch*/*.so"))
