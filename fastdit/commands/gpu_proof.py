"""`fastdit gpu-proof`: what this GPU measures, beside what the model predicts.

Runs `pytest -m gpu` (every op and option against float64, determinism, CUDA graphs, torch.compile)
and then times every native op, forward and backward, at a DiT's size, each beside eager PyTorch.
Everything is written to one JSON file under benchmarks/results/: share it. `fastdit bench
--gpu-proof` does this and then benchmarks whole models as well.

Run it in a checkout of the repository. Without a GPU, `--dry-run` does all of it up to the first
launch: it collects the tests, builds the calls, compiles the Triton kernels and predicts.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fastdit import __version__, backends
from fastdit.checkpoint_files import atomic_write
from fastdit.model import SIZES
from fastdit.workloads import Workload, workloads

SUMMARY = "prove the kernels on this GPU and record measured against modelled times"
RESULTS = Path("benchmarks/results")
TESTS = Path("tests/gpu")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

Timer = Callable[[Callable[[], Any]], tuple[float, float, float]]
"""Runs a function often; its times in µs at the 20th, 50th and 80th percentile."""


def add_arguments(parser: argparse.ArgumentParser | argparse._ArgumentGroup, out=True) -> None:
    """Declare the command's options; `fastdit bench` has an `--out` of its own."""
    add = parser.add_argument
    add("--size", choices=SIZES, default="XL", help="DiT size (default XL)")
    add("--batch", type=int, default=32, help="samples (default 32)")
    add("--dtype", choices=DTYPES, default="bf16", help="default bf16")
    add("--gpu", help="the data sheet to predict with (default: this GPU's; H100 in a dry run)")
    if out:
        add("--out", type=Path, help=f"default {RESULTS}/gpu-proof-<gpu>-<time>.json")
    add("--skip-tests", action="store_true", help="only time")
    add("--dry-run", action="store_true", help="everything up to the first launch; no GPU needed")


def data_sheet(device_name: str) -> str | None:
    """The GPU of `fastdit.testing.GPUS` that a device's name names, or None."""
    from fastdit.testing import GPUS

    words = set(re.split(r"[\s-]+", device_name.removeprefix("NVIDIA ")))
    return next((name for name in GPUS if set(name.split()) <= words), None)


def run_tests(collect_only: bool, seconds: float | None = None) -> dict[str, int]:
    """`pytest -m gpu`: how many tests ended how; in a dry run, how many there are.

    After `seconds` the tests are stopped, and `{"unfinished": 1}` is all that is known.

    Raises:
        FileNotFoundError: the working directory is no checkout of the repository.
        ValueError: pytest is not installed, or it did not run the tests.
    """
    if not TESTS.is_dir():
        raise FileNotFoundError(
            f"{TESTS}: not in {Path.cwd()}; run this in a checkout, or with --skip-tests"
        )
    if importlib.util.find_spec("pytest") is None:
        raise ValueError("pytest is not installed: pip install -e '.[test]', or use --skip-tests")
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", str(TESTS)]
    command += ["--collect-only"] if collect_only else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"unfinished": 1}
    last = done.stdout.strip().splitlines()[-1:] or [done.stderr.strip()]
    counts = {word: int(n) for n, word in re.findall(r"(\d+)(?:/\d+)? ([a-z]+)", last[0])}
    counts = {k: n for k, n in counts.items() if k in ("passed", "failed", "skipped", "tests")}
    if done.returncode not in (0, 1) or not counts:
        raise ValueError(f"pytest -m gpu: {last[0]}")
    return counts


def bench(function: Callable[[], Any]) -> tuple[float, float, float]:
    """Triton's own benchmark: CUDA events, the L2 cache flushed before each run."""
    from triton.testing import do_bench

    p20, p50, p80 = do_bench(function, quantiles=[0.2, 0.5, 0.8])
    return 1e3 * p20, 1e3 * p50, 1e3 * p80


def passes(call: Workload) -> dict[str, Callable[[], Any]]:
    """The forward and, for what is differentiable, the backward alone, ready to be timed."""
    timed: dict[str, Callable[[], Any]] = {"forward": torch.no_grad()(call.forward)}
    if call.leaves:
        outputs = call.forward()
        cotangents = [torch.randn_like(out) for out in outputs]

        def backward() -> Any:
            return torch.autograd.grad(outputs, call.leaves, cotangents, retain_graph=True)

        timed["backward"] = backward
    return timed


def predict(call: Workload, direction: str, gpu: str | None) -> dict[str, Any]:
    """Least bytes, and the modelled time if there is a data sheet."""
    from fastdit.testing import roofline

    moved = call.least_bytes()[direction]
    row: dict[str, Any] = {"op": call.op, "pass": direction, "shape": call.shape, "bytes": moved}
    if gpu is not None:
        flops = call.flops if direction == "forward" else 2.5 * call.flops
        time = roofline(gpu, bytes=moved, tensor_flops=flops)
        row |= {"modelled_us": 1e6 * time.modelled_seconds, "bound": time.bound}
    return row


