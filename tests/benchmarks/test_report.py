"""Results files, comparisons, the page in a browser, and the tables of the README."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess

import numpy as np
import pytest
import readme_tables
from harness import measure, modelled, report, results
from harness.problem import COPY, EAGER, OURS, Absent, Problem
from PIL import Image
from test_harness import case_of, toy

from fastdit import backends, cli

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


@pytest.fixture(scope="module")
def run():
    """One measured case with an absent peer and a broken one, on a machine of our own."""
    problem = toy(
        **{
            "torch.compile": lambda: [],
            "OpenVINO": Absent("openvino is not installed"),
            COPY: lambda: None,
        }
    )
    found = measure.measure(case_of(problem), {"copy": 1e9, "gemm_fp32": 1e9})
    machine = {
        "cpu": "a <processor>",
        "instructions": "AVX2",
        "threads": 2,
        "cores": 2,
        "commit": "0123456789ab",
        "versions": {"torch": "2.13", "fastdit": "0"},
    }
    return {
        "kind": results.KIND,
        "time": "2030-01-01T00:00:00+00:00",
        "machine": machine,
        "ceilings": {"copy": 1e9, "gemm_fp32": 1e9},
        "energy": "no CUDA device",
        "results": [found],
        "failed": {"another": "RuntimeError: out of luck"},
        "left_out": [],
        "modelled": [],
    }


def scaled(run, factor):
    """The same run with fastdit's ratios multiplied."""
    other = copy.deepcopy(run)
    speedup = other["results"][0]["columns"][OURS]["speedup"]
    speedup.update({key: factor * value for key, value in speedup.items()})
    return other


def test_a_file_is_written_whole_or_not_at_all(run, tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    results.write(path, run)
    assert results.read(path) == run
    with pytest.raises(ValueError, match=r"not JSON compliant|Out of range"):
        results.write(path, run | {"seconds": float("nan")})
    assert results.read(path) == run
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize("text", ["", "[]", '{"kind": "other"}'])
def test_what_is_no_results_file_is_refused(text, tmp_path):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(SystemExit, match=r"fastdit bench: .*other.json: not a results file"):
        cli.main(["bench", "--compare", str(path), str(path)])


def test_compare_tells_a_change_from_the_spread(run, tmp_path, capsys):
    run = copy.deepcopy(run)
    run["results"][0]["columns"][OURS]["speedup"] = {"median": 2.0, "least": 1.9, "most": 2.1}
    assert "| 1.02× | within the spread |" in results.compare(run, scaled(run, 1.02))
    assert "| 0.50× | slower |" in results.compare(run, scaled(run, 0.5))
    other = scaled(run, 2)
    other["results"].append(copy.deepcopy(other["results"][0]) | {"id": "new case"})
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, contents in zip(paths, (run, other), strict=True):
        results.write(path, contents)
    cli.main(["bench", "--compare", *map(str, paths)])
    printed = capsys.readouterr().out
    assert "2.00× (1.90 to 2.10) | 4.00× (3.80 to 4.20) | 2.00× | faster" in printed
    assert "Not in before: new case." in printed


def test_tables_name_what_was_not_compared(run):
    text = results.markdown(run)
    assert "| toy | forward | size, fp32 |" in text
    assert "| broken |" in text
    assert "- OpenVINO is absent: openvino is not installed (toy, forward: size, fp32)" in text


def test_the_page_escapes_and_fetches_nothing(run):
    page = report.page(run)
    assert "a &lt;processor&gt;" in page
    assert "src=" not in page
    assert "another failed: RuntimeError: out of luck" in page
    assert page.count("<svg") >= 2  # speeds, and bandwidths


def test_the_proof_is_on_the_page(run):
    timed = {"op": "adaln", "pass": "forward", "kernel": "triton", "modelled_us": 12.3}
    timed |= {"measured_us": {"p50": 15.0}, "eager_us": 40.0, "terabytes_per_second": 2.5}
    eager = {"op": "attention", "pass": "forward", "kernel": None, "why_not": "a < b"}
    proof = {"gpu": "NVIDIA H100", "data_sheet": "H100", "tests": {"passed": 9}}
    page = report.page(run | {"gpu_proof": proof | {"rows": [timed, eager]}})
    assert "Tests on the GPU: 9 passed. Modelled for a H100." in page
    assert "<td>12.3</td><td>15</td><td>40</td><td>2.5</td>" in page
    assert "eager: a &lt; b" in page


def test_pictures_of_nothing_are_left_out(run):
    empty = report.page(run | {"results": []})
    assert "<svg" not in empty


@pytest.mark.skipif(BROWSER is None, reason="chromium is not installed")
def test_the_page_in_a_browser(run, tmp_path):
    page, picture = tmp_path / "report.html", tmp_path / "report.png"
    committed = readme_tables.BENCH
    report.write(page, results.read(committed) if committed.exists() else run)
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--window-size=1100,1600",
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--screenshot={picture}",
        page.as_uri(),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    pixels = np.asarray(Image.open(picture).convert("RGB")).reshape(-1, 3)
    assert len(pixels) == 1100 * 1600
    accent = (np.abs(pixels.astype(int) - (0x0B, 0x7A, 0x75)).sum(1) < 12).mean()
    assert accent > 0.002, "fastdit's bars are not there"
    assert (pixels.std(1) < 200).all()


def test_the_modelled_table_covers_every_op_and_says_that_it_is_modelled():
    rows = results.read(readme_tables.BENCH)["modelled"]
    assert [row["op"] for row in rows] == list(dict.fromkeys(row["op"] for row in rows))
    assert {row["op"] for row in rows} == set(backends.OPS)
    for row in rows:
        ours, eager = (row["counts"][c] for c in ("fastdit", "eager"))
        assert ours["launches"] <= eager["launches"]
        assert ours["bytes"] <= 1.01 * eager["bytes"]
    assert modelled.markdown(rows).startswith("*Modelled*, not measured")


# ---- the README ------------------------------------------------------------------------------


def test_the_documents_tables_are_the_results():
    assert readme_tables.stale() == []


def test_a_typed_figure_is_found(monkeypatch, tmp_path):
    text = (readme_tables.ROOT / "README.md").read_text()
    for name in readme_tables.FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "README.md").write_text(text.replace("guidance 2,", "guidance 2, at least"))
    monkeypatch.setattr(readme_tables, "ROOT", tmp_path)
    assert readme_tables.stale() == ["README.md"]
    with pytest.raises(ValueError, match="table: got 'nonesuch', allowed are figures, speed"):
        readme_tables.filled("<!-- table: nonesuch -->\n<!-- end -->")


