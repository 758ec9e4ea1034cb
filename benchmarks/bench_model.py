"""A forward pass of a whole DiT, for all the sizes that time and memory allow.

pytest benchmarks/bench_model.py --benchmark-only
python benchmarks/bench_model.py [--threads 1] [--subset full] [--only S/2]
"""

from __future__ import annotations

from functools import partial

import torch
from harness import facts, models, peers
from harness.op_benchmark import in_order
from harness.problem import DTYPES, EAGER, OURS, Absent, Case, Problem
from harness.running import main, tests

import fastdit

NATIVE = "fastdit, NativeForward"
TOLERANCE = {"fp32": 1e-4, "bf16": 8e-2, "fp16": 2e-2}
SIZES = {  # model, batch, subset
    "cpu": [
        (models.DIGITS, 2, "quick"),
        (models.DIGITS, 64, "standard"),
        ("S/8", 2, "standard"),
        ("S/2", 1, "standard"),
        ("S/2", 2, "quick"),
        ("S/2", 8, "standard"),
        ("B/2", 2, "standard"),
        ("XL/2", 1, "standard"),
        ("L/2", 2, "full"),
        ("XL/2", 2, "full"),
    ],
    "cuda": [
        (name, batch, "quick" if (name, batch) == ("XL/2", 32) else "standard")
        for name in ("S/2", "B/2", "L/2", "XL/2")
        for batch in (2, 32)
    ],
}
COMPILED = {"cpu": ((models.DIGITS, 2), ("S/2", 2)), "cuda": (("XL/2", 2), ("S/2", 32))}
# Exporting L/2 or XL/2 would take minutes, and three times its size in memory.
EXPORTED = ((models.DIGITS, 2), ("S/8", 2), ("S/2", 2), ("B/2", 2))
SECONDS = {"L/2": 30, "XL/2": 30, "B/2": 15}


def problem(name: str, batch: int, dtype: str, device: str) -> Problem:
    """Eager is `plain_dit`, on the same parameters as fastdit's model and diffusers'."""
    model, plain = models.pair(name, DTYPES[dtype], device)
    args = models.inputs(model, batch)
    calm = torch.no_grad()
    columns = {EAGER: calm(lambda: plain(*args)), OURS: calm(lambda: model(*args))}
    if device == "cpu":
        native = fastdit.NativeForward(model)
        columns[NATIVE] = calm(lambda: native(*args))
    if (name, batch) in COMPILED[device]:
        compiled = peers.compile_columns(plain, *args, device=device)
        columns |= {key: calm(column) for key, column in compiled.items()}
    if (name, batch) in EXPORTED:
        columns |= peers.exported(plain, args, device)
    if device == "cuda" or (name, batch) in EXPORTED:
        theirs = peers.diffusers_forward(model, *args)
        columns["diffusers"] = theirs if isinstance(theirs, Absent) else calm(theirs)
    return Problem(
        in_order(columns),
        TOLERANCE[dtype],
        flops=facts.flops(columns[EAGER]),
        images=batch,
        wall=True,
    )


def cases(device: str) -> list[Case]:
    """In float32 on CPUs; in bfloat16 on GPUs, and in full in float16."""
    dtypes = ("fp32",) if device == "cpu" else ("bf16", "fp16")
    tokens = {models.DIGITS: 16, "S/8": 16}
    return [
        Case(
            "model",
            "model",
            f"{name}, B{batch}",
            "forward",
            partial(problem, name, batch, dtype, device),
            seconds=SECONDS.get(name, 6) if device == "cpu" else 3,
            dtype=dtype,
            device=device,
            subset=subset if dtype == dtypes[0] else "full",
            tokens=tokens.get(name, 256),
            batch=batch,
        )
        for dtype in dtypes
        for name, batch, subset in SIZES[device]
    ]


test_model = tests(cases, NATIVE)

if __name__ == "__main__":
    main(cases)
