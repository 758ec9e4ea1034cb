"""Building the compiled library: what is found, what is compiled how, and what pip installs."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from installed import COMPILER, NEEDS, ROOT, Installed

from fastdit import _build, native
from fastdit._build import sources, toolchain

pytestmark = NEEDS


@pytest.fixture
def installed(tmp_path):
    """Its path has spaces, as paths do somewhere in the world."""
    folder = tmp_path / "with spaces"
    folder.mkdir()
    return Installed(folder)


@pytest.fixture
def clean_environment(monkeypatch):
    for name in ("CXX", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_this_process_loads_a_library_of_these_sources():
    path, info = native.load()
    assert info.source == _build.source_hash(_build.sources_folder())
    assert torch.ops.fastdit_native.build_info() == info.json()
    assert _build.read_info(path) == info


def test_torch_is_found_behind_an_isolated_build_without_importing_it(monkeypatch, tmp_path):
    """pip puts its build environment into PYTHONPATH."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert _build.find_torch() == Path(torch.__file__).parent
    assert toolchain.torch_version(Path(torch.__file__).parent) == torch.__version__


def test_what_is_missing_is_named(clean_environment, tmp_path):
    good = Path(torch.__file__).parent
    with pytest.raises(_build.BuildError, match="torch is not installed"):
        _build.find_toolchain(None)
    old = tmp_path / "torch"
    old.mkdir()
    (old / "version.py").write_text("__version__ = '2.12.1+cpu'\n")
    with pytest.raises(_build.BuildError, match=r"torch 2\.12\.1\+cpu is too old, 2\.13"):
        _build.find_toolchain(old)
    (old / "version.py").write_text("__version__ = '2.14.0'\n")
    with pytest.raises(_build.BuildError, match="has no headers"):
        _build.find_toolchain(old)
    clean_environment.setenv("CXX", "no-such-compiler -x")
    with pytest.raises(_build.BuildError, match="CXX: got 'no-such-compiler -x', which was not"):
        _build.find_toolchain(good)
    clean_environment.setenv("CXX", "")
    clean_environment.setenv("PATH", str(tmp_path))
    with pytest.raises(_build.BuildError, match=r"no C\+\+ compiler was found"):
        _build.find_toolchain(good)
    clean_environment.setenv("CXX", COMPILER)
    clean_environment.setattr(toolchain, "_find_ninja", lambda: "ninja")
    clean_environment.setattr(toolchain, "find_nvcc", lambda: None)
    with pytest.raises(_build.BuildError, match="nvcc was not found"):
        _build.find_toolchain(good, cuda=True)
    assert _build.find_toolchain(good).archs == ()
    clean_environment.setattr(toolchain, "_find_ninja", lambda: None)
    with pytest.raises(_build.BuildError, match="ninja was not found"):
        _build.find_toolchain(good)


def test_compilers_are_found_where_they_are(clean_environment, tmp_path):
    clean_environment.setenv("CXX", f"env {COMPILER} -pipe")
    assert toolchain.find_cxx() == (shutil.which("env"), COMPILER, "-pipe")
    spaced = tmp_path / "my tools" / "bin" / "nvcc"
    spaced.parent.mkdir(parents=True)
    spaced.write_text("#!/bin/sh\necho compute_80 compute_90\n")
    spaced.chmod(0o755)
    clean_environment.setenv("CXX", str(spaced))
    assert toolchain.find_cxx() == (str(spaced),)
    clean_environment.setenv("CUDA_HOME", str(spaced.parent.parent))
    assert _build.find_nvcc() == str(spaced)
    assert toolchain.cuda_archs(str(spaced)) == ("8.0", "9.0+PTX")
    clean_environment.delenv("CUDA_HOME")
    pip = tmp_path / "nvidia" / "cu13" / "bin" / "nvcc"
    pip.parent.mkdir(parents=True)
    shutil.copy(spaced, pip)
    clean_environment.setattr(toolchain.sysconfig, "get_path", lambda name: str(tmp_path))
    clean_environment.setenv("PATH", str(tmp_path))
    if not Path("/usr/local/cuda/bin/nvcc").exists():
        assert _build.find_nvcc() == str(pip)


def test_cuda_architectures(clean_environment):
    clean_environment.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0a 12.0+PTX")
    assert toolchain.cuda_archs("nvcc") == ("8.0", "9.0a", "12.0+PTX")
    clean_environment.setenv("TORCH_CUDA_ARCH_LIST", "8.0 Hopper")
    with pytest.raises(_build.BuildError, match=r"TORCH_CUDA_ARCH_LIST: got 'Hopper', allowed"):
        toolchain.cuda_archs("nvcc")


