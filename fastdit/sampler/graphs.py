"""A run's step as a CUDA graph: captured once, replayed for every step of every chunk.

An eager step of a DiT-XL/2 is some 240 launches, each of which costs the host 5 to 10 µs; a replay
is one call. A graph reads and writes the tensors that it was captured with, so it belongs to a run
of one shape and dtype, to one table of conditioning rows and to the storage of the parameters; the
parameters' values may change. Each kind of step (`fastdit.plan.Kind`) is a graph.

Eagerly, a step reads its conditioning as a view and its result becomes the next x. Captured, it
must read and write where the capture did: the rows are gathered by the index on the device, and x
and x0 copied back. Launches of a captured step beside the model's: the rows, x twice over, the
noise, its update where it comes first, the update, x, x0 (2M and Heun only), the index.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from fastdit.plan import Kind
from fastdit.sampler.conditioning import Conditioning
from fastdit.sampler.conditions import Conditions
from fastdit.sampler.run import Recipe, Run

_WARM_UP = 3  # kernels compile, are tuned and allocate workspaces at their first calls
_KEPT = 2  # the chunks of a call have at most two sizes


def capturable(device: torch.device) -> bool:
    """Whether the device has graphs."""
    return device.type == "cuda"


def unfit(model: nn.Module, device: torch.device) -> str | None:
    """Why steps of a model are not replayed from a graph, or None."""
    if not capturable(device):
        return f"the model is on {device}"
    if torch.is_autocast_enabled(device.type):
        return "autocast is on, and keeps copies of weights that a graph would outlive"
    if torch._C._len_torch_dispatch_stack():
        return "a mode watches PyTorch's ops, which a replay does not call"
    hooks = (torch_modules._global_forward_hooks, torch_modules._global_forward_pre_hooks)
    if any(hooks) or any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()):
        return "a module has a forward hook, which a replay does not call"
    return None


def parameter_storage(model: nn.Module) -> tuple[Hashable, ...]:
    """Where a model's parameters and buffers are, and as what."""
    tensors = [*model.parameters(), *model.buffers()]
    return tuple((t.data_ptr(), t.dtype, tuple(t.shape)) for t in tensors)


