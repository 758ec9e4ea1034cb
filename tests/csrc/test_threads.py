"""Every CPU kernel of the compiled library on four threads, under ThreadSanitizer: no race.

The library is compiled for it as it stands, with its own sharing of work, but for two things:
thread_pool.cpp takes the place of PyTorch's pool of threads, and less work is worth a thread, so
that small calls are shared too. threaded_calls.py calls it from Python.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import compilers
import pytest

from fastdit._build import library as build
from fastdit._build import sources

FLAGS = ("-fsanitize=thread", "-fPIC", "-Wno-error", *compilers.QUICK, *sources.COMMON[2:])
FORWARD = re.compile(r"forward.*\.cpp|gemm.*\.cpp|isa\.cpp|thread_pool\.cpp")
# What the system's loader does with thread_local memory of a library.
SUPPRESSED = "race:_dl_deallocate_tls\nrace:allocate_dtv_entry\n"
SHARED = ("forward_conditioning", "forward_pack")  # by items that no pool can make overlap
SAME = ("forward_labelled", "diffusion_step_into")  # ops of one kernel: it is reported once
FORWARDS = ("forward", "forward_labelled", *SHARED)


def headers(name: str, end: str = "end") -> Path:
    """A folder of headers that go before those of csrc/: with shares of little work, and a rest
    behind each, so that no thread takes them all. They end at `end`."""
    folder = compilers.folder() / name
    (folder / "cpu").mkdir(parents=True, exist_ok=True)
    changes = (
        (r"(kGrain) = \d+;", r"\1 = 512;"),
        (r"(kWorth) = [\de]+;", r"\1 = 20;"),
        (r"(\n      f\(begin, )end\);", rf"\1{end}); void rest(); rest();"),
    )
    found = 0
    for header in ("parallel.h", "forward_shared.h"):
        text = (compilers.CSRC / "cpu" / header).read_text()
        for pattern, replacement in changes:
            text, count = re.subn(pattern, replacement, text)
            found += count
        path = folder / "cpu" / header
        if not path.is_file() or path.read_text() != text:
            path.write_text(text)
    assert found == len(changes)
    return folder


def library(isas: tuple[str, ...], names: re.Pattern[str], include: Path) -> Path:
    """The sources that match, for these instruction sets, with the headers of `include`.

    What the others hold stays undefined, and nobody calls it.
    """
    compiler = compilers.host_compiler(f"-I{include}", *FLAGS, "-I.", "-c")
    units = [
        unit
        for unit in sources.compilations(compilers.CSRC, cuda=False)
        if names.fullmatch(unit.source.name)
        and (unit.source.parent.name != "isa" or unit.flags.rpartition("=")[2] in isas)
    ]
    units.append(sources.Unit(compilers.HERE / "thread_pool.cpp", "", "thread_pool.o"))
    lines = compilers.rule(*compiler)
    for unit in units:
        lines += [f"build {unit.object}: compile {unit.source}", f"  flags = {unit.flags}"]
    lib = compilers.tools().torch / "lib"
    link = (*compilers.tools().cxx, *FLAGS, "-shared", "-Wl,-z,lazy", "-Wl,-Bsymbolic")
    libraries = compilers.command(f"-L{lib}", "-ltorch_cpu", "-lc10")
    lines += ["rule link", f"  command = {compilers.command(*link)} $in {libraries} -o $out"]
    lines += [f"build {build.LIBRARY}: link {' '.join(unit.object for unit in units)}"]
    return compilers.make(build.LIBRARY, compilers.tools().cxx_version, lines)


def reports(library: Path, groups: tuple[str, ...], isa: str = "baseline"):
    """How often ThreadSanitizer complained of each op as it is, and with overlapping pieces; the
    ops of the library; and all that it said."""
    runtime = compilers.run([*compilers.tools().cxx, "-print-file-name=libtsan.so"]).strip()
    if not Path(runtime).is_file():
        pytest.skip("no libtsan.so")
    suppressions = compilers.folder() / "suppressions"
    suppressions.write_text(SUPPRESSED)
    environment = {
        **os.environ,
        "LD_PRELOAD": runtime,
        # By default an address is reported once, and results lie where an earlier one did.
        "TSAN_OPTIONS": f"exitcode=0 suppress_equal_addresses=0 suppressions={suppressions}",
        "OMP_NUM_THREADS": "1",
        "FASTDIT_CPU_ISA": isa,
        "PYTHONPATH": os.pathsep.join([str(compilers.HERE.parent), *sys.path]),
    }
    done = subprocess.run(
        [sys.executable, str(compilers.HERE / "threaded_calls.py"), str(library), *groups],
        env=environment,
        capture_output=True,
        text=True,
    )
    said = done.stderr
    if "FATAL: ThreadSanitizer" in said:
        pytest.skip(f"ThreadSanitizer does not run here: {said.splitlines()[0]}")
    assert done.returncode == 0, said
    found = {"as it is": Counter(), "overlapping": Counter()}
    end = {}
    for part in said.split("\n-- ")[0 if said.startswith("-- ") else 1 :]:
        line, _, rest = part.removeprefix("-- ").partition("\n")
        how, name = line.rsplit(" ", 1)
        if how in found:
            found[how][name] += rest.count("WARNING: ThreadSanitizer")
        else:
            end.setdefault(*line.split(" ", 1))
    assert end["isa"] == isa
    return found["as it is"], found["overlapping"], set(end["kernels"].split()), said


def test_the_native_forward_has_no_race():
    """Samples that one thread computes, and layers that all share: products in float32 and in 8
    bits, attention, rows; packing; conditioning."""
    races, broken, _, said = reports(
        library(("baseline",), FORWARD, headers("shares")), ("forward",)
    )
    assert set(races) == set(FORWARDS)
    assert not races.total(), said
    assert broken["forward"]


@pytest.mark.slow  # compiles the library: a minute of one core
@pytest.mark.parametrize("isa", list(compilers.ISAS))
def test_no_kernel_has_a_race(isa):
    """Each op is called; and each tells of pieces that overlap, so each is shared, and is seen."""
    names = re.compile(r"(?!library\.).*")  # which is written for each build, and has no kernel
    groups = ("rows", "patches", "step", "forward", "direct")
    built = library(tuple(compilers.ISAS), names, headers("shares"))
    races, broken, kernels, said = reports(built, groups, isa)
    assert set(races) == kernels
    assert not races.total(), said
    assert {name for name in broken if broken[name]} >= kernels - {*SHARED, *SAME}


@pytest.mark.slow  # compiles the forward again: 10 s
def test_a_share_that_is_too_large_is_a_race():
    """With the forward's `shared` broken in a copy, every one of its ops tells."""
    broken = headers("broken", "std::min(count, end + 1)")
    races, *_ = reports(library(("baseline",), FORWARD, broken), ("forward",))
    assert all(races[name] for name in FORWARDS if name not in SAME), races
