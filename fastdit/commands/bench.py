"""`fastdit bench`: time everything beside eager PyTorch and its peers, and draw a report.

    fastdit bench --subset quick                # a minute
    fastdit bench                               # the standard cases; what the README's tables show
    fastdit bench --level op --only gated       # some of them
    fastdit bench --compare before.json after.json
    fastdit bench --gpu-proof [--dry-run]       # all that needs a GPU, within 10 minutes

Writes a JSON file with the machine's description, and beside it a page of HTML that stands alone.
The benchmarks live in a checkout of the repository, not in the installed package.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console

from fastdit.commands import gpu_proof

SUMMARY = "benchmark against eager PyTorch and its peers, and draw a report"
FOLDER = "benchmarks"
PROOF_SECONDS = 570.0
SECONDS_OF_A_CASE = 120.0
"""The longest: compiling DiT-XL/2 with max-autotune. None is begun with less time left."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add = parser.add_argument
    add("--subset", default="standard", help="quick, standard or full (default standard)")
    add("--level", action="append", default=[], help="op, block, model, training, sampler, …")
    add("--only", action="append", default=[], help="cases whose name holds this")
    add("--list", action="store_true", help="list the cases and stop")
    add("--device", choices=("cpu", "cuda"), help="default: the GPU, if there is one")
    add("--threads", type=int, help="of the CPU (default: PyTorch's; 1 is timed in CPU time)")
    add("--rounds", type=int, default=31, help="turns of each column at most (default 31)")
    add("--patience", type=float, default=20, help="seconds a case waits for an idle machine")
    add("--out", type=Path, help="the JSON file (default benchmarks/results/<machine>.json)")
    add("--compare", nargs=2, type=Path, metavar=("A", "B"), help="two results files")
    add("--report", type=Path, metavar="FILE", help="draw a results file's report again")
    add("--gpu-proof", action="store_true", help="all that needs a GPU, within 10 minutes")
    gpu_proof.add_arguments(parser.add_argument_group("with --gpu-proof"), out=False)


def harness() -> ModuleType:
    """The benchmarks' package, `benchmarks/harness`, of this checkout.

    Raises:
        FileNotFoundError: fastdit runs from an installed package, which has none.
        ImportError: matplotlib is missing.
    """
    beside = Path(__file__).resolve().parents[2] / FOLDER
    folder = next((f for f in (beside, Path.cwd() / FOLDER) if (f / "harness").is_dir()), None)
    if folder is None:
        raise FileNotFoundError(
            f"{FOLDER}/: not beside this installation of fastdit and not in {Path.cwd()}; the "
            "benchmarks are in the repository: run this in a checkout"
        )
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    for name in ("matplotlib", "pytest"):
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"{name} is not installed: pip install -e '.[bench]'")
    return importlib.import_module("harness.suite")


def measured(
    suite: ModuleType, cases: list[Any], device: str, out: Path | None, **options: Any
) -> dict[str, Any]:
    """Run the cases under a progress bar. What is measured is on disk after each case: a run that
    is interrupted keeps it, and `--report` draws it."""
    from harness import results
    from tqdm.auto import tqdm

    def done(run: dict[str, Any]) -> None:
        bar.update()
        results.write(out or results.default_path(run), run)

    with tqdm(total=len(cases), unit="case") as bar:
        return suite.run(
            cases, device, each=lambda case: bar.set_postfix_str(case.id), done=done, **options
        )


def draw(run: dict[str, Any], out: Path | None, console: Console) -> None:
    """Write the page beside the JSON."""
    from harness import report, results

    path = out or results.default_path(run)
    report.write(path.with_suffix(".html"), run)
    console.print(f"wrote {path} and {path.with_suffix('.html')}", soft_wrap=True)


def prove(args: argparse.Namespace, suite: ModuleType, console: Console) -> None:
    """What needs a GPU, the most telling first: the tests and the kernels beside their models, then
    the benchmarks, sampling before models before ops in each subset, until `PROOF_SECONDS` are
    over. What was not reached is named."""
    begun = time.perf_counter()
    cases = suite.select("cuda", args.subset, args.level, args.only)
    levels = suite.LEVELS
    cases.sort(key=lambda c: (suite.SUBSETS.index(c.subset), -levels.index(c.level)))
    if args.dry_run:
        gpu_proof.dry_run(args, console)
        names = [f"  {case.level}: {case.id}" for case in cases]
        console.print(f"benchmarks that a GPU would run, in this order: {len(cases)}")
        return console.print("\n".join(names), highlight=False)
    result = gpu_proof.prove(args, console, seconds_of_tests=0.4 * PROOF_SECONDS)
    left = PROOF_SECONDS - (time.perf_counter() - begun) - SECONDS_OF_A_CASE
    out = args.out or gpu_proof.proof_path(result)
    options = {"rounds": args.rounds, "deadline": left, "further": {"gpu_proof": result}}
    found = measured(suite, cases, "cuda", out, **options)
    draw(found, out, console)
    if found["failed"] or result["tests"].get("failed"):
        raise SystemExit(1)


def run(args: argparse.Namespace) -> None:
    """Measure, write, and print the tables; or one of the other things asked for."""
    console = Console(width=max(110, Console().width))
    suite = harness()
    from harness import report, results

    if args.compare:
        return print(results.compare(*(results.read(path) for path in args.compare)))
    if args.report:
        report.write(args.report.with_suffix(".html"), results.read(args.report))
        return console.print(f"wrote {args.report.with_suffix('.html')}", soft_wrap=True)
    if args.gpu_proof:
        return prove(args, suite, console)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    cases = suite.select(device, args.subset, args.level, args.only)
    if args.list:
        for case in cases:
            print(f"{case.level:9} {case.id}")
        return
    options = {"rounds": args.rounds, "patience": args.patience}
    found = measured(suite, cases, device, args.out, **options)
    print(results.markdown(found))
    draw(found, args.out, console)
    if found["failed"]:
        raise SystemExit("\n".join(f"{k}: {v}" for k, v in found["failed"].items()))
