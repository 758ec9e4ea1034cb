"""torch.cuda's graphs on a CPU: a capture records the ops of PyTorch, a replay runs them again.

As on a GPU, what is captured has not run; a replay reads and writes the tensors of the capture,
runs no Python of its own, and draws from the generator where it then is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class Recording(TorchDispatchMode):
    """Ops with their arguments and results, and what they overwrote."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, list]] = []
        self.overwritten: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if op._schema.is_mutable:
            self.overwritten.append((args[0], args[0].clone()))
        out = op(*args, **kwargs)
        self.calls.append((op, args, kwargs, tree_flatten(out)[0]))
        return out


class CUDAGraph:
    """A recording and its replays."""

    made: list[CUDAGraph]

    def __init__(self) -> None:
        self.calls: list[tuple[Any, tuple, dict, list]] = []
        self.replays = 0
        CUDAGraph.made.append(self)

    def replay(self) -> None:
        self.replays += 1
        for op, args, kwargs, results in self.calls:
            if op.is_view:
                continue
            again = tree_flatten(op(*args, **kwargs))[0]
            if not op._schema.is_mutable:
                for old, new in zip(results, again, strict=True):
                    old.copy_(new)


@contextlib.contextmanager
def graph(target: CUDAGraph, **_options: Any) -> Iterator[None]:
    generator = torch.get_rng_state()
    with Recording() as recording:
        yield
    for tensor, value in reversed(recording.overwritten):
        tensor.copy_(value)
    torch.set_rng_state(generator)
    target.calls = recording.calls


class Stream:
    """Everything waits for everything on a CPU; who waits for whom is written down."""

    waits: list[tuple[Stream, Stream]]

    def __init__(self, _device: Any = None) -> None:
        pass

    def wait_stream(self, other: Stream) -> None:
        Stream.waits.append((self, other))


def install(monkeypatch: Any) -> None:
    """Put the stand-ins in torch.cuda's place for one test."""
    main = Stream()
    CUDAGraph.made, Stream.waits = [], []
    replaced = {
        "CUDAGraph": CUDAGraph,
        "graph": graph,
        "Stream": Stream,
        "current_stream": lambda _device=None: main,
        "device": lambda _device: contextlib.nullcontext(),
        "stream": lambda _stream: contextlib.nullcontext(),
        "get_rng_state": lambda _device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, _device=None: torch.set_rng_state(state),
    }
    for name, stand_in in replaced.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
