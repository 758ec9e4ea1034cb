"""The compiled library's build: toolchain, cache, lock, and every way in which it can go wrong.

Most tests build a small csrc/ inside a copy of the package, as an installed wheel has it, in
processes of their own: the library of this process is built and loaded once.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import threading
import time
import types
from pathlib import Path

import forked
import pytest
import torch

from fastdit import _build, backends, native, native_cache
from fastdit._build import sources, toolchain

ROOT = Path(__file__).resolve().parent.parent
KERNEL = """__global__ void twice(float* x) { x[threadIdx.x] *= 2; }
void launch(float* x) { twice<<<1, 32>>>(x); }
"""
LAUNCH = """#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
void launch(float* x);
torch::stable::Tensor probe(torch::stable::Tensor x) { launch(nullptr); return x; }
STABLE_TORCH_LIBRARY_FRAGMENT(fastdit_native, m) { m.def("probe(Tensor x) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(fastdit_native, CUDA, m) { m.impl("probe", TORCH_BOX(&probe)); }
"""
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
COMPILER = shutil.which("c++")
pytestmark = [
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


def test_first_use_builds_once_and_says_so(installed):
    status, out, err = installed.run()
    assert status == 0, err
    assert out.startswith("library")
    assert err.count("compiling the kernels with") == err.count("fastdit: compiled in") == 1
    assert err.count("\n") == 2
    (library,) = installed.libraries()
    status, out, err = installed.run()
    assert (status, err) == (0, "")
    assert out.startswith("library")
    assert installed.libraries() == [library]
    assert {path.name for path in installed.cache.iterdir()} == {library.parent.name, "build.lock"}


def test_a_library_of_other_sources_or_another_version_is_not_used(installed):
    installed.run()
    installed.environment["FASTDIT_BUILD"] = "0"
    assert installed.run()[1].startswith("library")
    version = installed.package / "_version.py"
    before = version.read_text()
    version.write_text('__version__ = "0.0.9"\n')
    assert installed.run()[1] == "reference\n"
    version.write_text(before)
    assert installed.run()[1].startswith("library")
    (installed.csrc / "cpu" / "new.h").write_text("")
    status, out, err = installed.run()
    assert (status, out) == (0, "reference\n")
    assert err.count("\n") == 1
    assert "FASTDIT_BUILD=0 forbids building it" in err


def test_two_processes_at_once_compile_once(installed):
    installed.compiler("sleep 1")
    both = [installed.start(), installed.start()]
    results = [process.wait() for process in both]
    assert all(out.startswith("library") for _, out, _ in results), results
    said = "".join(err for *_, err in results)
    assert said.count("fastdit: compiled in") == 1
    assert len(installed.libraries()) == 1


def test_a_killed_build_leaves_nothing_that_is_used(installed):
    """Its compiler lives on for a while: the next build waits for it, and starts afresh."""
    compiling = installed.folder / "compiling"
    installed.compiler(f'if [ ! -e "{compiling}" ]; then touch "{compiling}"; sleep 2; fi')
    first = installed.start()
    while not compiling.exists():
        assert first.is_alive(), first.wait()
        time.sleep(0.02)
    first.kill()
    first.wait()
    assert list(installed.cache.glob("partial-*"))
    (generation := installed.cache / "0-torch").mkdir()
    (generation / "libfastdit-0.so.123").write_bytes(b"half")
    status, out, err = installed.run()
    assert status == 0, err
    assert out.startswith("library")
    assert "another process is compiling" in err
    assert not list(installed.cache.glob("partial-*"))
    assert not list(installed.cache.glob("*/*.so.*"))


def test_a_compiler_that_fails_is_asked_once(installed):
    calls = installed.folder / "calls"
    installed.compiler(f'echo x >> "{calls}"; echo "library.cpp:1: error: no luck" >&2; exit 1')
    status, out, err = installed.run()
    assert (status, out) == (0, "reference\n")
    assert err.count("so ops run their reference") == 1
    assert "compiling failed: library.cpp:1: error: no luck" in err
    (log,) = installed.cache.glob("*/failed-*.log")
    assert str(log) in err
    assert "no luck" in log.read_text()
    assert calls.read_text() == "x\n"

    status, out, err = installed.run()
    assert (status, out) == (0, "reference\n")
    assert err.count("\n") == 1
    assert "not tried again" in err
    assert calls.read_text() == "x\n"

    installed.environment["FASTDIT_BUILD"] = "1"
    code = "import torch, fastdit\nfor _ in range(2):\n try: fastdit.ops.adaln(torch.ones(1, 2, 8))"
    status, out, err = installed.run(code + "\n except ImportError as error: print(error)")
    assert out.count("library.cpp:1: error: no luck") >= 4  # twice the summary and the output
    assert calls.read_text() == "x\n" * 2

    installed.environment["FASTDIT_BUILD"] = "auto"
    del installed.environment["CXX"]
    code = "from fastdit.cli import main; main(['build', '--no-cuda'])"
    status, out, err = installed.run(code)
    assert status == 0, err
    assert "built in" in out
    assert installed.run()[1].startswith("library")


def test_a_full_disk_is_reported_and_not_remembered(installed):
    message = "/tmp/x.s: fatal error: No space left on device"
    installed.compiler(f'echo "{message}" >&2; exit 1')
    _, out, err = installed.run()
    assert out == "reference\n"
    assert f"compiling failed: {message}" in err
    assert not list(installed.cache.glob("*/failed-*.log"))
    installed.compiler("")
    assert installed.run()[1].startswith("library")


def test_without_a_compiler_one_line_says_so(installed):
    installed.environment["PATH"] = str(installed.folder)
    status, out, err = installed.run()
    assert (status, out) == (0, "reference\n")
    assert err.count("\n") == 1
    assert "no C++ compiler was found" in err
    assert "`fastdit build`" in err
    assert "`fastdit doctor`" in err
    code = "import torch, fastdit\nx = torch.ones(1, 2, 8)\n"
    code += "with fastdit.backend('native'): fastdit.ops.adaln(x)"
    status, _, err = installed.run(code)
    assert status == 1
    assert "the compiled library is missing" in err
    code = "from fastdit.cli import main; main(['build'])"
    status, _, err = installed.run(code)
    assert status == 1
    assert err.startswith("fastdit build: no C++ compiler was found")


def test_a_cache_that_cannot_be_written_gives_way_to_the_temporary_folder(installed):
    installed.environment["FASTDIT_CACHE"] = "/dev/null/cache"
    temporary = installed.folder / "tmp"
    temporary.mkdir()
    installed.environment["TMPDIR"] = str(temporary)
    for compiled in (1, 0):
        status, out, err = installed.run()
        assert status == 0, err
        assert out.startswith("library")
        assert err.count("fastdit: compiled in") == compiled
    (folder,) = temporary.glob("fastdit-*")
    folder.chmod(0o777)  # anyone could have put a library there
    status, out, err = installed.run()
    assert (status, out) == (0, "reference\n")
    assert err.count("\n") == 1
    assert "/dev/null/cache: Not a directory" in err
    assert "not this user's alone" in err


def test_an_installed_library_is_used_and_a_cached_one_goes_before_it(installed):
    build = installed.build()
    tools = build.find_toolchain(_build.find_torch(), cuda=False)
    library = installed.package / build.LIBRARY
    build.compile_library(tools, build.describe(tools), installed.folder / "objects", library)
    code = "from fastdit import native; print(native.load()[0])"
    assert installed.run(code)[1].strip() == str(library)
    installed.run("from fastdit import native; native.build(False)")
    assert installed.run(code)[1].strip() == str(installed.libraries()[0])


def test_a_library_that_does_not_load_is_built_again(installed):
    installed.run()
    (library,) = installed.libraries()
    whole = library.read_bytes()
    library.write_bytes(b"\0" * 64 + whole[64:])
    status, out, err = installed.run()
    assert status == 0, err
    assert out.startswith("library")
    assert "fastdit: compiled in" in err
    library.write_bytes(b"\0" * 64 + whole[64:])
    installed.environment["FASTDIT_BUILD"] = "0"
    _, out, err = installed.run()
    assert out == "reference\n"
    assert "does not load" in err


def test_where_nvcc_fails_the_rest_is_built(installed):
    (installed.csrc / "cuda" / "probe.cu").write_text(KERNEL)
    (installed.csrc / "cuda" / "probe.cpp").write_text(LAUNCH)
    home = installed.folder / "cuda"
    (home / "bin").mkdir(parents=True)
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text(
        '#!/bin/sh\necho compute_90\necho "probe.cu: error: unsupported host" >&2\nexit 1\n'
    )
    nvcc.chmod(0o755)
    installed.environment["CUDA_HOME"] = str(home)
    code = "import torch; torch.version.cuda = '13.0'\n" + USE
    status, out, err = installed.run(code)
    assert status == 0, err
    assert out.startswith("library")
    assert "unsupported host; going on without the CUDA kernels" in err
    status, out, err = installed.run(code)
    assert (status, err) == (0, "")


@pytest.mark.skipif(_build.find_nvcc() is None, reason="no nvcc")
def test_cuda_kernels_are_in_the_library_with_nvcc(installed):
    (installed.csrc / "cuda" / "probe.cu").write_text(KERNEL)
    (installed.csrc / "cuda" / "probe.cpp").write_text(LAUNCH)
    installed.environment["TORCH_CUDA_ARCH_LIST"] = "9.0+PTX"
    code = "from fastdit.cli import main; main(['build', '--cuda', '--jobs', '2'])"
    status, _, err = installed.run(code)
    assert status == 0, err
    code = USE + "print(torch._C._dispatch_has_kernel_for_dispatch_key("
    status, out, err = installed.run(code + "'fastdit_native::probe', 'CUDA'))")
    assert (status, err) == (0, "")
    assert '"archs": ["9.0+PTX"]' in out
    assert out.endswith("True\n")


def test_sources_that_change_meanwhile_are_noticed(installed):
    installed.compiler(f'echo "// new" >> "{installed.csrc / "library.cpp"}"')
    status, out, err = installed.run()
    assert (status, out) == (0, "reference\n")
    assert "changed while it was compiled" in err
    assert installed.libraries() == []


def test_a_second_copy_in_one_process_takes_the_library_that_is_loaded(installed):
    again = "import importlib\nfrom fastdit import native\nimportlib.reload(native)\n"
    status, out, err = installed.run(USE + again + "print(native.load()[0])")
    assert status == 0, err
    assert out.splitlines()[-1] == str(installed.libraries()[0])
    edit = f"open({str(installed.csrc / 'new.h')!r}, 'w').close()\n"
    status, _, err = installed.run(USE + edit + again + "native.load()")
    assert status == 1
    assert "a library of other sources is loaded in this process; start it again" in err


def test_old_generations_are_pruned(tmp_path):
    for i in range(native_cache.KEPT + 3):
        (tmp_path / f"{i}-torch2.13").mkdir()
        os.utime(tmp_path / f"{i}-torch2.13", (i, i))
    (tmp_path / "other").mkdir()
    native_cache.prune(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {f"{i}-torch2.13" for i in range(3, native_cache.KEPT + 3)} | {"other"}


def test_build_settings_are_checked(monkeypatch):
    monkeypatch.setenv("FASTDIT_BUILD", "yes")
    with pytest.raises(ValueError, match="FASTDIT_BUILD: got 'yes', allowed are 'auto', '0', '1'"):
        native.build_mode()
    monkeypatch.setenv("MAX_JOBS", "3")
    assert _build.default_jobs() == 3
    monkeypatch.setenv("MAX_JOBS", "0")
    assert _build.default_jobs() >= 1


def test_doctor_tells_what_to_do(installed):
    code = "from fastdit.cli import main; main(['doctor'])"
    installed.environment["COLUMNS"] = "300"
    _, out, err = installed.run(code)
    assert "not built; the first use of an op builds it, or `fastdit build` now" in out, err
    assert not installed.libraries()
    installed.run()
    _, out, _ = installed.run(code)
    assert str(installed.libraries()[0]) in out
    assert "for torch 2.13 and later" in out
    shutil.rmtree(installed.cache)
    installed.environment["PATH"] = str(installed.folder)
    _, out, _ = installed.run(code)
    assert "cannot be built: no C++ compiler was found" in out


def test_other_threads_wait_for_the_kernels(monkeypatch):
    """The first call on a device may compile for a while: no thread takes the reference."""
    started = threading.Event()

    def register_all():
        started.set()
        time.sleep(0.2)
        backends.register(backends.Kernel("adaln", "slow", "late", lambda *args: None))

    monkeypatch.setitem(sys.modules, "slow_provider", types.ModuleType("slow_provider"))
    sys.modules["slow_provider"].register_all = register_all
    monkeypatch.setitem(backends.PROVIDERS, "slow", ("slow_provider",))
    seen = []
    first = threading.Thread(target=backends.kernels_for, args=("adaln", "slow"))
    first.start()
    started.wait()
    seen = [kernel.name for kernel in backends.kernels_for("adaln", "slow")]
    first.join()
    assert seen == ["late"]
    backends._kernels.pop(("adaln", "slow"))
    backends._loaded.discard("slow")
