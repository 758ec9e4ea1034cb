"""What DiT a checkpoint holds: from its own configuration, its script's arguments, its shapes.

With x_embedder.proj.weight `(D, C, p, p)`, pos_embed `(1, T, D)` and final_layer.linear.weight
`(p²·O, D)`, the width is D, the patch p, the latent C channels of side p·√T, and the variance is
learned where O = 2C.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastdit.checkpoint_files import CheckpointError
from fastdit.diffusers_format import key_report
from fastdit.model import SIZES, DiT

CONFIG_KEY = "fastdit"
"""Where our safetensors keep the model's configuration, as JSON."""

CONFIG_NAMES = tuple(inspect.signature(DiT).parameters)
HEADS = {width: heads for _, width, heads in SIZES.values()}
ANCHORS = {
    "pos_embed": 3,
    "x_embedder.proj.weight": 4,
    "y_embedder.embedding_table.weight": 2,
    "final_layer.linear.weight": 2,
}
"""The keys whose shapes tell the model's sizes, and their dimensions."""


def own_config(metadata: Mapping[str, str]) -> dict[str, Any]:
    if CONFIG_KEY not in metadata:
        return {}
    try:
        config = json.loads(metadata[CONFIG_KEY])
    except json.JSONDecodeError as error:
        raise CheckpointError(f"the configuration inside is not JSON ({error})") from error
    if not isinstance(config, dict) or not set(config) <= set(CONFIG_NAMES):
        raise CheckpointError(
            f"the configuration inside is not a DiT's: got {config!r}, "
            f"allowed are {', '.join(CONFIG_NAMES)}"
        )
    return {name: tuple(v) if isinstance(v, list) else v for name, v in config.items()}


def known_arguments(config: Any) -> dict[str, Any]:
    """Arguments of `DiT` anywhere in a script's nested arguments; the outermost of a name wins."""
    if isinstance(config, argparse.Namespace):
        config = vars(config)
    if not isinstance(config, Mapping):
        return {}
    found: dict[str, Any] = {}
    for value in config.values():
        found = {**known_arguments(value), **found}
    here = {name: config[name] for name in CONFIG_NAMES if config.get(name) is not None}
    return {**found, **{n: tuple(v) if isinstance(v, list) else v for n, v in here.items()}}


def infer_config(
    state: Mapping[str, Tensor], hints: Mapping[str, Any], overrides: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of the DiT that has these tensors."""
    given = {**hints, **overrides}
    if set(given) >= set(CONFIG_NAMES):
        return {name: given[name] for name in CONFIG_NAMES}
    missing = [name for name in ANCHORS if name not in state]
    if missing:
        raise CheckpointError(f"not a DiT's weights: {key_report(missing, [])}")
    wrong = [f"{k} {tuple(state[k].shape)}" for k, n in ANCHORS.items() if state[k].dim() != n]
    if wrong:
        raise CheckpointError(key_report([], [], tuple(wrong)))
    width, channels, patch, _ = state["x_embedder.proj.weight"].shape
    blocks = [int(m[1]) for name in state if (m := re.match(r"blocks\.(\d+)\.", name))]
    num_classes, dropout = _classes(len(state["y_embedder.embedding_table.weight"]), given)
    return {
        "input_size": _input_size(state["pos_embed"].shape[1], patch, given.get("input_size")),
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": width,
        "depth": max(blocks, default=-1) + 1,
        "num_heads": _heads(width, given.get("num_heads")),
        "mlp_ratio": _mlp_ratio(state, width),
        "learn_sigma": _learn_sigma(len(state["final_layer.linear.weight"]), patch, channels),
        **overrides,
        "num_classes": num_classes,
        "class_dropout_prob": dropout,
    }


def _heads(width: int, given: int | None) -> int:
    if given is None and width not in HEADS:
        raise CheckpointError(
            f"num_heads: unknown for hidden_size {width}, and no shape tells it: pass num_heads="
        )
    return HEADS[width] if given is None else given


def _input_size(tokens: int, patch: int, given: Any) -> int | tuple[int, int]:
    if given is None:
        side = math.isqrt(tokens)
        if side * side != tokens:
            raise CheckpointError(
                f"input_size: the {tokens} tokens of pos_embed are no square: "
                "pass input_size=(height, width)"
            )
        return side * patch
    height, width = (given, given) if isinstance(given, int) else given
    if (height // patch) * (width // patch) != tokens:
        raise CheckpointError(
            f"input_size: got {given}, allowed is one with {tokens} patches of {patch}x{patch}, "
            "as pos_embed has"
        )
    return given


def _classes(rows: int, given: Mapping[str, Any]) -> tuple[int, float]:
    """Classes and dropout of a table with this many rows, the last of which may be the null one."""
    num_classes, dropout = given.get("num_classes"), given.get("class_dropout_prob")
    if dropout is None:
        has_null = rows > 1 if num_classes is None else rows == num_classes + 1
        dropout = 0.1 if has_null else 0.0
    if num_classes is None:
        num_classes = rows - (dropout > 0)
    if num_classes + (dropout > 0) != rows:
        raise CheckpointError(
            f"num_classes: got {num_classes} with class_dropout_prob {dropout}, but "
            f"y_embedder.embedding_table.weight has {rows} rows (the null class is one); "
            "pass both to override what the file says"
        )
    return num_classes, dropout


def _mlp_ratio(state: Mapping[str, Tensor], width: int) -> float:
    hidden = next((len(v) for k, v in state.items() if k.endswith(".mlp.fc1.weight")), 4 * width)
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _learn_sigma(rows: int, patch: int, channels: int) -> bool:
    outputs = {patch * patch * channels: False, 2 * patch * patch * channels: True}
    if rows not in outputs:
        raise CheckpointError(
            f"mis-shaped keys: final_layer.linear.weight has {rows} rows, allowed are "
            f"{' or '.join(map(str, outputs))} for {channels} channels"
        )
    return outputs[rows]
