"""The compiled CPU forward for a model of somebody else's that is a DiT to the letter.

`fastdit.NativeForward` reads a `fastdit.DiT`. A patched model whose parameters have a DiT's names
and shapes, and whose attention and MLP are proved and replaced, gets a shadow: a DiT on no device
that holds the very same parameters. The model's own embedders make the condition.
"""

from __future__ import annotations

import contextlib
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from fastdit.blocks import EPS
from fastdit.model import DiT
from fastdit.native_forward import NativeForward
from fastdit.patching import norms, published
from fastdit.patching.rules import any_watched, is_ours, own_forward

_runs: weakref.WeakKeyDictionary[nn.Module, tuple[Any, NativeForward | None]]
_runs = weakref.WeakKeyDictionary()
"""For each model its parameters, and its compiled forward if they are a DiT's."""


def _replaced_by(module: nn.Module, forward: object) -> bool:
    own = own_forward(module)
    return is_ours(own) and own.func is forward


def _shadow(model: nn.Module) -> DiT | None:
    """A DiT with the model's parameters, or None where they are not a DiT's."""
    first, proj = model.blocks[0], model.x_embedder.proj
    patch, tokens = proj.kernel_size[0], model.pos_embed.shape[1]
    table = model.y_embedder._modules.get("embedding_table")
    if table is None or not hasattr(first.mlp, "fc1"):
        return None
    width, out = first.mlp.fc1.in_features, model.final_layer.linear.out_features
    with contextlib.suppress(ValueError), torch.device("meta"):
        shadow = DiT(
            input_size=patch * round(tokens**0.5),
            patch_size=patch,
            in_channels=proj.in_channels,
            hidden_size=width,
            depth=len(model.blocks),
            num_heads=first.attn.num_heads,
            mlp_ratio=first.mlp.fc1.out_features / width,
            num_classes=table.num_embeddings - 1,
            learn_sigma=out == 2 * proj.in_channels * patch * patch,
        )
        return _shared(shadow, model)
    return None


def _shared(shadow: DiT, model: nn.Module) -> DiT | None:
    """The shadow with the model's parameters, if it has the same by name and shape."""
    theirs, ours = dict(model.named_parameters()), dict(shadow.named_parameters())
    shapes = [{name: p.shape for name, p in found.items()} for found in (theirs, ours)]
    if shapes[0] != shapes[1]:
        return None
    for name, parameter in theirs.items():
        owner, _, leaf = name.rpartition(".")
        shadow.get_submodule(owner)._parameters[leaf] = parameter
    return shadow.eval()


def _identity(model: nn.Module) -> list[tuple[str, int]]:
    return [(name, id(p)) for name, p in model.named_parameters()]


def _run_of(model: nn.Module) -> NativeForward | None:
    """The model's compiled forward, made anew where a parameter is another one now."""
    quantize = getattr(own_forward(model), "quantize", None)
    known, now = _runs.get(model), (quantize, _identity(model))
    if known is None or known[0] != now:
        shadow = _shadow(model)
        run = None if shadow is None else NativeForward(shadow, quantize)
        known = _runs[model] = now, run
    return known[1]


def quantize(model: nn.Module, how: str) -> None:
    """Have a replaced model multiply in 8 bits. The choice stands on the installed forward, so
    that copies and pickles keep it and `undo` takes it away.

    Raises:
        ValueError: the compiled forward does not take the model.
    """
    if how != "int8":
        raise ValueError(f"quantize: got {how!r}, allowed is None or 'int8'")
    if not _to_the_letter(model) or _shadow(model) is None:
        raise ValueError(
            f"quantize: got {how!r}, allowed is None for a {type(model).__name__} that is not a "
            "DiT to the letter"
        )
    own_forward(model).quantize = how


def _to_the_letter(model: nn.Module) -> bool:
    """Whether what has no parameters is a DiT's too: norms, activations, heads."""
    norm = norms.Norm(None, None, EPS, "layer")
    if type(model.final_layer.linear) is not nn.Linear:
        return False
    for block in model.blocks:
        attn, mlp = block.attn, block.mlp
        if not (_replaced_by(attn, published.attention) and _replaced_by(mlp, published.mlp)):
            return False
        if not all(type(m) is nn.Linear for m in (attn.qkv, attn.proj, mlp.fc1, mlp.fc2)):
            return False
        if norms.norm_of(block.norm1) != norm or norms.norm_of(block.norm2) != norm:
            return False
        plain = [attn._modules.get(name) for name in ("q_norm", "k_norm", "norm")]
        plain.append(mlp._modules.get("norm"))
        if not all(m is None or isinstance(m, nn.Identity) for m in plain):
            return False
        head_dim = attn.qkv.in_features // attn.num_heads
        usual = getattr(attn, "scale", head_dim**-0.5) == head_dim**-0.5
        if not usual or not published.tanh_gelu(mlp.act):
            return False
    plain = isinstance(model.x_embedder._modules.get("norm") or nn.Identity(), nn.Identity)
    return plain and norms.norm_of(model.final_layer.norm_final) == norm


def forward(model: nn.Module, x: Tensor, silu_c: Tensor) -> Tensor | None:
    """The model's output by the compiled library, or None where that cannot run this call."""
    if (
        torch.is_grad_enabled()
        or model.training
        or torch.compiler.is_compiling()
        or x.device.type != "cpu"
        or x.dtype != torch.float32
        or getattr(model, "feat_rope", None) is not None
        or any_watched(model.modules())
        or not _to_the_letter(model)
    ):
        return None
    run = _run_of(model)
    if run is None:
        return None
    layers = [*model.blocks, model.final_layer]
    rows = torch.cat([layer.adaLN_modulation[1](silu_c) for layer in layers], dim=-1)
    if not run.explain(x, rows).startswith("native"):
        return None
    return run(x, None, None, conditioning=rows)
