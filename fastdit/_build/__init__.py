"""Building the compiled library: compilers, rules, one ninja file.

`csrc/` becomes one shared library on the LibTorch stable ABI. It needs torch's headers and
libtorch_cpu to link with, but neither an import of torch nor a Python header, and it loads in every
torch from `TORCH_ABI` on, under any Python. `fastdit.native` uses this package at first use and
for `fastdit build`; `setup.py` loads it by its path when pip installs fastdit, so it imports
nothing but the standard library. Which file is compiled how is in csrc/README.md.
"""

from .errors import BuildError, CompileError
from .info import LIBRARY, Info, describe, machine, package_version, read_info
from .library import compile_library, default_jobs
from .sources import HEADERS, SOURCES, TORCH_ABI, source_hash, sources_folder
from .toolchain import Toolchain, find_nvcc, find_toolchain, find_torch

__all__ = [
    "HEADERS",
    "LIBRARY",
    "SOURCES",
    "TORCH_ABI",
    "BuildError",
    "CompileError",
    "Info",
    "Toolchain",
    "compile_library",
    "default_jobs",
    "describe",
    "find_nvcc",
    "find_toolchain",
    "find_torch",
    "machine",
    "package_version",
    "read_info",
    "source_hash",
    "sources_folder",
]
