"""Gated feed-forwards, SwiGLU and GEGLU, of all families: act(gate)·up in one `glu`.

Gate and up are one projection (LightningDiT's `w12`, diffusers' GEGLU, SwiGLU and Flux 2's), whose
bias the op adds, or two (LLaMA's feed-forward, which Lumina, AuraFlow and ACE-Step have by other
names). A projection that somebody watches or has changed (LoRA) runs as it is, its bias included.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdit import ops
from fastdit.patching.diffusers_norms import named
from fastdit.patching.published import TOKENS, has, linear
from fastdit.patching.rules import Call, Rule, replacement

APART = (
    ("w1", "w3", "w2"),
    ("gate_proj", "up_proj", "down_proj"),
    ("linear_1", "linear_3", "linear_2"),
    ("linear_1", "linear_2", "out_projection"),
)
"""What gate, up and the projection behind them are called: by LLaMA and Lumina's authors, by
transformers and ACE-Step, by diffusers' Lumina, by AuraFlow."""


def _packed(layer: nn.Module, x: Tensor, activation: str, gate_first: bool) -> Tensor:
    """The gated unit of one projection."""
    if linear(layer):
        return ops.glu(F.linear(x, layer.weight), None, layer.bias, activation, gate_first)
    return ops.glu(layer(x), None, None, activation, gate_first)


@replacement()
def swiglu_ffn(self: nn.Module, x: Tensor) -> Tensor:
    """w3 of the unit of w12, the gate first."""
    return self.w3(_packed(self.w12, x, "silu", True))


@replacement()
def geglu(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """diffusers' GEGLU: the value first, the exact GELU; the arguments that it warns of are its
    own."""
    if args or kwargs:
        return NotImplemented
    return _packed(self.proj, hidden_states, "gelu", False)


@replacement("activation")
def swiglu(self: nn.Module, hidden_states: Tensor) -> Tensor:
    """diffusers' SwiGLU: the value first."""
    return _packed(self.proj, hidden_states, "silu", False)


@replacement("gate_fn")
def flux2(self: nn.Module, x: Tensor) -> Tensor:
    """The unit alone, of a projection made elsewhere; the gate first."""
    return ops.glu(x)


def _names(module: nn.Module) -> tuple[str, str, str] | None:
    """The layout in `APART` that the module has."""
    return next((names for names in APART if has(module, *names)), None)


@replacement("silu")
def apart(self: nn.Module, x: Tensor) -> Tensor:
    """A feed-forward whose gate and up are Linears of their own."""
    gate, up, down = (self._modules[name] for name in _names(self))
    gate, up = gate(x), up(x)
    if gate.dtype != up.dtype:
        return NotImplemented
    return down(ops.glu(gate, up))


def _calls(projection: str) -> Any:
    """Of a module whose width is that of a child's input."""

    def calls(module: nn.Module) -> list[Call]:
        return [((torch.randn(2, TOKENS, module._modules[projection].in_features),), {})]

    return calls


def _is_apart(module: nn.Module) -> bool:
    names = _names(module)
    return names is not None and all(isinstance(module._modules[n], nn.Linear) for n in names)


_is_apart.names = (  # type: ignore[attr-defined]
    "LuminaFeedForward",
    "AuraFlowFeedForward",
    "AceStepMLP",
)


def _rule(name: str, forward: Any, recognises: Any, probe: Any) -> Rule:
    return Rule(name=name, ops="glu", forward=forward, recognises=recognises, probe=probe)


RULES = (
    _rule(
        "SwiGLU feed-forward",
        swiglu_ffn,
        lambda m: has(m, "w12", "w3") and isinstance(m.w12, nn.Linear),
        _calls("w12"),
    ),
    _rule(
        "SwiGLU feed-forward",
        apart,
        _is_apart,
        lambda m: _calls(_names(m)[0])(m),
    ),
    _rule("GEGLU projection", geglu, named("GEGLU", having="proj"), _calls("proj")),
    _rule("SwiGLU projection", swiglu, named("SwiGLU", having="proj"), _calls("proj")),
    _rule(
        "SwiGLU",
        flux2,
        named("Flux2SwiGLU", "Flux3SwiGLU", having="gate_fn"),
        lambda m: [((torch.randn(2, TOKENS, 12),), {})],
    ),
)
