"""Building the compiled library: compilers, flags, and one ninja file.

`csrc/` becomes one shared library on the LibTorch stable ABI. It needs torch's headers and
libtorch_cpu to link with, but neither an import of torch nor a Python header, and it loads in every
torch from `TORCH_ABI` on, under any Python. `setup.py` loads this module by its path when pip
installs fastdit, so it imports nothing but the standard library; `fastdit.native` uses it at first
use, and `fastdit build` on demand. The rules of which file is compiled how are in csrc/README.md.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

TORCH_ABI = "2.13"
"""The oldest torch whose stable ABI the library is built for; it loads in this and later ones."""
LIBRARY = "libfastdit.so"
MARKER = b"fastdit-build-info:"
CUDA_ARCHS = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0+PTX")
SOURCES = ("*.cpp", "cpu/*.cpp", "cpu/isa/*.cpp", "cuda/*.cu")
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
if platform.machine().lower() in ("x86_64", "amd64"):
    ISAS["avx2"] = ("-mavx2", "-mfma", "-mf16c")
    ISAS["avx512"] = (*ISAS["avx2"], "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")


class BuildError(RuntimeError):
    """The library cannot be built: the message says what is missing, or what the compiler said."""


def sources_folder() -> Path:
    """csrc/: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "csrc"
    return inside if inside.is_dir() else package.parent / "csrc"


def source_files(folder: Path, patterns: tuple[str, ...] = SOURCES) -> Iterator[Path]:
    """The files of csrc/ that take part in a build, always in the same order."""
    for pattern in patterns:
        yield from sorted(folder.glob(pattern))


def source_hash(folder: Path) -> str:
    """Sixteen digits that change with any source, header or rule of the build."""
    digest = hashlib.sha256()
    for path in (*source_files(folder, (*SOURCES, *HEADERS)), Path(__file__)):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def find_torch() -> Path | None:
    """The folder of the torch that this interpreter would import, without importing it.

    Inside pip's isolated build the target environment is hidden by PYTHONPATH: a child without it
    sees what the user's own Python will, .pth files and system site-packages included.
    """
    code = "import importlib.util as u; s = u.find_spec('torch'); print(s.origin if s else '')"
    hidden = ("PYTHONPATH", "PYTHONHOME", "PYTHONNOUSERSITE")
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    child = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=os.sep
    )
    origin = child.stdout.strip()
    return Path(origin).parent if child.returncode == 0 and origin else None


def torch_version(torch: Path) -> str:
    """The version in torch/version.py, such as 2.13.0+cpu."""
    found = re.search(r"__version__ = ['\"]([^'\"]+)", (torch / "version.py").read_text())
    return found[1] if found else "0"


def check_torch(torch: Path | None) -> Path:
    """`torch` if it has the headers that the library needs."""
    if torch is None:
        raise BuildError("torch is not installed, and its headers are needed")
    version = torch_version(torch)
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < tuple(map(int, TORCH_ABI.split("."))):
        raise BuildError(f"torch {version} is too old, {TORCH_ABI} is needed")
    if not (torch / "include/torch/csrc/stable/library.h").is_file():
        raise BuildError(f"torch in {torch} has no headers (include/torch/csrc/stable)")
    return torch


def find_cxx() -> str | None:
    """The host compiler: CXX, else c++, g++ or clang++ of PATH."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((path for name in names if (path := shutil.which(name))), None)


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME or CUDA_PATH, of PATH, of /usr/local/cuda, or of NVIDIA's pip packages."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [str(Path(home) / "bin") for home in homes]
    places += [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    for root in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        nvidia = Path(root) / "nvidia"
        places += [str(path) for path in (*nvidia.glob("cu*/bin"), *nvidia.glob("cuda_nvcc/bin"))]
    return next((path for place in places if (path := shutil.which("nvcc", path=place))), None)


def find_ninja() -> str | None:
    """ninja: that of the `ninja` package, else of PATH."""
    try:
        import ninja
    except ImportError:
        return shutil.which("ninja")
    return shutil.which("ninja", path=ninja.BIN_DIR) or shutil.which("ninja")


def version_line(program: str) -> str:
    """The line of `program --version` that names the release."""
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    lines = [line.strip() for line in done.stdout.splitlines() if any(map(str.isdigit, line))]
    return next((line for line in lines if "release" in line), lines[0] if lines else program)


def cuda_archs(nvcc: str) -> tuple[str, ...]:
    """TORCH_CUDA_ARCH_LIST, else those of `CUDA_ARCHS` that this nvcc knows, the last with PTX."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    for arch in asked:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch):
            allowed = "numbers such as '8.0 9.0a 12.0+PTX'"
            raise BuildError(f"TORCH_CUDA_ARCH_LIST: got {arch!r}, allowed are {allowed}")
    if asked:
        return tuple(asked)
    done = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False)
    known = done.stdout.split()
    plain = [arch.removesuffix("+PTX") for arch in CUDA_ARCHS]
    archs = [arch for arch in plain if f"compute_{arch.replace('.', '')}" in known]
    if not archs:
        raise BuildError(f"{nvcc} knows none of the architectures {', '.join(plain)}")
    return (*archs[:-1], archs[-1] + "+PTX")


