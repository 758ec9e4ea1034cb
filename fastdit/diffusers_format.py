"""DiT weights as `diffusers.DiTTransformer2DModel` names them, and back.

Diffusers keeps the timestep's and the label's embedder once per block instead of once, splits
the packed q|k|v rows in three, and computes the positions instead of storing them.

Its published arithmetic differs from DiT's in two places that no weight records. Diffusers
divides the timestep's exponents by 127 where DiT divides by 128, which moves the embedding by 13 %
at t = 100 and by 100 % at t = 999; and its second normalisation adds 1e-5, DiT's 1e-6. A model
loaded here computes as DiT does, as its weights were trained to. A folder written here asks for
1e-6; the exponents cannot be asked for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdit import designs
from fastdit.checkpoint_files import CheckpointError
from fastdit.embeddings import sincos_2d

PREFIX = "transformer_blocks."
"""How a block's keys begin in diffusers' format, and in no other."""

TOP = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
BLOCK = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
EMBEDDERS = {
    "t_embedder.mlp.0.weight": "timestep_embedder.linear_1.weight",
    "t_embedder.mlp.0.bias": "timestep_embedder.linear_1.bias",
    "t_embedder.mlp.2.weight": "timestep_embedder.linear_2.weight",
    "t_embedder.mlp.2.bias": "timestep_embedder.linear_2.bias",
    "y_embedder.embedding_table.weight": "class_embedder.embedding_table.weight",
}
QKV = ("to_q", "to_k", "to_v")
PARTS = ("weight", "bias")
FIXED = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
}
"""What a diffusers config may say of these and still be a DiT."""

MERGES = ("check", "first")


def positions(config: Mapping[str, Any], dtype: torch.dtype) -> Tensor:
    """The `(1, T, D)` positions of a model with this `hidden_size`, `input_size`, `patch_size`."""
    size = config["input_size"]
    height, width = (size, size) if isinstance(size, int) else size
    grid = (height // config["patch_size"], width // config["patch_size"])
    return torch.from_numpy(sincos_2d(config["hidden_size"], grid)).float().to(dtype)[None]


def config_hints(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a diffusers `config.json` says that shapes do not.

    Raises:
        CheckpointError: it describes another architecture.
    """
    for name, allowed in FIXED.items():
        if config.get(name, allowed) != allowed:
            raise CheckpointError(
                f"config.json: {name}: got {config[name]!r}, allowed is {allowed!r}"
            )
    # The label's table always has a row for the null class.
    hints: dict[str, Any] = {"class_dropout_prob": 0.1}
    names = {"num_attention_heads": "num_heads", "sample_size": "input_size"}
    names["num_embeds_ada_norm"] = "num_classes"
    hints.update({ours: config[theirs] for theirs, ours in names.items() if theirs in config})
    return hints


def from_diffusers(theirs: Mapping[str, Tensor], merge: str = "check") -> dict[str, Tensor]:
    """Diffusers' weights under the published names, but for `pos_embed`.

    Args:
        theirs: tensors by diffusers' names.
        merge: `"check"` wants every block's copy of the embedders to be the same to the bit;
            `"first"` takes the first block's, whatever the others hold.

    Raises:
        CheckpointError: a key is missing, foreign, or the copies differ.
    """
    rest = dict(theirs)
    rest.pop("pos_embed.pos_embed", None)
    indices = [int(m[1]) for k in theirs if (m := re.match(r"transformer_blocks\.(\d+)\.", k))]
    depth = 1 + max(indices, default=0)
    names = _names(depth)
    missing = [name for name in names if name not in theirs]
    extra = [name for name in theirs if name not in names and name != "pos_embed.pos_embed"]
    if missing or extra:
        raise CheckpointError(key_report(missing, extra))

    ours: dict[str, Tensor] = {}
    for part in PARTS:
        ours.update({f"{o}.{part}": theirs[f"{t}.{part}"] for o, t in TOP.items()})
    for i in range(depth):
        block, own = f"transformer_blocks.{i}.", f"blocks.{i}."
        for part in PARTS:
            ours.update(
                {f"{own}{o}.{part}": theirs[f"{block}{t}.{part}"] for o, t in BLOCK.items()}
            )
            rows = [theirs[f"{block}attn1.{name}.{part}"] for name in QKV]
            ours[f"{own}attn.qkv.{part}"] = _packed(rows, f"{block}attn1.to_q|k|v.{part}")
        for target, source in EMBEDDERS.items():
            name = f"{block}norm1.emb.{source}"
            first = ours.setdefault(target, theirs[name])
            if merge == "check" and not _same_bits(first, theirs[name]):
                raise CheckpointError(
                    f"block {i}'s copy of an embedder differs from block 0's: {name}. DiT has one "
                    "for all blocks; merge='first' takes block 0's"
                )
    return ours


