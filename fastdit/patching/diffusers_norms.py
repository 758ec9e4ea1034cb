"""diffusers' normalisations, each one kernel: norm, scale and shift in one pass.

Between them they hold every norm of diffusers' Transformers that is a module of its own. What a
block does inline, its gates and its second norm, is in the block's file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdit import ops
from fastdit.patching import norms
from fastdit.patching.rules import Call, Rule, replacement, watched

TOKENS = 4


def named(*names: str, having: str = "training") -> Callable[[nn.Module], bool]:
    """Whether a module's class, or one that it derives from, has one of these names, and the module
    an attribute that tells it from another project's."""

    def has_name(module: nn.Module) -> bool:
        known = any(cls.__name__ in names for cls in type(module).__mro__)
        return known and hasattr(module, having)

    has_name.names = names  # type: ignore[attr-defined]
    return has_name


def tokens(width: int, count: int = TOKENS) -> Tensor:
    """Tokens for a probe, so small that a wrong eps shows."""
    return 0.01 * torch.randn(2, count, width)


def _calls(module: nn.Module) -> list[Call]:
    """A stream and a condition; the width is the norm's, the condition's the projection's."""
    width = module.norm.normalized_shape[0] if hasattr(module.norm, "normalized_shape") else None
    width = width or module.norm.dim[0]
    return [((tokens(width), torch.randn(2, _projection(module).in_features)), {})]


def _projection(module: nn.Module) -> nn.Linear:
    return module.linear if hasattr(module, "linear") else module.linear_1


@replacement("norm")
def zero(
    self: nn.Module,
    x: Tensor,
    timestep: Tensor | None = None,
    class_labels: Tensor | None = None,
    hidden_dtype: torch.dtype | None = None,
    emb: Tensor | None = None,
) -> Any:
    """AdaLayerNormZero: the first branch's modulated input, and the rest of the six."""
    if (found := norms.ready(x, self.norm)) is None:
        return NotImplemented
    if self.emb is not None:
        emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
    shift, scale, *rest = self.linear(self.silu(emb)).chunk(6, dim=1)
    return norms.adaln(found[0], x, shift, scale), *rest


def _zero_calls(module: nn.Module) -> list[Call]:
    x = tokens(module.norm.normalized_shape[0])
    if module.emb is None:
        return [((x,), {"emb": torch.randn(2, module.linear.in_features)})]
    return [((x, torch.tensor([3, 700]), torch.tensor([0, 1])), {"hidden_dtype": torch.float32})]


@replacement("norm")
def zero_single(self: nn.Module, x: Tensor, emb: Tensor | None = None) -> Any:
    """AdaLayerNormZeroSingle: the only branch's modulated input, and its gate."""
    if (found := norms.ready(x, self.norm)) is None:
        return NotImplemented
    shift, scale, gate = self.linear(self.silu(emb)).chunk(3, dim=1)
    return norms.adaln(found[0], x, shift, scale), gate


@replacement("norm")
def zero_x(self: nn.Module, hidden_states: Tensor, emb: Tensor | None = None) -> Any:
    """SD35AdaLayerNormZeroX: two modulations of one normalisation, for two attentions."""
    if (found := norms.ready(hidden_states, self.norm)) is None:
        return NotImplemented
    parts = self.linear(self.silu(emb)).chunk(9, dim=1)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp, shift2, scale2, gate2 = parts
    first = norms.adaln(found[0], hidden_states, shift, scale)
    second = norms.adaln(found[0], hidden_states, shift2, scale2)
    return first, gate, shift_mlp, scale_mlp, gate_mlp, second, gate2


