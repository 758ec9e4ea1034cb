"""Write a random-weight DiT in the published checkpoint's format, with torch alone.

    python tests/published_checkpoint.py DiT-S-2.pt --depth 12 --width 384

The names and shapes stand here as the published code has them, so that reading such a file tests
fastdit against something that fastdit did not write.
"""

from __future__ import annotations

import argparse

import torch


def published_shapes(depth: int, width: int, patch: int = 2, size: int = 32) -> dict[str, tuple]:
    """Names and shapes of a class-conditional DiT with learned variance on 4-channel latents."""
    shapes = {
        "pos_embed": (1, (size // patch) ** 2, width),
        "x_embedder.proj.weight": (width, 4, patch, patch),
        "x_embedder.proj.bias": (width,),
        "t_embedder.mlp.0.weight": (width, 256),
        "t_embedder.mlp.0.bias": (width,),
        "t_embedder.mlp.2.weight": (width, width),
        "t_embedder.mlp.2.bias": (width,),
        "y_embedder.embedding_table.weight": (1001, width),
    }
    linears = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
    linears["adaLN_modulation.1"] = (6, 1)
    for block in range(depth):
        for name, (out, inner) in linears.items():
            shapes[f"blocks.{block}.{name}.weight"] = (out * width, inner * width)
            shapes[f"blocks.{block}.{name}.bias"] = (out * width,)
    shapes["final_layer.linear.weight"] = (patch * patch * 8, width)
    shapes["final_layer.linear.bias"] = (patch * patch * 8,)
    shapes["final_layer.adaLN_modulation.1.weight"] = (2 * width, width)
    shapes["final_layer.adaLN_modulation.1.bias"] = (2 * width,)
    return shapes


def published_weights(depth: int, width: int, **kwargs) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = published_shapes(depth, width, **kwargs)
    return {n: torch.randn(s, generator=generator) * 0.02 for n, s in shapes.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path")
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--width", type=int, default=384)
    args = parser.parse_args()
    torch.save(published_weights(args.depth, args.width), args.path)
