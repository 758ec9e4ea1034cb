"""How much arithmetic a forward is: multiply-adds of its matrix products.

The paper's "Gflops" are these, not twice as many. With N tokens of width D a published block is
12·N·D² in its four Linears, 2·N²·D in attention, and 6·D² in its modulation, once a sample.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from fastdit import sizes


def multiply_adds(model: Any, input_size: int | tuple[int, ...] | None = None) -> int:
    """Multiply-adds of one sample's forward.

    Args:
        model: a `DiT`.
        input_size: of the sample; None is the model's.

    Raises:
        ValueError: the patch does not divide the size.
    """
    size, width = model.input_size, model.hidden_size
    if input_size is not None:
        size = sizes.resized("input_size", input_size, model.patch)
    patches = math.prod(sizes.grid(size, model.patch))
    sources = 1 if model.y_embedder is None else 2
    tokens = patches + model.context_width // width
    total = patches * model.x_embedder.proj.weight.numel()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            total += module.weight.numel() * _rows(name, tokens, sources)
    for block in model.blocks:
        keys = tokens + (sources if block.cross_attn is not None else 0)
        total += 2 * tokens * keys * width
    return total


def _rows(name: str, tokens: int, sources: int) -> int:
    """How often a sample's forward uses the Linear of that name."""
    if "adaLN_modulation" in name or name.startswith(("t_embedder", "y_embedder")):
        return 1
    return sources if name.endswith("cross_attn.kv") else tokens
