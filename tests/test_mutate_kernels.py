"""The mutation script, and that its lists still fit the kernels they break."""

from __future__ import annotations

import subprocess
import sys

import pytest
from mutate_kernels import ROOT, Mutation, mutations

LISTS = sorted((ROOT / "tests" / "kernels").glob("mutations_*.py"))


@pytest.mark.parametrize("path", LISTS, ids=lambda path: path.stem)
def test_every_mutation_changes_one_place(path):
    found = mutations(path)
    assert len(found) >= 6
    assert len({(m.file, m.old, m.new) for m in found}) == len(found)
    for mutation in found:
        assert (ROOT / mutation.file).read_text().count(mutation.old) == 1, mutation
        assert mutation.old != mutation.new
        assert all((ROOT / test).is_file() for test in mutation.tests)


def test_a_mutation_must_fit(tmp_path):
    (tmp_path / "kernels").mkdir()
    for name in ("kernels/a.py", "a.py"):
        (tmp_path / name).write_text("x = 1\ny = 1\n")
    with pytest.raises(ValueError, match="got '= 1' 2 times, allowed is a change of 1"):
        Mutation("kernels/a.py", "= 1", "= 2", ()).apply(tmp_path)
    with pytest.raises(ValueError, match="got 'z' 0 times"):
        Mutation("kernels/a.py", "z", "w", ()).apply(tmp_path)
    with pytest.raises(ValueError, match="allowed is a change of 1 in kernels/"):
        Mutation("a.py", "x = 1", "x = 2", ()).apply(tmp_path)
    assert Mutation("kernels/a.py", "x = 1", "x = 2", ()).apply(tmp_path) == "x = 1\ny = 1\n"
    assert (tmp_path / "kernels" / "a.py").read_text() == "x = 2\ny = 1\n"


def run_script(root, name: str) -> tuple[int, str]:
    """The script's exit status and output, of the repository `root`; it imports that package."""
    code = (
        "import sys, pathlib, mutate_kernels\n"
        f"mutate_kernels.ROOT = pathlib.Path({str(root)!r})\n"
        f"sys.exit(mutate_kernels.main([{name!r}]))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_killed_survived_and_broken(tmp_path):
    """Three mutations of a toy repository: one caught, one missed, one that cannot run."""
    for folder in ("fastdit", "kernels", "tests/kernels"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / "fastdit" / "__init__.py").write_text("")
    (tmp_path / "fastdit" / "testing.py").write_text("")
    (tmp_path / "kernels" / "__init__.py").write_text("")
    (tmp_path / "kernels" / "toy.py").write_text(
        "def double(x):\n    return x * 2\n\n\nspare = 1\n"
    )
    (tmp_path / "tests" / "test_toy.py").write_text(
        "from fastdit.kernels.toy import double\n\n\ndef test_it():\n    assert double(3) == 6\n"
    )
    (tmp_path / "tests" / "kernels" / "mutations_toy.py").write_text(
        "TESTS = {'kernels/toy.py': ('tests/test_toy.py',)}\n"
        "MUTATIONS = [('kernels/toy.py', 'x * 2', 'x * 3'), ('kernels/toy.py', 'spare = 1', ''),"
        " ('kernels/toy.py', 'def double', 'def')]\n"
    )
    status, printed = run_script(tmp_path, "toy")
    assert status == 1
    assert "1 of 3 killed" in printed
    assert all(word in printed for word in ("SURVIVED", "BROKEN"))
    assert "x * 2" in (tmp_path / "kernels" / "toy.py").read_text()
    (tmp_path / "tests" / "test_toy.py").write_text("def test_it():\n    assert False\n")
    status, printed = run_script(tmp_path, "toy")
    assert status == 1
    assert "the tests fail unbroken" in printed
    assert run_script(tmp_path, "nothing")[0] == 2