@pytest.mark.parametrize(
    ("archs", "runs", "does_not"),
    [
        (("8.0", "9.0"), [(8, 0), (8, 9), (9, 0)], [(7, 5), (10, 0), (12, 0)]),
        (("8.6",), [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        (("9.0a",), [(9, 0)], [(8, 0), (9, 1), (10, 0)]),
        (("8.0", "10.0+PTX"), [(8, 0), (10, 0), (10, 3), (12, 0)], [(9, 0), (7, 0)]),
    ],
)
def test_which_gpus_a_library_runs_on(archs, runs, does_not):
    info = _build.Info("1", "s", "2.13", "m", "c", "f", "nvcc", archs, "2.13.0")
    assert all(info.runs_on(capability) for capability in runs)
    assert not any(info.runs_on(capability) for capability in does_not)


def test_each_instruction_set_is_compiled_and_baseline_is_linked_first(installed):
    """An inline function that all variants hold is kept in the copy that every processor runs."""
    code = """#define NAME2(isa) which_##isa
#define NAME(isa) NAME2(isa)
template <class T> __attribute__((noipa)) int shared(T x) {
#if defined(__AVX512F__)
  return x + 512;
#elif defined(__AVX2__)
  return x + 2;
#else
  return x;
#endif
}
extern "C" __attribute__((visibility("default"))) int NAME(FASTDIT_ISA)() { return shared(1); }
"""
    (installed.csrc / "cpu" / "isa" / "which.cpp").write_text(code)
    build = installed.build()
    tools = build.find_toolchain(_build.find_torch(), cuda=False)
    library = installed.folder / "out" / build.LIBRARY
    build.compile_library(tools, build.describe(tools), installed.folder / "objects", library)
    names = [f"which_{isa}" for isa in sources.ISAS]
    code = f"import torch, ctypes; lib = ctypes.CDLL({str(library)!r})\n"
    _, out, err = installed.run(code + f"print([lib[name]() for name in {names}])")
    assert out == f"{[1] * len(names)}\n", err
    assert build.read_info(library) == build.describe(tools)
    assert list(library.parent.iterdir()) == [library]


def test_a_file_that_is_no_library_tells_nothing(tmp_path):
    marker = b"\0fastdit-build-info:"
    for content in (b"", b"x" * 99, marker, marker + b"{\0", marker + b'{"version": "1"}\0'):
        path = tmp_path / "x.so"
        path.write_bytes(content)
        assert _build.read_info(path) is None
    assert _build.read_info(tmp_path / "absent") is None


@pytest.fixture
def checkout(installed):
    """The copy laid out as a checkout, and a function that runs a command of its setup.py."""
    if importlib.util.find_spec("setuptools.command.bdist_wheel") is None:
        pytest.skip("needs setuptools >= 77")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, installed.site)
    for name in ("csrc", "kernels"):
        (installed.package / name).rename(installed.site / name)
    installed.environment |= {"TORCH_CUDA_ARCH_LIST": "9.0", "PYTHONPATH": ""}

    def setup(command: str) -> tuple[Path | None, str]:
        out = installed.folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        done = subprocess.run(
            [sys.executable, "setup.py", command, "-d", str(out)],
            cwd=installed.site,
            env=installed.environment,
            capture_output=True,
            text=True,
        )
        return next(
            out.glob("*.whl"), None
        ) if done.returncode == 0 else None, done.stdout + done.stderr

    return setup


def test_a_wheel_carries_the_library_and_its_sources(checkout, installed):
    wheel, said = checkout("bdist_wheel")
    assert wheel is not None, said
    assert re.fullmatch(r"fastdit-[\d.]+-py3-none-linux_\w+\.whl", wheel.name)
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "fastdit/libfastdit.so",
        "fastdit/csrc/library.cpp",
        "fastdit/kernels/registry.py",
    } <= names
    installed.environment["FASTDIT_BUILD"] = "0"
    wheel, said = checkout("bdist_wheel")  # of what the one before left in build/, nothing ships
    assert wheel.name.endswith("-py3-none-any.whl"), said
    assert "fastdit/libfastdit.so" not in zipfile.ZipFile(wheel).namelist()
    assert "installed without a compiled library: FASTDIT_BUILD=0" in said
    shutil.rmtree(installed.package)
    zipfile.ZipFile(wheel).extractall(installed.site)
    installed.environment |= {"PYTHONPATH": str(installed.site), "FASTDIT_BUILD": "auto"}
    shutil.rmtree(installed.site / "csrc")
    assert installed.run()[1].startswith("library")


def test_an_editable_install_puts_the_library_beside_the_package(checkout, installed):
    wheel, said = checkout("editable_wheel")
    assert wheel is not None, said
    library = installed.package / _build.LIBRARY
    installed.environment |= {"PYTHONPATH": str(installed.site), "FASTDIT_BUILD": "0"}
    code = "from fastdit import native; print(native.load()[0])"
    assert installed.run(code)[1] == f"{library}\n"


def test_an_installation_fails_only_if_it_is_told_to(checkout, installed):
    installed.compiler('echo "library.cpp:1: error: no luck" >&2; exit 1')
    wheel, said = checkout("editable_wheel")
    assert wheel is not None, said
    assert "installed without a compiled library: compiling failed: library.cpp:1: error" in said
    assert not (installed.package / _build.LIBRARY).exists()
    installed.environment["FASTDIT_BUILD"] = "1"
    wheel, said = checkout("editable_wheel")
    assert wheel is None
    assert "fastdit, FASTDIT_BUILD=1: compiling failed: library.cpp:1: error: no luck" in said
