"""DiT in diffusers: its patch embedding, and at level "fast" the whole DiTTransformer2DModel.

Diffusers keeps a copy of the timestep's and the label's embedder in every block and runs all of
them, the first one twice: 29 times for DiT-XL where once is enough. Level "fast" runs one, takes
SiLU of it once, and leaves each block's last branch to the next. It does so in inference, where
nothing tells the copies apart: each has gradients of its own, and in training mode drops labels of
its own. The copies are compared when first used and whenever one of their tensors has changed.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from fastdit import ops
from fastdit.ops._checks import autocast_dtype
from fastdit.patching import norms
from fastdit.patching.diffusers_norms import named
from fastdit.patching.rules import Call, Rule, any_watched, replacement


@replacement("proj")
def patch_embed(self: nn.Module, latent: Tensor) -> Tensor:
    """Patches to tokens, plus sine-cosine positions, cropped if the model does."""
    proj = self.proj
    grid = [size // patch for size, patch in zip(latent.shape[2:], proj.kernel_size, strict=True)]
    whole = all(
        n * p == size for n, p, size in zip(grid, proj.kernel_size, latent.shape[2:], strict=True)
    )
    if self.layer_norm or not self.flatten or not whole:
        return NotImplemented
    pos = self.pos_embed
    if pos is not None and self.pos_embed_max_size:
        pos = self.cropped_pos_embed(*latent.shape[-2:])
    elif pos is not None and grid != [self.height, self.width]:
        return NotImplemented  # it computes others
    tokens = ops.patch_embed(latent, proj.weight, proj.bias, pos)
    return tokens.to(autocast_dtype(latent) or latent.dtype)


def _patch_calls(module: nn.Module) -> list[Call]:
    size = [module.height * module.patch_size, module.width * module.patch_size]
    return [((torch.randn(2, module.proj.in_channels, *size),), {})]


PATCH_EMBED = Rule(
    name="patch embedding",
    ops="patch_embed",
    forward=patch_embed,
    recognises=named("PatchEmbed"),
    probe=_patch_calls,
    refuses=lambda m: (
        None
        if hasattr(m, "interpolation_scale") and isinstance(m.proj, nn.Conv2d)
        else "it is another PatchEmbed than diffusers'"
    ),
)


# ---- the whole model ----------------------------------------------------------------------------

_equal: weakref.WeakKeyDictionary[nn.Module, tuple[Any, bool]] = weakref.WeakKeyDictionary()
"""For each model the state of its embedders' tensors, and whether the copies were equal in it."""


def _version(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version


def _copies_agree(model: nn.Module) -> bool:
    """Whether every block's embedder holds the same numbers as the first block's."""
    copies = [list(block.norm1.emb.parameters()) for block in model.transformer_blocks]
    if any(p.is_meta or isinstance(p, FakeTensor) for p in copies[0]):
        return True  # nothing to compare, nothing to compute
    state = [_version(p) for copy in copies for p in copy]
    known = _equal.get(model)
    if known is None or known[0] != state:
        agree = all(
            torch.equal(a, b) for copy in copies[1:] for a, b in zip(copies[0], copy, strict=True)
        )
        known = _equal[model] = state, agree
    return known[1]


def _plain(block: nn.Module) -> bool:
    """Whether a block is adaLN-Zero, self-attention and feed-forward, and nothing else."""
    return (
        getattr(block, "norm_type", None) == "ada_norm_zero"
        and block.attn2 is None
        and block.pos_embed is None
        and not block.only_cross_attention
        and block._chunk_size is None
    )


def _norms(model: nn.Module) -> list[nn.Module]:
    """Every block's two, then the output's."""
    pairs = [n for block in model.transformer_blocks for n in (block.norm1.norm, block.norm3)]
    return [*pairs, model.norm_out]


def _bypassed(model: nn.Module) -> list[nn.Module]:
    blocks = model.transformer_blocks
    unused = [m for block in blocks[1:] for m in block.norm1.emb.modules()]
    return [*blocks, *(block.norm1 for block in blocks), *_norms(model), *unused]


@replacement()
def model(
    self: nn.Module,
    hidden_states: Tensor,
    timestep: Tensor | None = None,
    class_labels: Tensor | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    return_dict: bool = True,
) -> Any:
    """Inference with one embedder, and branches fused across blocks."""
    blocks = self.transformer_blocks
    if (
        self.training
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or any_watched(_bypassed(self))
        or cross_attention_kwargs
        or not all(map(_plain, blocks))
        or not _copies_agree(self)
    ):
        return NotImplemented
    stream = norms.Stream(self.pos_embed(hidden_states))
    found = norms.ready(stream.x, *_norms(self))
    side = int(stream.x.shape[1] ** 0.5)
    if found is None or stream.x.shape[1] != side * side:
        return NotImplemented
    c = F.silu(blocks[0].norm1.emb(timestep, class_labels, hidden_dtype=stream.x.dtype))
    for block, first, second in zip(blocks, found[::2], found[1::2], strict=False):
        shift1, scale1, gate1, shift2, scale2, gate2 = block.norm1.linear(c).chunk(6, dim=1)
        stream.add(block.attn1(stream.modulated(first, shift1, scale1)), gate1)
        stream.add(block.ff(stream.modulated(second, shift2, scale2)), gate2)
    shift, scale = self.proj_out_1(c).chunk(2, dim=1)
    tokens = self.proj_out_2(stream.modulated(found[-1], shift, scale))
    sample = ops.unpatchify(tokens, self.patch_size, (side, side), self.out_channels)
    if not return_dict:
        return (sample,)
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    return Transformer2DModelOutput(sample=sample)


def _calls(module: nn.Module) -> list[Call]:
    for block in module.transformer_blocks[1:]:
        block.norm1.emb = module.transformer_blocks[0].norm1.emb
    embed = module.pos_embed
    size = [embed.height * embed.patch_size, embed.width * embed.patch_size]
    x = torch.randn(2, embed.proj.in_channels, *size)
    return [((x, torch.tensor([3, 700]), torch.tensor([0, 1])), {"return_dict": False})]


MODEL = Rule(
    name="DiT with an embedder in every block",
    ops="one embedder, gated_adaln across blocks, unpatchify",
    forward=model,
    recognises=named("DiTTransformer2DModel"),
    refuses=lambda m: (
        None if all(map(_plain, m.transformer_blocks)) else "its blocks are of another kind"
    ),
    probe=_calls,
    level="fast",
    shortens=("transformer_blocks",),
)

RULES = (MODEL, PATCH_EMBED)
