"""The code of the row-wise CPU kernels: under sanitizers at several widths, threaded, for ARM."""

from __future__ import annotations

import shutil
import subprocess

import compilers
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

KERNELS = sorted(path.name for path in (compilers.CSRC / "cpu/isa").glob("*.cpp"))
OPS = ("adaln", "gated_adaln", "bias_gelu", "glu", "gated_residual")
FLAGS = (*compilers.SANITIZERS, *compilers.QUICK)

# <op> <seed> <batch> <tokens> <width> <types of x, y, modulation> <gap between rows> <options>
calls = st.tuples(
    st.sampled_from(OPS),
    st.integers(0, 999),
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(1, 140),
    *[st.integers(0, 2)] * 3,
    st.integers(0, 3),
    st.integers(0, 511),
)


def run(program, batch: list[tuple]) -> None:
    lines = "\n".join(" ".join(map(str, call)) for call in batch)
    done = subprocess.run([str(program)], input=lines, capture_output=True, text=True)
    passed = done.stdout.endswith("0 failures\n") and "ThreadSanitizer" not in done.stderr
    assert passed, f"{lines}\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_no_shape_or_stride_leaves_its_tensors(lanes):
    """Tensors end where their memory ends; and rows have the same bits in one piece and in many.

    16 lanes are AVX-512's, written in vector extensions: they run on every machine.
    """
    if lanes == 8 and "avx2" not in compilers.ISAS:
        pytest.skip("AVX2 is x86-64's")
    flags = compilers.ISAS["avx2"] if lanes == 8 else ()
    program = compilers.compile_host("cpu_rows.cpp", *flags, f"-DFASTDIT_LANES={lanes}", *FLAGS)
    run(program, [(op, 0, 2, 5, width, 0, 0, 0, 0, 0) for op in OPS for width in (1, 64, 65)])

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(calls, min_size=10, max_size=40))
    def any_calls(batch):
        run(program, batch)

    any_calls()


def test_the_sanitizer_would_tell():
    """A row read beyond its end fails: the driver's memory is exact."""
    program = compilers.compile_host("cpu_rows.cpp", "-DFASTDIT_LANES=16", *FLAGS)
    done = subprocess.run(
        [str(program)],
        input="adaln 0 1 1 8 0 0 0 0 512\n",
        capture_output=True,
        text=True,
    )
    assert "heap-buffer-overflow" in done.stderr


@pytest.mark.parametrize("op", OPS)
def test_threads_share_no_row_that_they_write(op):
    """Pieces and samples, a thread each, under ThreadSanitizer; pieces that overlap are a race."""
    program = compilers.compile_host("cpu_rows.cpp", "-fsanitize=thread", *compilers.QUICK)
    options = (0, 7, 32 + 64 + 7, 128 + 32)
    run(
        program,
        [(op, 1, 3, 9, 37, *types, 1, o) for types in ((0,) * 3, (0, 1, 2)) for o in options],
    )
    done = subprocess.run(
        [str(program)], input=f"{op} 1 3 9 37 0 0 0 0 1024\n", capture_output=True, text=True
    )
    assert "WARNING: ThreadSanitizer: data race" in done.stderr


@pytest.mark.parametrize(
    "source", sorted(p.name for p in (compilers.CSRC / "cpu/isa").glob("*.cpp"))
)
def test_compiles_for_arm64(source, tmp_path):
    """The baseline, where the compiler turns vectors into NEON."""
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if compiler is None:
        pytest.skip("no aarch64-linux-gnu-g++")
    flags = ["-std=c++20", "-O1", "-Wall", "-Werror", "-Wno-psabi", "-DFASTDIT_ISA=baseline"]
    command = [compiler, *flags, "-fsyntax-only", f"-I{compilers.CSRC}"]
    done = subprocess.run(
        [*command, str(compilers.CSRC / "cpu/isa" / source)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
