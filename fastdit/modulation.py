"""All blocks' modulations in one matrix product, where no gradient is needed.

Each layer's shift, scale and gate are `Linear(SiLU(c))` of the same condition c, so L layers are
one product with their weights one below the other:

    rows (B, ΣWᵢ) = SiLU(c) · [W₁; W₂; …; W_L]ᵀ + [b₁; …; b_L]

The weights already lie that way: `pack` makes the layers' parameters views of one storage, under
their own names, without a second copy. A DiT-XL/2 forward then launches two kernels for its
modulations instead of 58; the bytes are the weights' either way (0.45 GB in 16 bits).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def _plain(modulation: nn.Module) -> bool:
    """Whether calling `modulation` is `Linear(SiLU(c))` and nothing else: not replaced, not
    wrapped, not watched by hooks."""
    if type(modulation) is not nn.Sequential or [type(m) for m in modulation] != [
        nn.SiLU,
        nn.Linear,
    ]:
        return False
    return not any(
        module._forward_hooks or module._forward_pre_hooks for module in (modulation, *modulation)
    )


def _adjacent(tensors: Sequence[Tensor]) -> bool:
    """Whether the tensors lie one after another in one storage."""
    first = tensors[0]
    if any(is_traceable_wrapper_subclass(t) for t in tensors):  # a DTensor's storage is a shard's
        return False
    storage, offset = first.untyped_storage()._cdata, first.storage_offset()
    for tensor in tensors:
        if (
            tensor.dtype != first.dtype
            or tensor.storage_offset() != offset
            or not tensor.is_contiguous()
            or tensor.untyped_storage()._cdata != storage
        ):
            return False
        offset += tensor.numel()
    return True


def _parameters(modulations: Sequence[nn.Sequential]) -> tuple[list[Tensor], list[Tensor]]:
    return [m[1].weight for m in modulations], [m[1].bias for m in modulations]


def pack(modulations: Sequence[nn.Module]) -> None:
    """Lay the weights of all `modulations` one after another in one storage, and the biases too.

    The parameters stay the same objects with the same values. Where they are not plain tensors of
    one dtype and device (sharded, quantised, replaced), nothing happens.
    """
    if not all(map(_plain, modulations)):
        return
    for tensors in _parameters(modulations):
        kinds = {(t.dtype, t.device) for t in tensors}
        if len(kinds) > 1 or _adjacent(tensors) or any(map(is_traceable_wrapper_subclass, tensors)):
            continue
        with torch.no_grad():
            whole = torch.cat([t.flatten() for t in tensors])
            for tensor, part in zip(
                tensors, whole.split([t.numel() for t in tensors]), strict=True
            ):
                tensor.data = part.view(tensor.shape)


def packed(modulations: Sequence[nn.Module]) -> bool:
    """Whether one product can serve all `modulations`: they are packed, and no gradient flows."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return all(map(_plain, modulations)) and all(map(_adjacent, _parameters(modulations)))


def rows(modulations: Sequence[nn.Module], c: Tensor) -> Tensor:
    """Every modulation of the condition c `(B, D)`, side by side: `(B, ΣWᵢ)`."""
    if not packed(modulations):
        return torch.cat([modulation(c) for modulation in modulations], dim=1)
    weights, biases = _parameters(modulations)
    width = sum(len(weight) for weight in weights)
    weight = weights[0].as_strided((width, c.shape[1]), (c.shape[1], 1))
    return F.linear(F.silu(c), weight, biases[0].as_strided((width,), (1,)))
