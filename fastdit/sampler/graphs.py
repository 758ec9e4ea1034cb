"""A run's step as a CUDA graph: captured once, replayed for every step of every chunk.

An eager step of a DiT-XL/2 is some 240 launches, each of which costs the host 5 to 10 µs; a replay
is one call. A graph reads and writes the tensors that it was captured with, so it belongs to a run
of one shape and dtype, to one table of conditioning rows and to the storage of the parameters; the
parameters' values may change. Each kind of step (`fastdit.plan.Kind`) is a graph.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch
from torch import Tensor, nn

from fastdit.plan import Kind
from fastdit.sampler.run import Run

_WARM_UP = 3  # kernels compile, are tuned and allocate workspaces at their first calls
_KEPT = 2  # the chunks of a call have at most two sizes


def capturable(device: torch.device) -> bool:
    """Whether the device has graphs."""
    return device.type == "cuda"


def parameter_storage(model: nn.Module) -> tuple[Hashable, ...]:
    """Where a model's parameters and buffers are, and as what."""
    tensors = [*model.parameters(), *model.buffers()]
    return tuple((t.data_ptr(), t.dtype, tuple(t.shape)) for t in tensors)


class CapturedRun:
    """A run in static tensors, and the graphs of its steps."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.graphs: dict[Kind, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}

    def advance(self, step: int) -> None:
        """One step, captured at the first call of its kind."""
        kind = self.run.recipe.plan.kind(step)
        if kind not in self.graphs:
            self.graphs[kind] = self._capture(kind)
        graph, self.run.q, self.run.seen = self.graphs[kind]
        graph.replay()

    def _capture(self, kind: Kind) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        """Capture a step without taking one: what warming up changed is put back."""
        run, device = self.run, self.run.x.device
        changed = (run.x, run.q, run.cursor)
        before = [tensor.clone() for tensor in changed]
        generator = torch.cuda.get_rng_state(device)
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                for tensor, value in zip(changed, before, strict=True):
                    tensor.copy_(value)
                run.advance_captured(kind)
            for tensor, value in zip(changed, before, strict=True):
                tensor.copy_(value)
        torch.cuda.current_stream(device).wait_stream(stream)
        torch.cuda.set_rng_state(generator, device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run.advance_captured(kind)
        return graph, run.q, run.seen


class Captures:
    """The captured runs of a sampler, the last used ones, and the tables that they read."""

    def __init__(self) -> None:
        self._runs: OrderedDict[Hashable, CapturedRun] = OrderedDict()
        self._storage: Hashable = None

    def check(self, storage: Hashable) -> None:
        """Forget everything where the parameters have moved."""
        if storage != self._storage:
            self._runs.clear()
        self._storage = storage

    def tables(self) -> list[Tensor]:
        """The conditioning tables that captured graphs read."""
        held = [captured.run.conditioning for captured in self._runs.values()]
        return [conditioning.table for conditioning in held if conditioning is not None]

    def get(self, key: Hashable, make: Callable[[], Run]) -> tuple[CapturedRun, bool]:
        """The run of `key`, and whether it is new."""
        found = self._runs.pop(key, None)
        captured = CapturedRun(make()) if found is None else found
        self._runs[key] = captured
        while len(self._runs) > _KEPT:
            self._runs.popitem(last=False)
        return captured, found is None
