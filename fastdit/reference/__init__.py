"""Every op of fastdit in eager PyTorch: the definition that all kernels are held to.

An op's forward is three to six lines of ordinary differentiable PyTorch, rounding where eager
PyTorch rounds. Below each stands `<op>_backward`, its gradient written out in the precision of
float32 or better: what a fused backward computes, and what `torch.ops.fastdit.<op>` runs when no
kernel covers a call. The eager forward needs it never: autograd differentiates it as it stands.

Arguments come checked from `fastdit.ops`; the shapes are described there.
"""

from fastdit.reference.attention import (
    attention,
    attention_backward,
    attention_saving,
    rotate,
    split_heads,
)
from fastdit.reference.precision import per_token
from fastdit.reference.rows import (
    adaln,
    adaln_backward,
    adaln_saving,
    gated_adaln,
    gated_adaln_backward,
    gated_adaln_saving,
    gated_residual,
    gated_residual_backward,
)
from fastdit.reference.step import TABLE_COLUMNS, diffusion_step, diffusion_step_backward, guide
from fastdit.reference.tokens import (
    bias_gelu,
    bias_gelu_backward,
    glu,
    glu_backward,
    patch_embed,
    patch_embed_backward,
    patchify,
    unpatchify,
    unpatchify_backward,
)

__all__ = [
    "TABLE_COLUMNS",
    "adaln",
    "adaln_backward",
    "adaln_saving",
    "attention",
    "attention_backward",
    "attention_saving",
    "bias_gelu",
    "bias_gelu_backward",
    "diffusion_step",
    "diffusion_step_backward",
    "gated_adaln",
    "gated_adaln_backward",
    "gated_adaln_saving",
    "gated_residual",
    "gated_residual_backward",
    "glu",
    "glu_backward",
    "guide",
    "patch_embed",
    "patch_embed_backward",
    "patchify",
    "per_token",
    "rotate",
    "split_heads",
    "unpatchify",
    "unpatchify_backward",
]
