"""Calls of attention for its Triton kernels, and what they should give."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastdit import reference
from fastdit.kernels.attention import attention
from fastdit.kernels.attention_backward import attention_backward

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
PARAMETERS = ("q_weight", "q_bias", "k_weight", "k_bias")


@dataclass(frozen=True)
class Case:
    """One call; `rope` is None, "adjacent", "halves" or "per sample"."""

    head_dim: int
    heads: int
    tokens: int
    dtype: torch.dtype
    batch: int = 1
    qk_norm: str | None = None
    affine: bool = False
    rope: str | None = None
    scale: float | None = None
    strided: bool = False

    def __str__(self) -> str:
        words = [f"d{self.head_dim}", f"h{self.heads}", f"n{self.tokens}", f"b{self.batch}"]
        words.append(str(self.dtype).removeprefix("torch."))
        words += [w for w in (self.qk_norm, self.rope) if w]
        words += [] if self.scale is None else [f"scale{self.scale}"]
        words += [w for w in ("affine", "strided") if getattr(self, w)]
        return "-".join(words).replace(" ", "_")


@dataclass
class Call:
    """The tensors of a case: `schema` are the arguments after qkv and num_heads."""

    case: Case
    qkv: Tensor
    dout: Tensor
    scale: float | None
    parameters: list[Tensor | None]
    tables: list[Tensor | None]

    @property
    def schema(self) -> tuple[Any, ...]:
        case = self.case
        interleaved = case.rope != "halves"
        return (self.scale, *self.parameters, case.qk_norm, 1e-5, *self.tables, interleaved)

    def in_dtype(self, dtype: torch.dtype) -> Call:
        """The same numbers in another precision; float32 tables stay unless it is float64."""

        def cast(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(dtype)

        tables = [cast(t) for t in self.tables] if dtype == torch.float64 else self.tables
        parameters = [cast(t) for t in self.parameters]
        return replace(
            self, qkv=cast(self.qkv), dout=cast(self.dout), parameters=parameters, tables=tables
        )


def make(case: Case, seed: int = 0, device: str = "cpu") -> Call:
    """Random tensors of a case; on "meta" their shapes alone."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        if device == "meta":
            return torch.empty(shape, dtype=dtype, device=device)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    width, tokens = case.heads * case.head_dim, case.tokens
    if case.strided:  # a slice of a wider projection whose batch is its second axis
        qkv = random(tokens, case.batch, 3 * width + 16).transpose(0, 1)[..., 8 : 8 + 3 * width]
    else:
        qkv = random(case.batch, tokens, 3 * width)
    dout = random(case.batch, tokens, width)
    parameters: list[Tensor | None] = [None] * 4
    if case.affine:
        for i, name in enumerate(PARAMETERS):
            if name.endswith("weight") or case.qk_norm == "layer":
                parameters[i] = random(case.head_dim) * 0.5 + 1
    tables: list[Tensor | None] = [None, None]
    if case.rope is not None:
        samples = (case.batch,) if case.rope == "per sample" else ()
        # Not of length 1: each channel's cos and sin are its own, as the op allows.
        tables = [random(*samples, tokens, case.head_dim, dtype=FP32) for _ in range(2)]
    return Call(case, qkv, dout, case.scale, parameters, tables)


def by_name(case: Case, out: Tensor, dqkv: Tensor, dparameters: list[Tensor | None]):
    parts = dict(zip(("dq", "dk", "dv"), dqkv.chunk(3, -1), strict=True))
    named = {"out": out, **parts}
    for name, gradient in zip(PARAMETERS, dparameters, strict=True):
        if gradient is not None:
            named["d" + name] = gradient
    return named


def eager(call: Call) -> dict[str, Tensor]:
    """out and every gradient by autograd through the reference, in the dtype of `call`."""
    leaves = [t if t is None else t.detach().requires_grad_() for t in (call.qkv, *call.parameters)]
    schema = (call.scale, *leaves[1:], *call.schema[5:])
    out = reference.attention(leaves[0], call.case.heads, *schema)
    gradients = iter(torch.autograd.grad(out, [t for t in leaves if t is not None], call.dout))
    dqkv, *dparameters = (None if t is None else next(gradients) for t in leaves)
    return by_name(call.case, out.detach(), dqkv, dparameters)


def fused(call: Call) -> dict[str, Tensor]:
    """out and every gradient by the Triton launchers."""
    out, lse = attention(call.qkv, call.case.heads, *call.schema)
    dqkv, *dparameters = attention_backward(
        call.dout, call.qkv, out, lse, call.case.heads, *call.schema
    )
    wanted = [None if p is None else d for p, d in zip(call.parameters, dparameters, strict=True)]
    return by_name(call.case, out, dqkv, wanted) | {"lse": lse}


def exact_lse(call: Call) -> Tensor:
    wide = call.in_dtype(torch.float64)
    return reference.attention_saving(wide.qkv, call.case.heads, *wide.schema)[1]


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def errors(results: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Root mean square error of each output and gradient."""
    return {name: rms(results[name].double() - truth) for name, truth in exact.items()}
