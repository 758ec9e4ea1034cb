"""What can go wrong in a build."""

from __future__ import annotations

import re

PASSING = (
    "No space left on device",
    "Disk quota exceeded",
    "Cannot allocate memory",
    "virtual memory exhausted",
    "Killed",
)
"""What compilers say when the machine is at fault and not the code."""


class BuildError(RuntimeError):
    """The library cannot be built; the message names what is missing."""


class CompileError(BuildError):
    """A compiler failed: the message is its first complaint, `output` all that ninja said.

    `of_cuda` tells whether nvcc failed, in compiling or in linking; `passing` whether the machine
    is at fault, so that the same build may go well another time.
    """

    def __init__(self, output: str) -> None:
        lines = [line.strip() for line in output.splitlines() if line.strip()]
        complaints = [line for line in lines if re.search(r"\berror\b|No space left", line, re.I)]
        failed = [line for line in lines if line.startswith("FAILED:")]
        super().__init__(f"compiling failed: {[*complaints, *failed, *lines, 'no output'][0]}")
        self.output = output
        self.of_cuda = any(re.search(r"\bcuda-\S+\.o|\.so$", line) for line in failed)
        self.passing = any(words in output for words in PASSING)