@dataclass(frozen=True)
class Toolchain:
    """What a build uses."""

    torch: Path
    ninja: str
    cxx: str
    cxx_version: str
    nvcc: str | None = None
    nvcc_version: str | None = None
    archs: tuple[str, ...] = ()


def find_toolchain(torch: Path | None, cuda: bool | None = None) -> Toolchain:
    """The compilers of this machine; `cuda` None takes nvcc if it is there.

    Raises:
        BuildError: something is missing; the message names it.
    """
    torch = check_torch(torch)
    if not sys.platform.startswith(("linux", "darwin")):
        raise BuildError(f"the library is built on Linux and macOS, not on {sys.platform}")
    cxx, ninja, nvcc = find_cxx(), find_ninja(), find_nvcc() if cuda is not False else None
    if cxx is None:
        named = os.environ.get("CXX")
        missing = f"CXX={named} was not found" if named else "no C++ compiler was found (c++, g++)"
        raise BuildError(missing)
    if ninja is None:
        raise BuildError("ninja was not found (pip install ninja)")
    if cuda and nvcc is None:
        raise BuildError("nvcc was not found (CUDA_HOME, PATH, /usr/local/cuda, pip packages)")
    chosen = Toolchain(torch, ninja, cxx, version_line(cxx))
    if nvcc is None:
        return chosen
    archs = cuda_archs(nvcc)
    return Toolchain(torch, ninja, cxx, chosen.cxx_version, nvcc, version_line(nvcc), archs)


def gencode(archs: tuple[str, ...]) -> list[str]:
    """nvcc's flags for the architectures: machine code for each, PTX where it is asked for."""
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


@dataclass(frozen=True)
class Info:
    """What a library says about itself; written into it, and read back without loading it."""

    version: str
    source: str
    abi: str
    machine: str
    compiler: str
    flags: str
    nvcc: str | None
    archs: tuple[str, ...]
    torch: str

    @property
    def key(self) -> str:
        """Twelve digits for everything but the torch whose headers were used."""
        parts = {k: v for k, v in asdict(self).items() if k != "torch"}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def machine() -> str:
    """The platform, and the C library on Linux: a library built on a newer one may not load."""
    return "-".join(filter(None, (sysconfig.get_platform(), *platform.libc_ver())))


def package_version() -> str:
    """fastdit's version, from its file."""
    text = (Path(__file__).parent / "_version.py").read_text()
    return re.search(r"__version__ = \"([^\"]+)", text)[1]  # type: ignore[index]


def describe(tools: Toolchain) -> Info:
    """The `Info` of a library built with `tools` from the sources as they are now."""
    return Info(
        version=package_version(),
        source=source_hash(sources_folder()),
        abi=TORCH_ABI,
        machine=machine(),
        compiler=f"{tools.cxx} ({tools.cxx_version})",
        flags=" ".join((*COMMON, *HOST)),
        nvcc=f"{tools.nvcc} ({tools.nvcc_version})" if tools.nvcc else None,
        archs=tools.archs,
        torch=torch_version(tools.torch),
    )


def read_info(library: Path) -> Info | None:
    """The `Info` inside a library file, or None if it holds none that this version understands."""
    data = library.read_bytes()
    start = data.find(MARKER)
    if start < 0:
        return None
    start += len(MARKER)
    try:
        found = json.loads(data[start : data.index(b"\0", start)])
        return Info(**{**found, "archs": tuple(found["archs"])})
    except (ValueError, TypeError, KeyError):
        return None


