"""Whole models of the published code, level "fast": DiT, SiT, LightningDiT and their forks.

    x = patch_embed(x) + pos;  c = t + y;  blocks;  final layer;  unpatchify

Replaced as a whole, a block can leave its last branch to the next one, so that the stream is read
and written once between two matrix products instead of twice, the positions are added while the
tokens are written, SiLU(c) is computed once instead of once a block, and the output is written in
its final order. On a CPU in inference a model that is a DiT to the letter is one compiled call.
Models whose forward does anything else keep it, with their blocks replaced.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdit import ops
from fastdit.patching import native, norms, probe
from fastdit.patching.published import BLOCK, FINAL_LAYER, PATCH_EMBED, _six, has
from fastdit.patching.rules import Call, Rule, any_watched, replacement

CHECKPOINTING = ("use_checkpoint", "gradient_checkpointing")
"""Attributes that switch activation checkpointing, which the replacement does not do."""


def _norms(model: nn.Module) -> list[nn.Module]:
    """Every block's two, then the final layer's."""
    pairs = [norm for block in model.blocks for norm in (block.norm1, block.norm2)]
    return [*pairs, model.final_layer.norm_final]


def _bypassed(model: nn.Module) -> list[nn.Module]:
    """Modules whose work the replacement does itself."""
    layers = [*model.blocks, model.final_layer]
    conditions = [layer.adaLN_modulation for layer in layers]
    return [model.x_embedder, model.x_embedder.proj, *layers, *conditions, *_norms(model)]


def _modulations(layer: nn.Module, silu_c: Tensor) -> Tensor:
    return layer.adaLN_modulation[1](silu_c)


@replacement()
def model(self: nn.Module, x: Tensor, t: Tensor | None = None, y: Tensor | None = None) -> Tensor:
    """A class-conditional model; every branch's addition is fused with the next modulation."""
    if any_watched(_bypassed(self)) or any(getattr(self, name, False) for name in CHECKPOINTING):
        return NotImplemented
    proj = self.x_embedder.proj
    grid = [size // patch for size, patch in zip(x.shape[2:], proj.kernel_size, strict=True)]
    if grid[0] * grid[1] != self.pos_embed.shape[1] or x.shape[2] != x.shape[3]:
        return NotImplemented
    stream = norms.Stream(ops.patch_embed(x, proj.weight, proj.bias, self.pos_embed))
    found = norms.ready(stream.x, *_norms(self))
    if found is None:
        return NotImplemented
    c = F.silu(self.t_embedder(t) + self.y_embedder(y, self.training))
    if (image := native.forward(self, x, c)) is not None:
        return image
    rope = {"rope": self.feat_rope} if getattr(self, "feat_rope", None) is not None else {}
    for block, first, second in zip(self.blocks, found[::2], found[1::2], strict=False):
        six = _six(_modulations(block, c), stream.x.shape[-1])
        shift1, scale1, gate1, shift2, scale2, gate2 = six
        stream.add(block.attn(stream.modulated(first, shift1, scale1), **rope), gate1)
        stream.add(block.mlp(stream.modulated(second, shift2, scale2)), gate2)
    shift, scale = _modulations(self.final_layer, c).chunk(2, -1)
    tokens = self.final_layer.linear(stream.modulated(found[-1], shift, scale))
    channels = tokens.shape[-1] // (proj.kernel_size[0] * proj.kernel_size[1])
    return ops.unpatchify(tokens, proj.kernel_size, grid, channels)


def _recognised(module: nn.Module) -> bool:
    return (
        has(module, "x_embedder", "t_embedder", "y_embedder", "blocks", "final_layer")
        and isinstance(getattr(module, "pos_embed", None), Tensor)
        and isinstance(module.blocks, nn.ModuleList)
        and len(module.blocks) > 0
        and all(map(BLOCK.recognises, module.blocks))
        and FINAL_LAYER.recognises(module.final_layer)
        and PATCH_EMBED.recognises(module.x_embedder)
    )


def _refuses(module: nn.Module) -> str | None:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    names = () if code is None else code.co_names + code.co_freevars
    if "checkpoint" in names and not any(hasattr(module, name) for name in CHECKPOINTING):
        return "its forward checkpoints activations; its blocks are replaced one by one"
    if (why := PATCH_EMBED.refuses(module.x_embedder)) is not None:
        return why
    layers = [*module.blocks, module.final_layer]
    plain = all(
        isinstance(layer.adaLN_modulation, nn.Sequential)
        and len(layer.adaLN_modulation) == 2
        and isinstance(layer.adaLN_modulation[0], nn.SiLU)
        for layer in layers
    )
    if not plain or None in map(norms.norm_of, _norms(module)):
        return "a modulation or normalisation is of another kind"
    if len({probe.kind(BLOCK, block) for block in module.blocks}) > 1:
        return "its blocks are of different kinds"
    return None


def _calls(module: nn.Module) -> list[Call]:
    proj = module.x_embedder.proj
    side = round(module.pos_embed.shape[1] ** 0.5)
    size = [side * patch for patch in proj.kernel_size]
    x = torch.randn(2, proj.in_channels, *size)
    arguments: dict[str, Any] = {"t": torch.tensor([0.3, 0.7]), "y": torch.tensor([0, 1])}
    return [((x,), arguments)]


MODEL = Rule(
    name="class-conditional model",
    ops="patch_embed, gated_adaln across blocks, unpatchify",
    forward=model,
    recognises=_recognised,
    refuses=_refuses,
    probe=_calls,
    level="fast",
    shortens=("blocks",),
)

RULES = (MODEL,)
