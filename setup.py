"""fastdit's build: the package itself, the top-level `kernels/` as `fastdit.kernels`, and `csrc/`.

The compiled library is built here only where torch is already installed and a compiler is found;
otherwise the first use builds it. FASTDIT_BUILD=0 leaves it out, FASTDIT_BUILD=1 makes a failure an
error. pip hides what is printed here, unless it is told `-v`.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
PACKAGES = {"fastdit": "fastdit", "fastdit.kernels": "kernels"}


def load_builder():
    """`fastdit/_build`, without importing fastdit, which needs torch."""
    folder = HERE / "fastdit" / "_build"
    spec = importlib.util.spec_from_file_location(
        "fastdit_build", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = sys.modules["fastdit_build"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = load_builder()


class Fresh(build_py):
    """Copy the package into an empty folder: what an older checkout left does not ship."""

    def run(self) -> None:
        shutil.rmtree(Path(self.build_lib) / "fastdit", ignore_errors=True)
        super().run()


class BuildLibrary(build_ext):
    """Build csrc/ with `fastdit/_build`, or say why the package goes without a library."""

    def run(self) -> None:
        mode = os.environ.get("FASTDIT_BUILD") or "auto"
        if mode not in ("auto", "0", "1"):
            raise SystemExit(f"FASTDIT_BUILD: got {mode!r}, allowed are 'auto', '0', '1'")
        try:
            if mode == "0":
                raise build.BuildError("FASTDIT_BUILD=0")
            self.compile(mode)
        except build.BuildError as error:
            if mode == "1":
                raise SystemExit(f"fastdit, FASTDIT_BUILD=1: {error}") from None
            print(f"fastdit: installed without a compiled library: {error}", flush=True)

    def compile(self, mode: str) -> None:
        """Compile, without CUDA kernels if these alone fail, and put the library in its place."""
        tools = build.find_toolchain(build.find_torch())
        library = self.built()
        try:
            self.compile_with(tools, library)
        except build.CompileError as error:
            if mode == "1" or tools.nvcc is None or not error.of_cuda:
                raise
            print(f"fastdit: {error}; going on without CUDA kernels", flush=True)
            self.compile_with(tools.without_cuda(), library)
        if self.inplace:
            target = HERE / "fastdit" / build.LIBRARY
            partial = target.with_suffix(".partial")
            shutil.copyfile(library, partial)
            os.replace(partial, target)

    def compile_with(self, tools: build.Toolchain, library: Path) -> None:
        print(f"fastdit: compiling the kernels with {tools}", flush=True)
        objects = Path(self.build_temp).absolute() / ("cuda" if tools.nvcc else "host")
        info = build.describe(tools)
        seconds = build.compile_library(tools, info, objects, library, progress=print)
        print(f"fastdit: compiled in {seconds:.1f} s", flush=True)

    def built(self) -> Path:
        """Where the library is built; it is there if that went well."""
        return Path(self.build_lib).absolute() / "fastdit" / build.LIBRARY

    def get_outputs(self) -> list[str]:
        return [str(self.built())] if self.built().is_file() else []

    def get_output_mapping(self) -> dict[str, str]:
        in_place = str(HERE / "fastdit" / build.LIBRARY)
        return {path: in_place for path in self.get_outputs() if self.inplace}


class Wheel(bdist_wheel):
    """The library depends on the platform but on no Python; without it the wheel is for all."""

    def get_tag(self) -> tuple[str, str, str]:
        built = self.get_finalized_command("build_ext").get_outputs()
        platform = super().get_tag()[2] if built else "any"
        return "py3", "none", platform


def packages() -> list[str]:
    """Every package under each mapped folder, by its import name."""
    return [
        ".".join([name, *sub.split(".")]) if sub else name
        for name, folder in PACKAGES.items()
        for sub in ["", *find_packages(folder)]
    ]


setup(
    packages=[*packages(), "fastdit.csrc"],
    package_dir={**PACKAGES, "fastdit.csrc": "csrc"},
    package_data={
        "fastdit": ["py.typed", "weights/*.safetensors"],
        "fastdit.csrc": ["README.md", *build.SOURCES, *build.HEADERS],
    },
    ext_modules=[Extension("fastdit.libfastdit", [])],
    cmdclass={"build_py": Fresh, "build_ext": BuildLibrary, "bdist_wheel": Wheel},
)