def measure(call: Workload, gpu: str | None, timer: Timer) -> list[dict[str, Any]]:
    """One row for each pass of the op: native, eager, modelled, and the reason if not native."""
    device = call.args[0].device.type
    kernel = backends.select(call.op, device, call.args)
    unfit = [
        f"{k.name}: {k.unsupported(*call.args)}" for k in backends.kernels_for(call.op, device)
    ]
    times: dict[str, dict[str, tuple[float, float, float]]] = {}
    for backend in ("native", "reference"):
        if backend == "native" and kernel is None:
            continue
        with backends.backend(backend):
            times[backend] = {name: timer(function) for name, function in passes(call).items()}
    rows = []
    for direction, eager in times["reference"].items():
        row = predict(call, direction, gpu) | {"kernel": kernel.name if kernel else None}
        row["eager_us"] = eager[1]
        if kernel is None:
            row["why_not"] = "; ".join(unfit) or "no kernel is registered for this device"
        else:
            native = times["native"][direction]
            row["measured_us"] = dict(zip(("p20", "p50", "p80"), native, strict=True))
            row["speedup"] = eager[1] / native[1]
            row["terabytes_per_second"] = row["bytes"] / native[1] / 1e6
            if "modelled_us" in row:
                row["measured_over_modelled"] = native[1] / row["modelled_us"]
        rows.append(row)
    return rows


def compile_only(call: Workload, gpu: str) -> list[dict[str, Any]]:
    """A dry run's rows: the prediction, and how many Triton launches compiled for the GPU."""
    from fastdit.testing import VirtualGPU

    kernel = next(
        (k for k in backends.kernels_for(call.op, "cuda") if k.unsupported(*call.args) is None),
        None,
    )
    row = predict(call, "forward", gpu) | {"kernel": kernel.name if kernel else None}
    if kernel is not None and kernel.run.__module__.startswith("fastdit.kernels."):
        with VirtualGPU(gpu, mode="compile") as virtual:
            kernel.run(*call.args)
        row["launches"] = len(virtual.launches)
    others = [direction for direction in call.least_bytes() if direction != "forward"]
    return [row] + [predict(call, other, gpu) | {"kernel": row["kernel"]} for other in others]


def report(rows: list[dict[str, Any]], title: str) -> Table:
    """The rows as a table; what was not measured is a dash."""
    columns = ("op", "pass", "kernel", "MB", "modelled µs", "measured µs", "eager µs", "bound")
    table = Table(*columns, title=title, title_justify="left")

    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.1f}"

    for row in rows:
        measured = row.get("measured_us", {}).get("p50")
        numbers = (row["bytes"] / 1e6, row.get("modelled_us"), measured, row.get("eager_us"))
        kernel = row["kernel"] or "eager"
        table.add_row(row["op"], row["pass"], kernel, *map(number, numbers), row.get("bound", "–"))
    return table


def dry_run(args: argparse.Namespace, console: Console) -> None:
    """Everything up to the first launch."""
    gpu = args.gpu or "H100"
    if not args.skip_tests:
        console.print(f"tests that a GPU would run: {run_tests(collect_only=True)['tests']}")
    calls = workloads(args.size, args.batch, dtype=DTYPES[args.dtype], device="meta")
    rows = [row for call in calls for row in compile_only(call, gpu)]
    console.print(report(rows, f"DiT-{args.size}, batch {args.batch}, modelled for a {gpu}"))
    console.print("dry run: stopped before the first launch; nothing was measured or written")


def prove(
    args: argparse.Namespace, console: Console, seconds_of_tests: float | None = None
) -> dict[str, Any]:
    """Test and time; the record.

    Raises:
        ValueError: there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise ValueError("no CUDA device here; --dry-run does everything up to the first launch")
    name = torch.cuda.get_device_name()
    gpu = args.gpu or data_sheet(name)
    tests = {} if args.skip_tests else run_tests(False, seconds_of_tests)
    console.print(f"{name}: tests {tests or 'skipped'}")
    calls = workloads(args.size, args.batch, dtype=DTYPES[args.dtype])
    rows = [row for call in calls for row in measure(call, gpu, bench)]
    console.print(report(rows, f"DiT-{args.size}, batch {args.batch} on {name}"))
    now = datetime.datetime.now(datetime.timezone.utc)
    return {
        "gpu": name,
        "data_sheet": gpu,
        "capability": torch.cuda.get_device_capability(),
        "time": now.isoformat(timespec="seconds"),
        "versions": versions(),
        "model": {"size": args.size, "batch": args.batch, "dtype": args.dtype},
        "tests": tests,
        "rows": rows,
    }


def proof_path(result: dict[str, Any]) -> Path:
    """Where a record goes if nothing else is asked for."""
    slug = re.sub(r"\W+", "-", result["gpu"].lower()).strip("-")
    stamp = re.sub(r"\D", "", result["time"])[:14]
    return RESULTS / f"gpu-proof-{slug}-{stamp[:8]}-{stamp[8:]}.json"


def run(args: argparse.Namespace) -> None:
    """Test, time, print and write."""
    console = Console(width=max(100, Console().width))
    if args.dry_run:
        return dry_run(args, console)
    result = prove(args, console)
    path = args.out or proof_path(result)
    text = json.dumps(result, indent=1) + "\n"
    atomic_write(path, lambda temporary: temporary.write_text(text))
    console.print(f"wrote {path}")
    if result["tests"].get("failed"):
        raise SystemExit(1)
    return None


def versions() -> dict[str, str | None]:
    """What a reader needs to repeat the run."""
    import triton

    return {
        "fastdit": __version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }
