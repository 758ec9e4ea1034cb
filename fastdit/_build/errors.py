"""What can go wrong in a build."""

from __future__ import annotations

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
    """A compiler failed: the message is its first complaint, `output` all that it said."""

    def __init__(self, output: str) -> None:
        lines = [line.strip() for line in output.splitlines() if line.strip()]
        telling = [line for line in lines if "error" in line.lower() or "No space" in line]
        super().__init__(f"compiling failed: {(telling or lines or ['no output'])[0]}")
        self.output = output
        self.passing = any(words in output for words in PASSING)