# ---- the command -----------------------------------------------------------------------------


def test_list_names_the_cases(capsys):
    options = ["--list", "--device", "cpu", "--level", "op", "--only", "adaln, forward"]
    cli.main(["bench", *options])
    printed = capsys.readouterr().out.splitlines()
    assert "op        adaln, forward: XL/2, B2, fp32" in printed
    assert all("adaln, forward" in line for line in printed)


def test_a_run_writes_the_json_and_the_page(tmp_path, capsys, monkeypatch):
    import harness.suite as suite

    monkeypatch.setattr(suite.machine, "ceilings", lambda *_: {"copy": 1e10})
    monkeypatch.setattr(suite.modelled, "table", list)
    out = tmp_path / "found.json"
    options = ["--only", "unpatchify, forward: 16 tokens", "--rounds", "3", "--patience", "0"]
    cli.main(["bench", "--device", "cpu", "--subset", "quick", *options, "--out", str(out)])
    assert "| unpatchify | forward |" in capsys.readouterr().out
    (result,) = results.read(out)["results"]
    assert result["columns"][OURS]["error"] == 0
    assert len(result["columns"][EAGER]["turns"]) == 3
    assert "<svg" in out.with_suffix(".html").read_text()
    assert json.loads(out.read_text())["machine"]["versions"]["torch"]


def test_without_the_repository_it_says_so(tmp_path, monkeypatch):
    from fastdit.commands import bench

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "site" / "fastdit" / "commands" / "b.py"))
    with pytest.raises(SystemExit, match=r"benchmarks/: not beside this installation.*checkout"):
        cli.main(["bench"])


def test_gpu_proofs_dry_run_names_everything_it_would_do(capsys):
    options = ["--gpu-proof", "--dry-run", "--skip-tests", "--size", "S", "--batch", "2"]
    cli.main(["bench", *options, "--level", "model"])
    printed = capsys.readouterr().out
    assert "stopped before the first launch" in printed
    assert printed.index("model: model, forward: XL/2, B32, bf16") < printed.index("B/2, B2, bf16")


def test_a_problem_without_differences_is_all_zero():
    """A column that computes what eager does has no error at all."""
    problem = Problem({EAGER: lambda: toy().columns[EAGER](), OURS: toy().columns[OURS]}, 0.0)
    assert measure.checked(problem)[OURS]["error"] == 0
