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

HERE = Path(__file__).resolve().parent
PACKAGES = {"fastdit": "fastdit", "fastdit.kernels": "kernels"}
CSRC = ["*.md", "*.cpp", "*.h", "cpu/*.cpp", "cpu/*.h", "cpu/isa/*.cpp", "cpu/isa/*.h"]
CSRC += ["*.cuh", "cuda/*.cu", "cuda/*.cuh", "cuda/*.h"]


def builder():
    """`fastdit/_build`, without importing fastdit, which needs torch."""
    folder = HERE / "fastdit" / "_build"
    spec = importlib.util.spec_from_file_location(
        "fastdit_build", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = sys.modules["fastdit_build"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildLibrary(build_ext):
    """Build csrc/ with `fastdit/_build`, or say why the package goes without a library."""

    def run(self) -> None:
        build = builder()
        mode = os.environ.get("FASTDIT_BUILD") or "auto"
        if mode not in ("auto", "0", "1"):
            raise SystemExit(f"FASTDIT_BUILD: got {mode!r}, allowed are 'auto', '0', '1'")
        try:
            if mode == "0":
                raise build.BuildError("FASTDIT_BUILD=0")
            self.compile(build, mode)
        except build.BuildError as error:
            output = f"{getattr(error, 'output', '')}\n"
            if mode == "1":
                raise SystemExit(f"{output}fastdit, FASTDIT_BUILD=1: {error}") from None
            print(f"{output}fastdit: installed without a compiled library: {error}", flush=True)

    def compile(self, build, mode: str) -> None:
        """Compile, without CUDA kernels if these alone fail, and put the library in its place."""
        tools = build.find_toolchain(build.find_torch())
        library = Path(self.get_ext_fullpath_built())
        try:
            self.compile_with(build, tools, library)
        except build.CompileError as error:
            if mode == "1" or tools.nvcc is None:
                raise
            print(f"{error.output}\nfastdit: {error}; going on without CUDA kernels", flush=True)
            self.compile_with(build, tools.without_cuda(), library)
        if self.inplace:
            target = HERE / "fastdit" / build.LIBRARY
            partial = target.with_suffix(".partial")
            shutil.copyfile(library, partial)
            os.replace(partial, target)

    def compile_with(self, build, tools, library: Path) -> None:
        print(f"fastdit: compiling the kernels with {tools}", flush=True)
        objects = Path(self.build_temp).absolute() / ("cuda" if tools.nvcc else "host")
        info = build.describe(tools)
        seconds = build.compile_library(tools, info, objects, library, progress=print)
        print(f"fastdit: compiled in {seconds:.1f} s", flush=True)

    def get_ext_fullpath_built(self) -> str:
        return str(Path(self.build_lib).absolute() / self.get_ext_filename("fastdit.libfastdit"))

    def get_ext_filename(self, name: str) -> str:
        return str(Path(*name.split("."))) + ".so"

    def get_outputs(self) -> list[str]:
        return [path for path in [self.get_ext_fullpath_built()] if Path(path).is_file()]

    def get_output_mapping(self) -> dict[str, str]:
        built = self.get_outputs() if self.inplace else []
        return {path: str(HERE / "fastdit" / Path(path).name) for path in built}


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
    package_data={"fastdit": ["py.typed", "weights/*.safetensors"], "fastdit.csrc": CSRC},
    ext_modules=[Extension("fastdit.libfastdit", [])],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel},
)
