"""The proof that a replacement computes what the original does, before it is installed.

Two modules with the same children need not have the same forward: forks differ in one line. So the
first module of each kind gets a twin, the same objects with random float32 parameters on the CPU,
and both forwards run on the same few random tokens, in evaluation and in training mode with the
same random numbers. No weight of the model is read, so that it may be on any device, sharded,
still meta, or at its initialisation, where zero gates would hide every difference.
"""

from __future__ import annotations

import contextlib
import sys
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastdit import backends
from fastdit.patching.rules import Rule

TOLERANCE = 1e-4
"""Largest difference over the largest value. Rounding makes 1e-6; a wrong formula, 1e-2."""


def _random(shape: torch.Size) -> Tensor:
    """Parameters that keep activations near 1."""
    fan_in = shape[1:].numel() if len(shape) > 1 else 4
    return torch.randn(shape, device="cpu") * max(fan_in, 1) ** -0.5


def _parameter(value: nn.Parameter | None) -> nn.Parameter | None:
    if value is None:
        return None
    if not value.is_floating_point():
        return nn.Parameter(value.detach().cpu(), requires_grad=False)
    return nn.Parameter(_random(value.shape), requires_grad=False)


def _buffer(value: Tensor | None) -> Tensor | None:
    if value is None or not value.is_meta:
        value = value if value is None else value.detach().cpu()
        return value.float() if value is not None and value.is_floating_point() else value
    return torch.rand(value.shape, device="cpu").to(value.dtype)


def _class(module: nn.Module) -> type[nn.Module]:
    """The module's class without what `fully_shard` derived from it."""
    classes = type(module).__mro__
    return next(c for c in classes if not any(b.__name__ == "FSDPModule" for b in c.__mro__))


def twin(module: nn.Module, shortens: tuple[str, ...] = ()) -> nn.Module:
    """The module with random parameters on the CPU, without hooks and replacements; of the lists
    `shortens`, two blocks."""
    copy = object.__new__(_class(module))
    copy.__dict__ = {k: v for k, v in module.__dict__.items() if k != "forward"}
    copy.__dict__["_parameters"] = {k: _parameter(v) for k, v in module._parameters.items()}
    copy.__dict__["_buffers"] = {k: _buffer(v) for k, v in module._buffers.items()}
    below = {k: v[:2] if k in shortens else v for k, v in module._modules.items()}
    copy.__dict__["_modules"] = {k: v if v is None else twin(v) for k, v in below.items()}
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        copy.__dict__[hooks] = OrderedDict()
    return copy


def kind(rule: Rule, module: nn.Module) -> tuple[Any, ...]:
    """Modules of one kind share a proof: the same classes and shapes throughout."""
    shapes = tuple((name, tuple(p.shape)) for name, p in module.named_parameters())
    classes = tuple((name, type(m)) for name, m in module.named_modules())
    return rule.name, classes, shapes


@contextlib.contextmanager
def _laboratory() -> Iterator[None]:
    """Eager, float32 on the CPU, without gradients, leaving no trace in any random state."""
    stance: Any = contextlib.nullcontext()
    if "torch._dynamo" in sys.modules:  # or nothing here is compiled
        stance = torch.compiler.set_stance("force_eager")
    with (
        torch.random.fork_rng(devices=[]),
        torch.device("cpu"),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        backends.backend("reference"),
        stance,
    ):
        yield


def _difference(ours: Any, theirs: Any) -> str | None:
    ours, theirs = tree_leaves(ours), tree_leaves(theirs)
    if len(ours) != len(theirs):
        return f"{len(theirs)} results where {len(ours)} were expected"
    for a, b in zip(ours, theirs, strict=True):
        if not isinstance(b, Tensor):
            continue
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"{tuple(b.shape)} {b.dtype} where {tuple(a.shape)} {a.dtype} was expected"
        worst = float((a - b).abs().max() / b.abs().max().clamp_min(1e-20))
        if not worst <= TOLERANCE:
            return f"a relative difference of {worst:.1e} from what was expected"
    return None


def disproof(rule: Rule, module: nn.Module) -> str | None:
    """Why the rule's forward is not the module's, or None where they agree."""
    with _laboratory():
        torch.manual_seed(0)
        try:
            copy = twin(module, rule.shortens)
            for args, kwargs in rule.probe(copy):
                for training in (False, True):
                    copy.train(training)
                    torch.manual_seed(1)
                    theirs = type(copy).forward(copy, *args, **kwargs)
                    torch.manual_seed(1)
                    ours = rule.forward.__wrapped__(copy, *args, **kwargs)
                    if ours is NotImplemented:
                        if training:  # dropout, which the ops have not
                            continue
                        return "a normalisation or an option in it has no fused op"
                    if (why := _difference(ours, theirs)) is not None:
                        return f"its forward gives {why}"
        except Exception as error:  # whatever foreign code raises is the reason
            return f"its forward cannot be run as expected: {type(error).__name__}: {error}"
    return None
