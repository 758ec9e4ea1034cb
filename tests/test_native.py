"""The compiled library at first use: cache, lock, and every way in which it can go wrong.

A small csrc/ is built inside a copy of the package, as an installed wheel has it, in processes of
their own: the library of this process is built and loaded once.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
import types

import pytest
from installed import NEEDS, USE, Installed

from fastdit import _build, backends, native, native_cache

pytestmark = NEEDS
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


@pytest.fixture
def installed(tmp_path):
    """Its path has spaces, as paths do somewhere in the world."""
    folder = tmp_path / "with spaces"
    folder.mkdir()
    return Installed(folder)


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
    message = "x.s: fatal error: No space left on device"
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
    (installed.csrc / "cpu" / "new.h").write_text("")
    installed.environment["FASTDIT_BUILD"] = "0"
    assert installed.run()[1] == "reference\n"


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
