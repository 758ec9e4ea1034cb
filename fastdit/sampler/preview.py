"""What a run shows on its way: a chunk after a step, and a progress bar."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastdit.sampler.run import Run


@dataclass(frozen=True)
class Preview:
    """A chunk after a step.

    Attributes:
        step: the step done, 0 to `steps` − 1.
        steps: how many there are.
        samples: which samples of the call these are.
        x: `(b, C, ...)`, the samples as noisy as they still are.
        x0: like `x`, what the model predicted them to become at its last call,
        time: which was at this timestep, or at this time of a flow, scaled as the model is given
            it,
        seen: of these samples.
    """

    step: int
    steps: int
    samples: slice
    x: Tensor
    x0: Tensor
    time: float
    seen: Tensor


def preview_of(run: Run, evaluation: int, samples: slice) -> Preview:
    """The preview after an evaluation that ends a step; it stays as it is."""
    plan = run.recipe.plan
    return Preview(
        step=sum(plan.ends[:evaluation]),
        steps=sum(plan.ends),
        samples=samples,
        x=run.x.clone(),
        x0=run.predicted(evaluation).clone(),
        time=float(plan.times[evaluation]),
        seen=run.seen.clone(),
    )


@contextlib.contextmanager
def progress_bar(shown: bool, total: int) -> Iterator[Callable[[], Any]]:
    """A function to call after each evaluation of the model: it moves the bar, if there is one."""
    if not shown:
        yield lambda: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total) as bar:
        yield bar.update
