"""What a library file tells about itself, without being loaded."""

from __future__ import annotations

import hashlib
import json
import mmap
import platform
import re
import shlex
import sysconfig
from dataclasses import asdict, dataclass
from pathlib import Path

from .sources import COMMON, HOST, PACKAGE, TORCH_ABI, source_hash, sources_folder
from .toolchain import Toolchain, torch_version

LIBRARY = "libfastdit.so"
MARKER = b"fastdit-build-info:"
"""Stands before the `Info`, as JSON and a zero, in every library: csrc/library.cpp."""


@dataclass(frozen=True)
class Info:
    """How a library was built. It is written into the library, and `build_info()` returns it."""

    version: str
    source: str
    abi: str
    machine: str
    compiler: str
    flags: str
    nvcc: str | None
    archs: tuple[str, ...]
    torch: str

    def json(self) -> str:
        """As it stands in the library."""
        return json.dumps(asdict(self))

    @property
    def key(self) -> str:
        """Twelve digits for everything but the torch whose headers were used."""
        parts = {name: value for name, value in asdict(self).items() if name != "torch"}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]

    def runs_on(self, capability: tuple[int, int]) -> bool:
        """Whether a GPU of this compute capability can run the library's CUDA kernels."""
        for arch in self.archs:
            number, _, ptx = arch.partition("+")
            major, minor = map(int, number.rstrip("af").split("."))
            if number.endswith("a"):  # of this one architecture only
                runs = (major, minor) == capability
            else:
                same = major == capability[0] and minor <= capability[1]
                runs = same or (bool(ptx) and (major, minor) <= capability)
            if runs:
                return True
        return False


def machine() -> str:
    """The platform, and the C library on Linux: what a newer one built may not load on an older."""
    return "-".join(filter(None, (sysconfig.get_platform(), *platform.libc_ver())))


def package_version() -> str:
    """fastdit's version, from its file."""
    found = re.search(r'__version__ = "([^"]+)', (PACKAGE / "_version.py").read_text())
    return found[1] if found else "0"


def describe(tools: Toolchain) -> Info:
    """The `Info` of a library built with `tools` from the sources as they are now."""
    return Info(
        version=package_version(),
        source=source_hash(sources_folder()),
        abi=TORCH_ABI,
        machine=machine(),
        compiler=f"{shlex.join(tools.cxx)} ({tools.cxx_version})",
        flags=" ".join((*COMMON, *HOST)),
        nvcc=f"{tools.nvcc} ({tools.nvcc_version})" if tools.nvcc else None,
        archs=tools.archs,
        torch=torch_version(tools.torch),
    )


def read_info(library: Path) -> Info | None:
    """The `Info` in a library file, or None if it holds none that this version understands."""
    try:
        with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            start = data.find(MARKER)
            if start < 0:
                return None
            start += len(MARKER)
            found = json.loads(data[start : data.find(b"\0", start)])
        return Info(**{**found, "archs": tuple(found["archs"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None