def to_diffusers(
    ours: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Published names as diffusers' tensors and `config.json`.

    A model without a null class is written as one with a class less, whose null row is the last
    class's: outputs in eval mode are the same.

    Raises:
        ValueError: the model is one that diffusers cannot hold; the argument is named.
    """
    _check_writable(ours, config)
    theirs: dict[str, Tensor] = {}
    for part in PARTS:
        theirs.update({f"{t}.{part}": ours[f"{o}.{part}"] for o, t in TOP.items()})
        for i in range(config["depth"]):
            block = f"transformer_blocks.{i}."
            own = f"blocks.{i}."
            theirs.update(
                {f"{block}{t}.{part}": ours[f"{own}{o}.{part}"] for o, t in BLOCK.items()}
            )
            rows = ours[f"{own}attn.qkv.{part}"].chunk(3)
            theirs.update({f"{block}attn1.{n}.{part}": r for n, r in zip(QKV, rows, strict=True)})
    for i in range(config["depth"]):
        prefix = f"transformer_blocks.{i}.norm1.emb."
        theirs.update({prefix + t: ours[o] for o, t in EMBEDDERS.items()})
    channels = config["in_channels"]
    folder_config = {
        "_class_name": "DiTTransformer2DModel",
        "num_attention_heads": config["num_heads"],
        "attention_head_dim": config["hidden_size"] // config["num_heads"],
        "in_channels": channels,
        "out_channels": 2 * channels if config["learn_sigma"] else channels,
        "num_layers": config["depth"],
        "sample_size": _square(config["input_size"]),
        "patch_size": config["patch_size"],
        "num_embeds_ada_norm": len(ours["y_embedder.embedding_table.weight"]) - 1,
        "norm_eps": 1e-6,
        **FIXED,
    }
    return theirs, folder_config


def _names(depth: int) -> dict[str, None]:
    """The names of a diffusers DiT's tensors, in order."""
    names = [f"{name}.{part}" for name in TOP.values() for part in PARTS]
    layers = [*BLOCK.values(), *(f"attn1.{name}" for name in QKV)]
    for i in range(depth):
        block = f"transformer_blocks.{i}."
        names += [f"{block}norm1.emb.{name}" for name in EMBEDDERS.values()]
        names += [f"{block}{layer}.{part}" for layer in layers for part in PARTS]
    return dict.fromkeys(names)


def key_report(missing: Sequence[str], extra: Sequence[str], misshaped: Sequence[str] = ()) -> str:
    """One line that names wrong keys, up to eight of each kind."""

    def some(names: Sequence[str]) -> str:
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        return ", ".join(names[:8]) + more

    kinds = {"missing keys": missing, "unexpected keys": extra, "mis-shaped keys": misshaped}
    return "; ".join(f"{kind}: {some(names)}" for kind, names in kinds.items() if names)


def _packed(rows: list[Tensor], names: str) -> Tensor:
    shapes = [tuple(tensor.shape) for tensor in rows]
    if len(set(shapes)) > 1 or not shapes[0]:
        raise CheckpointError(key_report([], [], (f"{names} {shapes}",)))
    return torch.cat(rows)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit, so that a NaN equals itself."""
    if a is b:
        return True
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _square(size: int | tuple[int, int]) -> int:
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise ValueError(f"input_size: got {size}, allowed is a square in diffusers' format")
    return height


def _check_writable(ours: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    for name in designs.NAMES:
        if name in config:
            allowed = getattr(designs.PUBLISHED, name)
            raise ValueError(
                f"{name}: got {config[name]!r}, allowed is {allowed!r} in diffusers' format"
            )
    if not config["num_classes"]:
        raise ValueError("num_classes: got 0, allowed is 1 or more in diffusers' format")
    _square(config["input_size"])
    if not isinstance(config["patch_size"], int):
        raise ValueError(
            f"patch_size: got {config['patch_size']}, allowed is an int in diffusers' format"
        )
    if config["depth"] < 1:
        raise ValueError(f"depth: got {config['depth']}, allowed is 1 or more in diffusers' format")
    if int(config["hidden_size"] * config["mlp_ratio"]) != 4 * config["hidden_size"]:
        raise ValueError(f"mlp_ratio: got {config['mlp_ratio']}, allowed is 4 in diffusers' format")
    pos = ours["pos_embed"]
    # Another machine's sine may differ in the last bit; a learned position differs in the first.
    if not torch.allclose(pos.float(), positions(config, pos.dtype).float(), rtol=0, atol=1e-2):
        raise ValueError(
            "pos_embed: got other values than the fixed sine-cosine positions, allowed are only "
            "those in diffusers' format, which computes them"
        )
