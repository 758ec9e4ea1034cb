"""The ops of a Diffusion Transformer, each one kernel where a backend has one.

| op | definition | least traffic |
|---|---|---|
| `adaln` | LN(x)·(1 + scale) + shift | read x, write y |
| `gated_residual` | x + gate·y | read 2, write 1 |
| `gated_adaln` | h = x + gate·y, then adaln(h) | read 2, write 2 |
| `attention` | softmax(QKᵀ/√d)V on packed qkv | read 3, write 1 |
| `bias_gelu` | gelu_tanh(x + bias) | read 1, write 1 |
| `glu` | act(gate)·up | read 2, write 1 |
| `patch_embed` | conv(stride = patch), flatten, + pos | read the latents, write the tokens |
| `unpatchify` | token rows to an image | read 1, write 1 |
| `diffusion_step` | one row of a sampler's table | read x, model output, noise; write x' |

**Dtypes.** float32, bfloat16, float16 and float64. The result has the dtype of the first argument;
kernels do their arithmetic in float32 (float64 for float64).

**Autocast.** Ops do not follow autocast: they accept the mixture that autocast makes of a model, a
float32 residual stream with low-precision modulation, and return the stream's dtype, whose
rounding in the Linear that follows is then the only one. The two that contain matrix products,
`attention` and `patch_embed`, cast their operands to autocast's dtype as `nn.Conv2d` and
`scaled_dot_product_attention` do.
"""

from fastdit.ops.adaln import adaln
from fastdit.ops.attention import attention
from fastdit.ops.bias_gelu import bias_gelu
from fastdit.ops.diffusion_step import diffusion_step
from fastdit.ops.gated_adaln import gated_adaln
from fastdit.ops.gated_residual import gated_residual
from fastdit.ops.glu import glu
from fastdit.ops.patch_embed import patch_embed
from fastdit.ops.unpatchify import unpatchify

__all__ = [
    "adaln",
    "attention",
    "bias_gelu",
    "diffusion_step",
    "gated_adaln",
    "gated_residual",
    "glu",
    "patch_embed",
    "unpatchify",
]
