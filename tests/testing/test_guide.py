"""The guide's example runs as it stands."""

import re
import runpy
from pathlib import Path

GUIDE = Path(__file__).parents[2] / "docs" / "testing.md"


def test_the_example_runs(tmp_path, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.S)
    script = tmp_path / "example.py"  # a file, because Triton reads a kernel's source
    script.write_text(example)
    runpy.run_path(str(script))
    assert capsys.readouterr().out.count("modelled") == 2
