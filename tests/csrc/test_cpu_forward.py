"""The code of the native forward's kernels: under sanitizers at three widths, against loops."""

from __future__ import annotations

import subprocess

import compilers
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

FLAGS = (*compilers.SANITIZERS, *compilers.QUICK)

sizes = st.integers(1, 70)
calls = st.one_of(
    st.tuples(st.just("gemm"), st.integers(0, 99), st.integers(1, 33), sizes, sizes,
              st.integers(0, 3)),
    st.tuples(st.just("int8"), st.integers(0, 99), st.integers(1, 33), sizes, sizes,
              st.integers(0, 1)),
    st.tuples(st.just("attention"), st.integers(0, 99), st.integers(1, 2), st.integers(1, 40),
              st.integers(1, 2), st.integers(1, 40), st.integers(1, 3)),
    st.tuples(st.sampled_from(["norm", "dots"]), st.integers(0, 99), st.integers(1, 9), sizes,
              sizes, st.just(0)),
)  # fmt: skip
FIXED = [
    ("gemm", 0, 16, 40, 900, 0),  # three blocks of the depth
    ("int8", 0, 3, 33, 4608, 1),
    ("attention", 0, 1, 300, 1, 9, 2),  # two blocks of keys
    ("attention", 0, 1, 257, 1, 72, 1),
]


def run(program, batch: list[tuple]) -> str:
    lines = "".join(" ".join(map(str, call)) + "\n" for call in batch)
    done = subprocess.run([str(program)], input=lines, capture_output=True, text=True)
    assert done.stdout.endswith("0 failures\n"), f"{lines}\n{done.stdout}{done.stderr}"
    return done.stderr


@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_no_shape_leaves_its_memory_or_changes_the_result(lanes):
    """16 lanes are AVX-512's, written in vector extensions: they run on every machine."""
    if lanes == 8 and "avx2" not in compilers.ISAS:
        pytest.skip("AVX2 is x86-64's")
    flags = compilers.ISAS["avx2"] if lanes == 8 else ()
    program = compilers.compile_host("cpu_forward.cpp", *flags, f"-DFASTDIT_LANES={lanes}", *FLAGS)
    run(program, FIXED)

    @settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(calls, min_size=10, max_size=40))
    def any_calls(batch):
        run(program, batch)

    any_calls()


@pytest.mark.parametrize("call", ["norm 0 2 8 0 1", "dots 0 2 8 8 1"])
def test_the_sanitizer_would_tell(call):
    """A row beyond the end fails: the driver's memory is exact."""
    program = compilers.compile_host("cpu_forward.cpp", "-DFASTDIT_LANES=16", *FLAGS)
    done = subprocess.run([str(program)], input=call + "\n", capture_output=True, text=True)
    assert "heap-buffer-overflow" in done.stderr
