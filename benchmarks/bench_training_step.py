"""A training step: loss, gradients, and AdamW's update.

    pytest benchmarks/bench_training_step.py --benchmark-only
    python benchmarks/bench_training_step.py [--threads 1] [--subset full]

Checked are the loss and every gradient; timed is the whole step. The loss is the mean square of the
output, which has the cost of the diffusion loss's model part and nothing else.
"""

from __future__ import annotations

import copy
from functools import partial

import torch
from harness import facts, models
from harness.op_benchmark import in_order
from harness.problem import DTYPES, EAGER, OURS, Case, Problem
from harness.running import main, tests
from plain_dit import PlainDiT

TOLERANCE = {"fp32": 1e-3, "bf16": 2e-1, "fp16": 2e-1}
SIZES = {
    "cpu": [(models.DIGITS, 64, "standard"), ("S/2", 4, "full")],
    "cuda": [("S/2", 32, "standard"), ("XL/2", 32, "standard")],
}
COMPILED = {"cpu": (models.DIGITS,), "cuda": ("S/2", "XL/2")}


class Step:
    """Returns the loss and the gradients of a step, and makes the update."""

    def __init__(self, module, call, args) -> None:
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(self.parameters, lr=0.0, weight_decay=0.0)
        self.call, self.args = call, args

    def loss(self):
        return self.call(*self.args).float().square().mean()

    def __call__(self):
        self.optimiser.zero_grad()
        with torch.enable_grad():
            loss = self.loss()
            loss.backward()
        self.optimiser.step()  # at rate 0, so that every turn does the same
        return [loss, *(p.grad for p in self.parameters)]


def problem(name: str, batch: int, dtype: str, device: str) -> Problem:
    """Each column has parameters of its own, with the same values."""
    model = models.random_dit(name, DTYPES[dtype], device, class_dropout_prob=0.0)
    args = models.inputs(model, batch)
    ours = copy.deepcopy(model).train()
    plain = PlainDiT(model).train()
    steps = {EAGER: Step(plain, plain, args), OURS: Step(ours, ours, args)}
    if name in COMPILED[device]:
        theirs = copy.deepcopy(plain)
        steps["torch.compile"] = Step(theirs, torch.compile(theirs, dynamic=False), args)
    if device == "cuda" and name == "S/2":  # XL/2 tunes for minutes
        theirs = copy.deepcopy(plain)
        tuned = torch.compile(theirs, dynamic=False, mode="max-autotune-no-cudagraphs")
        steps["compile, max-autotune"] = Step(theirs, tuned, args)
    return Problem(
        in_order(steps),
        TOLERANCE[dtype],
        flops=facts.flops(steps[EAGER]),
        images=batch,
        wall=True,
        differentiate={key: step.loss for key, step in steps.items()},
        given=args,
    )


def cases(device: str) -> list[Case]:
    dtype = "fp32" if device == "cpu" else "bf16"
    return [
        Case(
            "training",
            "training step",
            f"{name}, B{batch}",
            "both",
            partial(problem, name, batch, dtype, device),
            seconds=8,
            dtype=dtype,
            device=device,
            subset=subset,
            batch=batch,
        )
        for name, batch, subset in SIZES[device]
    ]


test_training_step = tests(cases)

if __name__ == "__main__":
    main(cases)
