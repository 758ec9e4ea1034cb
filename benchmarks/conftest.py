"""Options of the benchmarks, and their table at the end of the run."""

from __future__ import annotations

import pytest
import timing
import torch


def pytest_addoption(parser):
    group = parser.getgroup("fastdit")
    group.addoption("--threads", type=int, default=1, help="threads of PyTorch; 1 by default")
    group.addoption("--no-compile", action="store_true", help="leave torch.compile out")


@pytest.fixture(autouse=True)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.config.getoption("--threads"))
    yield
    torch.set_num_threads(before)


@pytest.fixture
def compiled(request):
    """`torch.compile`, as a dictionary of one candidate or none: `compiled(function)`."""

    def candidate(function):
        if request.config.getoption("--no-compile"):
            return {}
        torch.compiler.reset()
        return {"torch.compile": torch.compile(function, dynamic=False)}

    return candidate


def pytest_terminal_summary(terminalreporter):
    for line in timing.TABLE:
        terminalreporter.write_line(line)
