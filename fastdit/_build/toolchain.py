"""Finding torch's headers and the compilers, without importing torch."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from .errors import BuildError
from .sources import TORCH_ABI

CUDA_ARCHS = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")


@dataclass(frozen=True)
class Toolchain:
    """What a build uses. `cxx` is a command: it may begin with a wrapper such as ccache."""

    torch: Path
    ninja: str
    cxx: tuple[str, ...]
    cxx_version: str
    nvcc: str | None = None
    nvcc_version: str | None = None
    archs: tuple[str, ...] = ()

    def without_cuda(self) -> Toolchain:
        """The same for a library without CUDA kernels."""
        return dataclasses.replace(self, nvcc=None, nvcc_version=None, archs=())

    def __str__(self) -> str:
        cuda = f" and {self.nvcc} for {' '.join(self.archs)}" if self.nvcc else ""
        return shlex.join(self.cxx) + cuda


def find_toolchain(torch: Path | None, cuda: bool | None = None) -> Toolchain:
    """The compilers of this machine; `cuda` None takes nvcc if it is there.

    Raises:
        BuildError: something is missing; the message names it.
    """
    if not sys.platform.startswith(("linux", "darwin")):
        raise BuildError(f"the library is built on Linux and macOS, not on {sys.platform}")
    torch = _check_torch(torch)
    cxx = find_cxx()
    ninja = _find_ninja()
    if ninja is None:
        raise BuildError("ninja was not found (pip install ninja)")
    tools = Toolchain(torch, ninja, cxx, version_line(*cxx))
    nvcc = find_nvcc() if cuda is not False else None
    if nvcc:
        version = version_line(nvcc)
        return dataclasses.replace(tools, nvcc=nvcc, nvcc_version=version, archs=cuda_archs(nvcc))
    if cuda:
        raise BuildError("nvcc was not found (CUDA_HOME, PATH, /usr/local/cuda, pip's nvidia-*)")
    return tools


def find_torch() -> Path | None:
    """The folder of the torch that this interpreter would import, without importing it.

    In pip's isolated build the target environment is hidden by PYTHONPATH. A child without it sees
    what the user's Python will, .pth files and system site-packages included.
    """
    code = "import importlib.util as u; s = u.find_spec('torch'); print(s.origin if s else '')"
    hidden = ("PYTHONPATH", "PYTHONHOME", "PYTHONNOUSERSITE")
    environment = {name: v for name, v in os.environ.items() if name not in hidden}
    child = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=os.sep
    )
    origin = child.stdout.strip()
    return Path(origin).parent if child.returncode == 0 and origin else None


def torch_version(torch: Path) -> str:
    """The version in torch/version.py, such as 2.13.0+cpu."""
    found = re.search(r"__version__ = ['\"]([^'\"]+)", (torch / "version.py").read_text())
    return found[1] if found else "0"


def _check_torch(torch: Path | None) -> Path:
    if torch is None:
        raise BuildError("torch is not installed, and its headers are needed")
    version = torch_version(torch)
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < tuple(map(int, TORCH_ABI.split("."))):
        raise BuildError(f"torch {version} is too old, {TORCH_ABI} is needed")
    if not (torch / "include/torch/csrc/stable/library.h").is_file():
        raise BuildError(f"torch in {torch} has no headers (include/torch/csrc/stable)")
    return torch


def find_cxx() -> tuple[str, ...]:
    """The command of the host compiler: CXX, else c++, g++ or clang++ of PATH.

    Raises:
        BuildError: there is none.
    """
    asked = os.environ.get("CXX", "")
    if not asked:
        for name in ("c++", "g++", "clang++"):
            if path := shutil.which(name):
                return (path,)
        raise BuildError("no C++ compiler was found (CXX, c++, g++, clang++)")
    program, *rest = [asked] if shutil.which(asked) else shlex.split(asked)
    path = shutil.which(program)
    if path is None:
        raise BuildError(f"CXX: got {asked!r}, which was not found")
    return (path, *rest)


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME or CUDA_PATH, of PATH, of /usr/local/cuda, or of NVIDIA's pip packages."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [str(Path(home) / "bin") for home in homes]
    places += [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    for root in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        nvidia = Path(root) / "nvidia"
        places += [str(path) for path in (*nvidia.glob("cu*/bin"), *nvidia.glob("cuda_nvcc/bin"))]
    return next((path for place in places if (path := shutil.which("nvcc", path=place))), None)


def _find_ninja() -> str | None:
    """That of the `ninja` package, else of PATH."""
    try:
        import ninja
    except ImportError:
        return shutil.which("ninja")
    return shutil.which("ninja", path=ninja.BIN_DIR) or shutil.which("ninja")


def version_line(*command: str) -> str:
    """The line of `command --version` that names the release."""
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{command[0]} does not run: {error.strerror}") from None
    lines = [line.strip() for line in done.stdout.splitlines() if any(map(str.isdigit, line))]
    return next((line for line in lines if "release" in line), lines[0] if lines else command[0])


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
    archs = [arch for arch in CUDA_ARCHS if f"compute_{arch.replace('.', '')}" in known]
    if not archs:
        raise BuildError(f"{nvcc} knows none of the architectures {', '.join(CUDA_ARCHS)}")
    return (*archs[:-1], archs[-1] + "+PTX")
