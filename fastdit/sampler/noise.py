"""Where a run's noise comes from: torch's generator in the published order, or seeds of samples.

**Published.** The start noise is one draw for B samples, and every evaluation that needs noise
draws for all rows of the published loop's batch, which are 2B under guidance. The same seed then
gives the published samples, which therefore depend on the batch they are drawn in.

**Seeds.** Each sample has its own 64-bit seed, and its noise is Philox keyed by (seed, step),
drawn inside the update (`fastdit.philox`). A sample does not depend on the batch, on its place in
it or on how it is cut into chunks. One seed s gives sample i of a call the seed s + i.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from fastdit.ops._checks import fail

Draw = Callable[[Tensor], Tensor]
"""An evaluation's noise, like the x that it is given."""

_SMALLEST, _LARGEST = -(2**63), 2**63 - 1


def published_draw(guided: bool) -> Draw:
    """Draws from torch's generator on x's device; of a guided batch the first half is used."""

    def draw(x: Tensor) -> Tensor:
        shape = (len(x) * (2 if guided else 1), *x.shape[1:])
        return torch.randn(shape, dtype=x.dtype, device=x.device)[: len(x)]

    return draw


def whole(seed: Any) -> bool:
    """Whether it is an int, of Python or NumPy."""
    return isinstance(seed, Integral) and not isinstance(seed, bool)


def sample_seeds(seed: int | Sequence[int] | Tensor, count: int) -> Tensor:
    """`(count,)` int64 seeds on the CPU.

    Raises:
        ValueError, TypeError: not an int or `count` ints of 64 bits.
    """
    if hasattr(seed, "tolist"):  # a tensor, or NumPy's
        seed = seed.tolist()
    if whole(seed):
        seeds = [int(seed) + i for i in range(count)]
    elif isinstance(seed, Sequence) and not isinstance(seed, str):
        seeds = [int(s) if whole(s) else s for s in seed]
    else:
        allowed = "None, an int or a sequence of ints"
        raise TypeError(f"seed: got {type(seed).__name__}, allowed is {allowed}")
    if len(seeds) != count or not all(type(s) is int for s in seeds):
        fail("seed", f"{len(seeds)} values {seeds[:4]}", f"an int, or {count} of them")
    outside = [s for s in seeds if not _SMALLEST <= s <= _LARGEST]
    if outside:
        fail("seed", outside[0], f"{_SMALLEST} to {_LARGEST}")
    return torch.tensor(seeds, dtype=torch.int64)
