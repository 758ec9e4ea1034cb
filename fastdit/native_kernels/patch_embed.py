"""patch_embed on CPUs: the library's kernel for small patches, a matrix product for large ones.

With up to 64 numbers in a patch the op is bound by writing the tokens, and csrc/cpu/ writes them
once. Above, it is bound by arithmetic, at which BLAS is better (2×4×32×32, width 1152, one core:
0.28 against 0.40 ms at 16 numbers, 0.28 against 0.29 at 64, 0.66 against 0.30 at 256); it runs in
float32, so that the tokens are rounded once there too.
"""

from __future__ import annotations

import torch

from fastdit import reference
from fastdit.native_kernels import rows

LARGEST = 64
_op = torch.ops.fastdit_native.patch_embed.default


def patch_embed(x, weight, bias, pos):
    """Reads the image, writes the tokens; `(B, T, D)` in the wider dtype of `x` and `pos`."""
    taps = weight[0].numel()
    if taps <= LARGEST:
        return _op(x, weight, bias, pos)
    patches = reference.patchify(x, weight.shape[2:])
    flat = patches.reshape(-1, taps).float(), weight.flatten(1).t().float()
    tokens = torch.mm(*flat) if bias is None else torch.addmm(bias.float(), *flat)
    tokens = tokens.view(*patches.shape[:2], -1)
    if pos is not None:
        tokens += pos
    return tokens.to(x.dtype if pos is None else torch.promote_types(x.dtype, pos.dtype))


KERNELS = (rows.kernel("patch_embed", patch_embed),)
