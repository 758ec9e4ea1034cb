"""The whole suite runs on all cores; a part of it, named on the command line, in one process.

Halves the suite's time on two cores. `-n` decides otherwise, and without pytest-xdist tests run
one after another.
"""

import os

import pytest


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads its options
def pytest_cmdline_main(config: pytest.Config) -> None:
    options = config.option
    whole = config.args_source == config.ArgsSource.TESTPATHS
    marked = options.markexpr not in ("", "not slow")  # the latter is pyproject.toml's
    parts = options.keyword or marked or options.collectonly or options.usepdb
    if not config.pluginmanager.hasplugin("xdist") or options.numprocesses is not None:
        return
    if "PYTEST_XDIST_WORKER" in os.environ:  # a worker comes by here too, and starts none
        return
    if whole and not parts:
        options.numprocesses = os.cpu_count()
        options.dist = "loadfile"  # a file's tests share what its fixtures compiled
        # Each worker has one core: more threads would wait for each other in spin barriers.
        os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