def quoted(text: str | Path) -> str:
    """A path or flag for a command inside a ninja file."""
    import shlex

    return shlex.quote(str(text)).replace("$", "$$")


def escaped(path: str | Path) -> str:
    """A path as a target or input of a ninja file."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


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
    for path in source_files(csrc):
        name = "-".join(path.relative_to(csrc).parts)
        if path.suffix == ".cu":
            units += [Unit(path, "nvcc", f"{name}.o")] if cuda else []
        elif path.parent.name != "isa":
            units.append(Unit(path, "cxx", f"{name}.o"))
    for isa, flags in ISAS.items():
        for path in sorted(csrc.glob("cpu/isa/*.cpp")):
            define = f"-DFASTDIT_ISA={isa}"
            units.append(
                Unit(path, "cxx", f"cpu-isa-{isa}-{path.name}.o", " ".join([*flags, define]))
            )
    return units


def ninja_file(tools: Toolchain, csrc: Path, jobs: int) -> str:
    """The build.ninja of all sources, run in the folder of its objects."""
    torch = tools.torch
    includes = " ".join(
        [f"-I{quoted(csrc)}", "-I.", "-isystem " + quoted(torch / "include")]
        + (["-DFASTDIT_CUDA"] if tools.nvcc else [])
    )
    libraries = f"-L{quoted(torch / 'lib')} -ltorch_cpu -lc10"
    host = " ".join((*COMMON, *HOST))
    lines = [
        "ninja_required_version = 1.5",
        "rule cxx",
        f"  command = {quoted(tools.cxx)} -MD -MF $out.d {host} {includes} $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $in $flags",
    ]
    linker = f"{quoted(tools.cxx)} -shared"
    if tools.nvcc:
        forwarded = f"-Xcompiler={','.join(HOST)} --expt-relaxed-constexpr"
        cuda = f"{quoted(tools.nvcc)} -ccbin {quoted(tools.cxx)}"
        lines += [
            "rule nvcc",
            f"  command = {cuda} -MD -MF $out.d {' '.join(COMMON)} {forwarded} --threads {jobs} "
            f"{' '.join(gencode(tools.archs))} {includes} -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = $in",
        ]
        linker = f"{cuda} -shared -cudart static"
    lines += ["rule link", f"  command = {linker} $in {libraries} -o $out", "  description = $out"]
    units = compilations(csrc, cuda=tools.nvcc is not None)
    for unit in units:
        lines.append(f"build {escaped(unit.object)}: {unit.rule} {escaped(unit.source)}")
        lines += [f"  flags = {unit.flags}"] if unit.flags else []
    lines.append(f"build {LIBRARY}: link {' '.join(escaped(unit.object) for unit in units)}")
    return "\n".join([*lines, f"default {LIBRARY}", ""])


def default_jobs() -> int:
    """Compilers at once: MAX_JOBS, else the processors this process may use."""
    asked = os.environ.get("MAX_JOBS", "")
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def compile_library(
    tools: Toolchain,
    objects: Path,
    output: Path,
    *,
    jobs: int | None = None,
    verbose: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> float:
    """Compile csrc/ with its objects in `objects`, and put the library at `output` when whole.

    Returns:
        The seconds it took.

    Raises:
        BuildError: a compiler failed; the message is what it said.
        OSError: a file could not be written.
    """
    start = time.perf_counter()
    jobs = jobs or default_jobs()
    info = json.dumps(asdict(describe(tools)))
    objects.mkdir(parents=True, exist_ok=True)
    write_if_new(objects / "build_info.h", f"#define FASTDIT_BUILD_INFO {json.dumps(info)}\n")
    write_if_new(objects / "build.ninja", ninja_file(tools, sources_folder(), jobs))
    command = [tools.ninja, "-C", str(objects), "-j", str(jobs), *(["-v"] if verbose else [])]
    environment = {**os.environ, "NINJA_STATUS": "[%f/%t] "}
    said = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        for line in process.stdout or ():
            said.append(line)
            progress(line.rstrip("\n"))
    if process.returncode:
        raise BuildError("".join(said).strip())
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f"{output.name}.{os.getpid()}")
    shutil.copyfile(objects / LIBRARY, partial)
    os.replace(partial, output)
    return time.perf_counter() - start


def write_if_new(path: Path, text: str) -> None:
    """Write `text` unless the file holds it already: ninja goes by the time of change."""
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)