@replacement("norm")
def continuous(self: nn.Module, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
    """AdaLayerNormContinuous: scale, then shift, of any condition."""
    if (found := norms.ready(x, self.norm)) is None or conditioning_embedding.dim() != 2:
        return NotImplemented
    scale, shift = self.linear(self.silu(conditioning_embedding).to(x.dtype)).chunk(2, dim=1)
    return norms.adaln(found[0], x, shift, scale)


@replacement("norm")
def adaptive(
    self: nn.Module, x: Tensor, timestep: Tensor | None = None, temb: Tensor | None = None
) -> Tensor:
    """AdaLayerNorm along channels: shift, then scale."""
    if (found := norms.ready(x, self.norm)) is None or self.chunk_dim != 1:
        return NotImplemented
    if self.emb is not None:
        temb = self.emb(timestep)
    shift, scale = self.linear(self.silu(temb)).chunk(2, dim=1)
    return norms.adaln(found[0], x, shift, scale)


@replacement("norm")
def shifted(self: nn.Module, x: Tensor, emb: Tensor) -> Tensor:
    """AdaLayerNormShift of HunyuanDiT: an affine normalisation and a shift."""
    if (found := norms.ready(x, self.norm)) is None:
        return NotImplemented
    shift = self.linear(self.silu(emb.to(torch.float32)).to(emb.dtype))
    return norms.adaln(found[0], x, shift)


@replacement("norm")
def cogvideox(
    self: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor
) -> Any:
    """CogVideoXLayerNormZero: one normalisation for the video and the text, six parts."""
    if (found := norms.ready(hidden_states, self.norm)) is None:
        return NotImplemented
    parts = self.linear(self.silu(temb)).chunk(6, dim=1)
    shift, scale, gate, text_shift, text_scale, text_gate = parts
    return (
        norms.adaln(found[0], hidden_states, shift, scale),
        norms.adaln(found[0], encoder_hidden_states, text_shift, text_scale),
        gate[:, None, :],
        text_gate[:, None, :],
    )


@replacement("norm")
def lumina_zero(self: nn.Module, x: Tensor, emb: Tensor | None = None) -> Any:
    """LuminaRMSNormZero: RMS, a scale and no shift; a gate, and the second branch's two."""
    if (found := norms.ready(x, self.norm)) is None:
        return NotImplemented
    scale, *rest = self.linear(self.silu(emb)).chunk(4, dim=1)
    return norms.adaln(found[0], x, None, scale), *rest


@replacement("norm")
def lumina_continuous(self: nn.Module, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
    """LuminaLayerNormContinuous: a scale and no shift, then the output projection."""
    if (found := norms.ready(x, self.norm)) is None:
        return NotImplemented
    scale = self.linear_1(self.silu(conditioning_embedding).to(x.dtype))
    x = norms.adaln(found[0], x, None, scale)
    return x if self.linear_2 is None else self.linear_2(x)


@replacement("norm")
def sana(self: nn.Module, hidden_states: Tensor, temb: Tensor, scale_shift_table: Tensor) -> Tensor:
    """SanaModulatedNorm: shift and scale from a table of the model's."""
    if (found := norms.ready(hidden_states, self.norm)) is None:
        return NotImplemented
    shift, scale = norms.table(scale_shift_table[None], temb[:, None])
    return norms.adaln(found[0], hidden_states, shift, scale)


@replacement()
def plain(self: nn.Module, hidden_states: Tensor) -> Tensor:
    """A normalisation alone, which diffusers computes in float32 in three to six kernels."""
    norm = norms.norm_of(self)
    x = hidden_states
    if norm is None or x.dim() < 2 or (norm.weight is not None and norm.weight.dtype != x.dtype):
        return NotImplemented
    folded = x if x.dim() == 3 else x.reshape(1, -1, x.shape[-1])
    return norms.adaln(norm, folded).reshape(x.shape)


def _plain_calls(module: nn.Module) -> list[Call]:
    dim = getattr(module, "normalized_shape", None) or getattr(module, "dim", None)
    dim = dim or module.weight.shape
    return [((tokens(dim[-1]),), {}), ((0.01 * torch.randn(2, 3, TOKENS, dim[-1]),), {})]


def _unknown_norm(module: nn.Module) -> str | None:
    return None if norms.norm_of(module) else "a bias without a weight, or an eps of the dtype"


@replacement()
def gelu(self: nn.Module, hidden_states: Tensor) -> Tensor:
    """diffusers' GELU: a Linear and a tanh-GELU, the bias added by the latter's kernel."""
    proj = self.proj
    if type(proj) is not nn.Linear or watched(proj) or proj.bias is None:
        return NotImplemented
    return ops.bias_gelu(F.linear(hidden_states, proj.weight), proj.bias)


def _rule(name: str, forward: Callable[..., Any], *classes: str, **options: Any) -> Rule:
    options = {"ops": "adaln", "probe": _calls, "recognises": named(*classes), **options}
    return Rule(name=name, forward=forward, **options)


RULES = (
    _rule("adaLN-Zero norm", zero, "AdaLayerNormZero", probe=_zero_calls),
    _rule("adaLN-Zero norm", zero_single, "AdaLayerNormZeroSingle"),
    _rule("adaLN-Zero norm", zero_x, "SD35AdaLayerNormZeroX"),
    _rule("adaptive norm", continuous, "AdaLayerNormContinuous"),
    _rule(
        "adaptive norm",
        adaptive,
        recognises=named("AdaLayerNorm", having="chunk_dim"),
        probe=lambda m: [
            ((tokens(m.norm.normalized_shape[0]),), {"temb": torch.randn(2, m.linear.in_features)})
        ],
        refuses=lambda m: None if m.chunk_dim == 1 else "it splits the batch, not the channels",
    ),
    _rule("shifted norm", shifted, "AdaLayerNormShift"),
    _rule(
        "adaLN-Zero norm",
        cogvideox,
        "CogVideoXLayerNormZero",
        probe=lambda m: [
            (
                (
                    tokens(m.norm.normalized_shape[0]),
                    tokens(m.norm.normalized_shape[0], 3),
                    torch.randn(2, m.linear.in_features),
                ),
                {},
            )
        ],
    ),
    _rule("adaptive RMS norm", lumina_zero, "LuminaRMSNormZero"),
    _rule("adaptive norm", lumina_continuous, "LuminaLayerNormContinuous"),
    _rule(
        "adaptive norm",
        sana,
        "SanaModulatedNorm",
        probe=lambda m: [
            (
                (
                    tokens(m.norm.normalized_shape[0]),
                    torch.randn(2, m.norm.normalized_shape[0]),
                    torch.randn(2, m.norm.normalized_shape[0]),
                ),
                {},
            )
        ],
    ),
    _rule("norm", plain, "FP32LayerNorm", "RMSNorm", probe=_plain_calls, refuses=_unknown_norm),
    Rule(
        name="tanh-GELU projection",
        ops="bias_gelu",
        forward=gelu,
        recognises=lambda m: (
            named("GELU")(m)
            and isinstance(m._modules.get("proj"), nn.Linear)
            and hasattr(m, "approximate")
        ),
        refuses=lambda m: None if m.approximate == "tanh" else "bias_gelu is the tanh-GELU",
        probe=lambda m: [((torch.randn(2, TOKENS, m.proj.in_features),), {})],
    ),
)
