"""What DiT a checkpoint holds: from its own configuration, its script's arguments, its shapes.

With x_embedder.proj.weight `(D, C, p, p)`, pos_embed `(1, T, D)` and final_layer.linear.weight
`(p²·O, D)`, the width is D, the patch p, the latent C channels of side p·√T, and the variance is
learned where O = 2C. `fastdit.checkpoint_design` finds the options of the model's design.
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

from fastdit import designs
from fastdit.checkpoint_design import infer_design, mlp_ratio
from fastdit.checkpoint_files import CheckpointError
from fastdit.diffusers_format import key_report
from fastdit.model import DiT
from fastdit.sizes import SIZES, axes, grid

CONFIG_KEY = "fastdit"
"""Where our safetensors keep the model's configuration, as JSON."""

PUBLISHED_NAMES = tuple(n for n in inspect.signature(DiT).parameters if n != "design")
CONFIG_NAMES = (*PUBLISHED_NAMES, *designs.NAMES)
HEADS = {width: heads for _, width, heads in SIZES.values()}
ANCHORS = ("x_embedder.proj.weight", "final_layer.linear.weight")
"""The keys without which nothing is known."""

DIMENSIONS = {
    "pos_embed": (3,),
    "x_embedder.proj.weight": (3, 4),
    "y_embedder.embedding_table.weight": (2,),
    "final_layer.linear.weight": (2,),
}
"""Of the keys whose shapes tell the model's sizes."""


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
    """Published arguments of `DiT` anywhere in a script's nested arguments, and LightningDiT's
    `wo_shift`, which no shape tells; the outermost of a name wins. Other names of ours mean other
    things elsewhere."""
    if isinstance(config, argparse.Namespace):
        config = vars(config)
    if not isinstance(config, Mapping):
        return {}
    found: dict[str, Any] = {}
    for value in config.values():
        found = {**known_arguments(value), **found}
    here = {name: config[name] for name in PUBLISHED_NAMES if config.get(name) is not None}
    if config.get("wo_shift") is True:
        here["conditioning"] = "adaln_zero_no_shift"
    return {**found, **{n: tuple(v) if isinstance(v, list) else v for n, v in here.items()}}


def infer_config(
    state: Mapping[str, Tensor], hints: Mapping[str, Any], overrides: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of the DiT that has these tensors."""
    given = {**hints, **overrides}
    if set(given) >= set(PUBLISHED_NAMES):
        return {name: given[name] for name in CONFIG_NAMES if name in given}
    missing = [name for name in ANCHORS if name not in state]
    if missing:
        missing = ["pos_embed", *missing] if "pos_embed" not in state else missing
        raise CheckpointError(f"not a DiT's weights: {key_report(missing, [])}")
    wrong = [f"{k} {tuple(state[k].shape)}" for k, n in DIMENSIONS.items() if _misshaped(state, k)]
    if wrong:
        raise CheckpointError(key_report([], [], tuple(wrong)))
    width, channels, *patch = state["x_embedder.proj.weight"].shape
    learn_sigma = _learn_sigma(state)
    blocks = [int(m[1]) for name in state if (m := re.match(r"blocks\.(\d+)\.", name))]
    size = _input_size(state, patch, given.get("input_size"))
    num_classes, dropout = _classes(state, given)
    design = infer_design(state, width, grid(axes("input_size", size, len(patch)), tuple(patch)))
    design |= {name: given[name] for name in designs.NAMES if name in given}
    return {
        "input_size": size,
        "patch_size": patch[0] if len(set(patch)) == 1 else tuple(patch),
        "in_channels": channels,
        "hidden_size": width,
        "depth": max(blocks, default=-1) + 1,
        "num_heads": _heads(width, given.get("num_heads")),
        "mlp_ratio": mlp_ratio(state, width),
        "learn_sigma": learn_sigma,
        **design,
        **overrides,
        "num_classes": num_classes,
        "class_dropout_prob": dropout,
    }


def _misshaped(state: Mapping[str, Tensor], name: str) -> bool:
    return name in state and state[name].dim() not in DIMENSIONS[name]


def _heads(width: int, given: int | None) -> int:
    if given is None and width not in HEADS:
        raise CheckpointError(
            f"num_heads: unknown for hidden_size {width}, and no shape tells it: pass num_heads="
        )
    return HEADS[width] if given is None else given


def _input_size(state: Mapping[str, Tensor], patch: list[int], given: Any) -> Any:
    """The given size if the positions have as many tokens, else the square that has."""
    if "pos_rows" in state:
        tables = (state["pos_rows"], state["pos_columns"])
        found = tuple(t.shape[1] * p for t, p in zip(tables, patch, strict=True))
        return given or (found[0] if found[0] == found[1] else found)
    holder = next((name for name in ("pos_embed", "feat_rope.freqs_cos") if name in state), None)
    if holder is None:
        if given is None:
            raise CheckpointError("input_size: no positions tell it: pass input_size=")
        return given
    tokens = state[holder].shape[-2]
    if given is None:
        if len(patch) == 1:
            return (tokens * patch[0],)
        side = math.isqrt(tokens)
        if side * side != tokens or patch[0] != patch[1]:
            raise CheckpointError(
                f"input_size: the {tokens} tokens of {holder} are no square: "
                "pass input_size=(height, width)"
            )
        return side * patch[0]
    if math.prod(grid(axes("input_size", given, len(patch)), tuple(patch))) != tokens:
        raise CheckpointError(
            f"input_size: got {given}, allowed is one with {tokens} patches of "
            f"{'x'.join(map(str, patch))}, as {holder} has"
        )
    return given


def _classes(state: Mapping[str, Tensor], given: Mapping[str, Any]) -> tuple[int, float]:
    """Classes and dropout: of a table with a row for each, the last of which may be the null one;
    of a vector with or without a null; of a model that has neither."""
    num_classes, dropout = given.get("num_classes"), given.get("class_dropout_prob")
    if "y_embedder.embedding_table.weight" not in state:
        if num_classes:
            missing = key_report(["y_embedder.embedding_table.weight"], [])
            raise CheckpointError(f"num_classes: got {num_classes}, but {missing}")
        null = "y_embedder.null" in state or "y_embedder.mlp.0.weight" not in state
        return 0, (0.1 if null else 0.0) if dropout is None else dropout
    rows = len(state["y_embedder.embedding_table.weight"])
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


def _learn_sigma(state: Mapping[str, Tensor]) -> bool:
    rows, embedder = len(state["final_layer.linear.weight"]), state["x_embedder.proj.weight"].shape
    numbers = math.prod(embedder[1:])
    if rows not in (numbers, 2 * numbers):
        raise CheckpointError(
            f"mis-shaped keys: final_layer.linear.weight has {rows} rows, allowed are {numbers} or "
            f"{2 * numbers} for x_embedder.proj.weight {tuple(embedder)}"
        )
    return rows == 2 * numbers
