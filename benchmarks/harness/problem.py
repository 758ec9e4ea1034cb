"""What is measured: a case, and the columns in which it is computed."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

LEVELS = ("op", "block", "model", "training", "sampler", "sampling")
EAGER, COMPILE, OURS, COPY = "eager", "torch.compile", "fastdit", "copy"
FIELD = (EAGER, COMPILE, "compile, max-autotune", "diffusers", "ONNX Runtime", "OpenVINO")
"""The columns that a case may have beside fastdit's; SDPA's backends are attention's alone."""


@dataclass(frozen=True)
class Absent:
    """A column that is not here, and why."""

    reason: str


Column = Callable[[], object] | Absent


def absent(distribution: str) -> Absent | None:
    """That a distribution is not installed, or None."""
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return Absent(f"{distribution} is not installed")
    return None


@dataclass
class Problem:
    """One computation in several columns, eager PyTorch first.

    Attributes:
        columns: functions of no arguments by name, or why a column is absent.
        tolerance: largest error allowed, over the largest value of eager's result.
        bytes: least traffic of a call: every input in and every output out, once.
        flops: of matrix products and attention.
        images: that a call makes or trains on; 0 where that means nothing.
        unchecked: columns that compute something else: a copy of the same bytes.
        tolerances: of single columns, where another is promised: int8.
        wall: whether the host's time belongs to the figure on a GPU.
        differentiate: the forward pass as a function of no arguments, for the bytes that it keeps
            for the backward pass, by column.
        given: tensors that are there anyway, and are not among those bytes.
    """

    columns: dict[str, Column]
    tolerance: float
    bytes: int | None = None
    flops: int | None = None
    images: int = 0
    unchecked: tuple[str, ...] = (COPY,)
    tolerances: dict[str, float] = field(default_factory=dict)
    wall: bool = False
    differentiate: dict[str, Callable[[], object]] = field(default_factory=dict)
    given: tuple[Tensor, ...] = ()

    def present(self) -> dict[str, Callable[[], object]]:
        return {k: v for k, v in self.columns.items() if not isinstance(v, Absent)}


@dataclass(frozen=True)
class Case:
    """One line of the results: a computation at one size.

    Attributes:
        level: of `LEVELS`.
        name: an op's name, or what is computed.
        size: in words: "XL, B2".
        what: "forward", "backward", "both", or the solver.
        build: makes the problem; may take seconds.
        seconds: of measuring.
        dtype: of the tensors.
        device: where.
        subset: "quick" is part of "standard", which is part of "full".
        tokens, batch, width: for the plots over these; 0 where there are none.
    """

    level: str
    name: str
    size: str
    what: str
    build: Callable[[], Problem]
    seconds: float = 2.0
    dtype: str = "fp32"
    device: str = "cpu"
    subset: str = "standard"
    tokens: int = 0
    batch: int = 0
    width: int = 0

    @property
    def id(self) -> str:
        return f"{self.name}, {self.what}: {self.size}, {self.dtype}"


SUBSETS = ("quick", "standard", "full")


def chosen(cases: list[Case], subset: str) -> list[Case]:
    """The cases of a subset.

    Raises:
        ValueError: there is no such subset.
    """
    if subset not in SUBSETS:
        raise ValueError(f"subset: got {subset!r}, allowed are {', '.join(SUBSETS)}")
    return [c for c in cases if SUBSETS.index(c.subset) <= SUBSETS.index(subset)]


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def tensors(result: object) -> list[Tensor]:
    """The tensors of whatever a column returned."""
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
