"""The files of csrc/, and how each is compiled."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent
TORCH_ABI = "2.13"
"""The oldest torch whose stable ABI the library is built for; it loads in this and later ones."""
SOURCES = ("*.cpp", "cpu/*.cpp", "cpu/isa/*.cpp", "cuda/*.cu", "cuda/*.cpp")
HEADERS = ("*.h", "*.cuh", "cpu/*.h", "cpu/isa/*.h", "cuda/*.h", "cuda/*.cuh")
COMMON = ("-O3", "-std=c++20", "-DTORCH_TARGET_VERSION=0x020d000000000000")
HOST = (
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wno-unknown-pragmas",
)
ISAS: dict[str, tuple[str, ...]] = {"baseline": ()}
"""The instruction sets that cpu/isa/*.cpp are compiled for, the widest last."""
if platform.machine().lower() in ("x86_64", "amd64"):
    ISAS["avx2"] = ("-mavx2", "-mfma", "-mf16c")
    ISAS["avx512"] = (*ISAS["avx2"], "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")


def sources_folder() -> Path:
    """csrc/: inside the installed package, or beside it in a checkout."""
    inside = PACKAGE / "csrc"
    return inside if inside.is_dir() else PACKAGE.parent / "csrc"


def _files(folder: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    for pattern in patterns:
        yield from sorted(folder.glob(pattern))


def source_hash(folder: Path) -> str:
    """Sixteen digits that change with any source or header, or with the rules of this package."""
    digest = hashlib.sha256()
    rules = sorted(Path(__file__).parent.glob("*.py"))
    for path in (*_files(folder, (*SOURCES, *HEADERS)), *rules):
        data = path.read_bytes()
        digest.update(f"{path.parent.name}/{path.name} {len(data)}\n".encode() + data)
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Unit:
    """One compilation: a source, its rule in the ninja file, its object and further flags."""

    source: Path
    rule: str
    object: str
    flags: str = ""


def compilations(csrc: Path, cuda: bool) -> list[Unit]:
    """Every compilation, plain ones first, then by instruction set, the widest last.

    The linker keeps the first copy of an inline function that several objects hold. In this order
    that copy never needs more of the processor than any of its callers.
    """
    units = []
    for path in _files(csrc, SOURCES):
        name = "-".join(path.relative_to(csrc).parts)
        if path.parent.name == "cuda":
            rule = "nvcc" if path.suffix == ".cu" else "nvcc_host"
            units += [Unit(path, rule, f"{name}.o")] if cuda else []
        elif path.parent.name != "isa":
            units.append(Unit(path, "cxx", f"{name}.o"))
    for isa, flags in ISAS.items():
        for path in sorted(csrc.glob("cpu/isa/*.cpp")):
            all_flags = " ".join((*flags, f"-DFASTDIT_ISA={isa}"))
            units.append(Unit(path, "cxx", f"cpu-isa-{isa}-{path.name}.o", all_flags))
    return units