class CapturedRun(Run):
    """A run in static tensors, and the graphs of its steps.

    Args:
        chunk: as `Run`; what it starts from is overwritten.

    Attributes:
        keeps_seen: `seen` is what the model was given, although a step writes over it.
        busy: a call is using it.
        held: the table of conditioning rows that its graphs read.
    """

    def __init__(self, *chunk: Any) -> None:
        super().__init__(*chunk)
        conditions, conditioning = self.conditions, self.conditioning
        self.graphs: dict[Kind, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        self.keeps_seen = self.busy = False
        self.held = None if conditioning is None else conditioning.table
        # On the device: the step's row, the row of the noise before it, then the conditioning row
        # of every sample and its null.
        self.first = conditions.places.new_tensor([0, len(self.recipe.plan) + 1])
        self.cursor = torch.cat([self.first, self.places[True]])
        ones = torch.ones_like(self.first)
        self.stride = torch.cat([ones, torch.full_like(self.places[True], conditions.count)])

    @torch.no_grad()
    def start(
        self,
        recipe: Recipe,
        x: Tensor,
        conditions: Conditions,
        seeds: Tensor | None,
        conditioning: Conditioning | None,
    ) -> None:
        """Begin again with another chunk of the same shape, in the same tensors."""
        self.recipe = replace(recipe, table=self.recipe.table, times=self.recipe.times)
        self.conditioning = conditioning
        self.x.copy_(x)
        self.q.zero_()
        if self.conditions.y is not None:
            self.conditions.y.copy_(conditions.y)
        places = conditions.places
        self.places[False].copy_(places)
        self.places[True][: len(places)].copy_(places)
        self.cursor[:2].copy_(self.first)
        self._first_rows()
        if self.seeds is not None:
            self.seeds.copy_(seeds)

    def end(self) -> None:
        """Of a call: what it was asked for is let go, the model among it."""
        self.busy = self.keeps_seen = False
        self.recipe, self.conditioning = replace(self.recipe, denoise=None), None

    def advance(self, step: int) -> None:
        """One step, captured at the first call of its kind."""
        self._hold(step)
        kind = self.recipe.plan.kind(step)
        if kind not in self.graphs:
            self.graphs[kind] = self._capture(kind)
        before = self.x.clone() if self.keeps_seen else None
        graph, self.q, self.seen = self.graphs[kind]
        graph.replay()
        if before is not None and self.seen is self.x:
            self.seen = before

    def result(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in super().result().items()}

    def resume(self, result: dict[str, Tensor]) -> None:
        self.x.copy_(self._resumable(result["sample"]))
        if self.recipe.plan.multistep:
            self.q.copy_(result["pred_xstart"])

    def advance_captured(self, kind: Kind) -> None:
        """The step that a graph captures: its rows are in `cursor`."""
        x, q = self._evaluate(kind, self.cursor[0], self.cursor[1], None)
        self.x.copy_(x)
        if self.recipe.plan.multistep:
            self.q.copy_(q)
        else:
            self.q = q
        self.cursor.add_(self.stride)

    def _hold(self, step: int) -> None:
        """See to it that the step's conditioning rows are there. Not part of a captured step."""
        held = self.conditioning
        if held is None:
            return
        if not held.holds(step):
            held.fill(step)
        if step == held.start:
            self._first_rows()

    def _first_rows(self) -> None:
        self.cursor[2:].copy_(self.places[True])

    def _rows(self, places: Tensor, step: int | None) -> Tensor:
        every = self.held.flatten(0, 1)
        return every.index_select(0, self.cursor[2 : 2 + len(places)])

    @torch.inference_mode(False)  # what it makes outlives the call, and is written to in any mode
    @torch.no_grad()
    def _capture(self, kind: Kind) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        """Capture a step without taking one: what warming up changed is put back."""
        device = self.x.device
        changed = (self.x, self.q, self.cursor)
        before = [tensor.clone() for tensor in changed]
        generator = torch.cuda.get_rng_state(device)
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP):
                    for tensor, value in zip(changed, before, strict=True):
                        tensor.copy_(value)
                    self.advance_captured(kind)
                for tensor, value in zip(changed, before, strict=True):
                    tensor.copy_(value)
            torch.cuda.current_stream().wait_stream(stream)
            torch.cuda.set_rng_state(generator, device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                self.advance_captured(kind)
        return graph, self.q, self.seen


class Captures:
    """The captured runs of a sampler, the last used ones, and the tables that they read."""

    def __init__(self) -> None:
        self._runs: OrderedDict[Hashable, CapturedRun] = OrderedDict()
        self._storage: Hashable = None

    def check(self, storage: Hashable) -> None:
        """Forget everything where the parameters have moved."""
        if storage != self._storage:
            self.clear()
        self._storage = storage

    def tables(self) -> list[Tensor]:
        """The conditioning tables that captured graphs read, and no call is using."""
        held = [run for run in self._runs.values() if run.held is not None]
        used = {run.held.data_ptr() for run in held if run.busy}
        return [run.held for run in held if run.held.data_ptr() not in used]

    def clear(self) -> None:
        """Forget everything."""
        self._runs.clear()

    @contextlib.contextmanager
    def run(
        self,
        own: Hashable,
        recipe: Recipe,
        x: Tensor,
        conditions: Conditions,
        seeds: Tensor | None = None,
        conditioning: Conditioning | None = None,
    ) -> Iterator[CapturedRun]:
        """A run that has been captured with the same shapes, and with the same `own`, what else is
        built into its graphs; or a new one. Inside the block no other call gets it."""
        rows = None if conditioning is None else conditioning.table.data_ptr()
        key = (own, x.shape, x.dtype, conditions.count, seeds is None, rows)
        found = self._runs.pop(key, None)
        if found is not None and not found.busy:
            found.start(recipe, x, conditions, seeds, conditioning)
        else:
            found = _static(recipe, x, conditions, seeds, conditioning)
        self._runs[key] = found
        while len(self._runs) > _KEPT:
            self._runs.popitem(last=False)
        found.busy = True
        try:
            yield found
        finally:
            found.end()


@torch.inference_mode(False)
@torch.no_grad()
def _static(
    recipe: Recipe,
    x: Tensor,
    conditions: Conditions,
    seeds: Tensor | None,
    conditioning: Conditioning | None,
) -> CapturedRun:
    """A captured run in tensors of its own."""
    y = None if conditions.y is None else conditions.y.clone()
    own = Conditions(y, conditions.places.clone(), conditions.count)
    seeds = None if seeds is None else seeds.clone()
    return CapturedRun(recipe, x.clone(), own, seeds, conditioning)
