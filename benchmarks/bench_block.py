"""One DiT block, forward, backward and both: what a model repeats.

pytest benchmarks/bench_block.py --benchmark-only
python benchmarks/bench_block.py [--threads 1] [--subset full] [--only backward]
"""

from __future__ import annotations

from functools import partial

import torch
from harness import facts, models, peers
from harness.op_benchmark import _pass, in_order
from harness.problem import DTYPES, EAGER, OURS, Absent, Case, Problem
from harness.running import main, tests

TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}
PASSES = ("forward", "backward", "both")


def problem(name: str, batch: int, what: str, dtype: str, device: str) -> Problem:
    model, plain = models.pair(name, DTYPES[dtype], device, depth=1)
    ours, eager = model.blocks[0], plain.blocks[0]
    tokens, width = model.pos_embed.shape[1:]
    x = torch.randn(batch, tokens, width, device=device).to(DTYPES[dtype]).requires_grad_()
    c = torch.randn(batch, width, device=device).to(DTYPES[dtype]).requires_grad_()
    leaves = [x, c, *ours.parameters()]
    functions = {EAGER: lambda: eager(x, c), OURS: lambda: ours(x, c)}
    functions |= peers.compile_columns(eager, x, c, device=device)
    columns = {name: _pass(what, function, leaves) for name, function in functions.items()}
    if what == "forward":
        columns |= peers.exported(eager, (x.detach(), c.detach()), device)
        theirs = peers.diffusers_dit(model)
        columns["diffusers"] = theirs if isinstance(theirs, Absent) else their_block(theirs, x)
    return Problem(
        in_order(columns),
        TOLERANCE[dtype],
        flops=facts.flops(columns[EAGER]),
        differentiate={} if what == "forward" else functions,
        wall=True,
    )


def their_block(theirs, x):
    """Absent for a comparison: diffusers' block embeds timestep and label itself."""
    return Absent("its block embeds the timestep and the label itself; see the model")


def cases(device: str) -> list[Case]:
    """DiT-XL/2's block at a small batch, and at a training batch on GPUs."""
    first, second = ("fp32", "bf16") if device == "cpu" else ("bf16", "fp16")
    sizes = [("XL/2", 2, "standard")] if device == "cpu" else [("XL/2", 32, "standard")]
    sizes += [("S/2", 2, "full")] if device == "cpu" else [("XL/2", 2, "standard")]
    return [
        Case(
            "block",
            "block",
            f"{name}, B{batch}",
            what,
            partial(problem, name, batch, what, dtype, device),
            seconds=4,
            dtype=dtype,
            device=device,
            subset=subset if dtype == first else "full",
            tokens=256,
            batch=batch,
        )
        for name, batch, subset in sizes
        for dtype in (first, second)
        for what in PASSES
    ]


test_block = tests(cases)

if __name__ == "__main__":
    main(cases)
