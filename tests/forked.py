"""Python processes that start with torch imported already: a tenth of a second instead of two."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch"])


class Process:
    """Python running `code` in `folder` with the whole of `environment`, as `python -c` would."""

    def __init__(self, code: str, folder: Path, environment: dict[str, str]) -> None:
        descriptor, out = tempfile.mkstemp()
        os.close(descriptor)
        self._out, self._err = Path(out), Path(f"{out}.err")
        arguments = (code, str(folder), environment, out)
        self._process = _context.Process(target=_run, args=arguments)
        self._process.start()
        self.kill = self._process.kill
        self.is_alive = self._process.is_alive

    def wait(self) -> tuple[int, str, str]:
        """Its exit status, standard output and standard error."""
        self._process.join(timeout=120)
        said = [path.read_text() if path.exists() else "" for path in (self._out, self._err)]
        for path in (self._out, self._err):
            path.unlink(missing_ok=True)
        assert self._process.exitcode is not None, said
        return self._process.exitcode, *said


def _run(code: str, folder: str, environment: dict[str, str], out: str) -> None:
    for number, path in ((1, out), (2, f"{out}.err")):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None
    for name in [name for name in sys.modules if name.partition(".")[0] == "fastdit"]:
        del sys.modules[name]
    sys.path[:0] = environment.get("PYTHONPATH", "").split(os.pathsep)
    exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})
