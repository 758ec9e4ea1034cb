"""Checkpoints: load whatever format a DiT is in, save in the three that others read.

    model = fastdit.load_model("DiT-XL-2-256x256.pt")
    fastdit.save_model(model, "dit.safetensors")

A published checkpoint does not say what model it holds. All but the number of heads follows from
its shapes; the heads follow from the four published widths. Nothing is ever unpickled but tensors
and plain arguments, and every write is atomic.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastdit.backends import checked_device
from fastdit.checkpoint_config import (
    CONFIG_KEY,
    CONFIG_NAMES,
    infer_config,
    known_arguments,
    own_config,
)
from fastdit.checkpoint_files import (
    WEIGHTS,
    CheckpointError,
    Contents,
    atomic_write,
    locate,
    read,
    staged,
)
from fastdit.diffusers_format import (
    MERGES,
    PREFIX,
    config_hints,
    from_diffusers,
    key_report,
    positions,
    to_diffusers,
)
from fastdit.model import DiT

__all__ = ["CheckpointError", "atomic_write", "load_model", "read_metadata", "save_model"]

FORMATS = ("fastdit", "dit", "diffusers")


def load_model(
    path: str | os.PathLike[str],
    *,
    ema: bool = True,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    merge: str = "check",
    **config_overrides: Any,
) -> DiT:
    """A DiT from a checkpoint, in eval mode.

    Reads the published flat `.pt`; training checkpoints `{model, ema, opt, args}` of DiT,
    fast-DiT and SiT, or with `config` in the place of `args`; the diffusers pipeline's or
    transformer's folder; our own safetensors; and, with `huggingface_hub` installed, a hub id
    such as `facebook/DiT-XL-2-256`.

    Sizes come from our own configuration where the file has one, else from shapes. The number of
    heads has no shape: it comes from the file's arguments, else from the published widths (384,
    768, 1024, 1152). Unless the file says otherwise the latent is square and the last label is
    the null class. A diffusers model computes as DiT does, not as diffusers does: see
    `fastdit.diffusers_format` for the difference.

    Args:
        path: file, folder or hub id.
        ema: of a training checkpoint, the averaged weights; else the last step's.
        device: where the weights go.
        dtype: what they are cast to; None keeps each tensor's own.
        merge: diffusers repeats the embedders in every block. `"check"` wants the copies to be
            equal, `"first"` takes block 0's.
        **config_overrides: arguments of `DiT` that win over what was found or inferred.

    Raises:
        CheckpointError: the file is truncated, would run code, or has missing, unexpected or
            mis-shaped keys, which are named.
        FileNotFoundError: no such path, nor such a hub id.
        ImportError: a hub id without `huggingface_hub`.
        ValueError: an argument that `DiT` does not have, or with a value it does not allow.
    """
    unknown = sorted(set(config_overrides) - set(CONFIG_NAMES))
    if unknown:
        raise ValueError(
            f"{unknown[0]}: not an argument of DiT; allowed: {', '.join(CONFIG_NAMES)}"
        )
    if merge not in MERGES:
        raise ValueError(f"merge: got {merge!r}, allowed is {', '.join(map(repr, MERGES))}")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype: got {dtype}, allowed is a floating-point type")
    device = checked_device(device)
    source = locate(path)
    try:
        state, hints = _weights(read(source), ema, merge, config_overrides)
        config = infer_config(state, hints, config_overrides)
        with torch.device("meta"), _Unfilled():
            model = DiT(**config)
        _check_state(state, model)
    except (ValueError, TypeError) as error:  # also what DiT says of a value in the file
        raise CheckpointError(f"{source}: {error}") from error
    # A copy, because mapped tensors would read the file as long as the model lives.
    state = {
        name: tensor.detach().to(device=device, dtype=_stored(name, dtype), copy=True).contiguous()
        for name, tensor in state.items()
    }
    model.load_state_dict(state, assign=True)
    return model.eval()


def save_model(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    format: str = "fastdit",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Save a DiT atomically, its weights to the bit.

    Args:
        model: a `DiT`, which may be compiled or wrapped for data parallelism.
        path: the file; for `"diffusers"` the transformer's folder.
        format: `"fastdit"`: safetensors with the configuration inside. `"dit"`: the published
            flat `.pt`, which holds no configuration: a reader must be told heads of unpublished
            widths, non-square sizes and a missing null class. `"diffusers"`: `config.json` and
            safetensors for `DiTTransformer2DModel.from_pretrained`; square, `mlp_ratio` 4.
        metadata: strings kept beside the weights in a safetensors' header; `read_metadata`
            returns them.

    Raises:
        ValueError: an argument the format cannot hold, which is named. The old file stays.
    """
    if format not in FORMATS:
        raise ValueError(f"format: got {format!r}, allowed is {', '.join(map(repr, FORMATS))}")
    model = _unwrapped(model)
    metadata = _checked_metadata(metadata, format)
    state = {
        name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()
    }
    if format == "dit":
        atomic_write(path, lambda temporary: _save_torch(state, temporary))
        return
    header = {"format": "pt", CONFIG_KEY: json.dumps(model.config), **metadata}
    if format == "fastdit":
        atomic_write(path, lambda temporary: save_file(state, temporary, header))
        return
    theirs, folder_config = to_diffusers(state, model.config)
    # Safetensors stores no tensor twice, and diffusers has the embedders once per block.
    theirs = {name: tensor.clone() for name, tensor in theirs.items()}
    folder = Path(path)
    with staged(folder / "config.json") as config, staged(folder / f"{WEIGHTS}.safetensors") as new:
        save_file(theirs, new, header)
        config.write_text(json.dumps(folder_config, indent=2) + "\n", encoding="utf-8")


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The strings that `save_model(..., metadata=...)` kept; none in formats without a header."""
    source = locate(path)
    try:
        metadata = read(source).metadata
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error.__cause__
    return {name: text for name, text in metadata.items() if name not in ("format", CONFIG_KEY)}


def _stored(name: str, dtype: torch.dtype | None) -> torch.dtype | None:
    """Rotary tables stay as they are: 16 bits are too few for angles."""
    return None if name.startswith("feat_rope.") else dtype


class _Unfilled(TorchFunctionMode):
    """Leaves new parameters as they are: `normal_` on "meta" costs 3.5 s of imports, once."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _unwrapped(model: nn.Module) -> DiT:
    inner: Any = model
    while not isinstance(inner, DiT):
        inner = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
        if inner is None:
            raise ValueError(f"model: got {type(model).__name__}, allowed is a DiT")
    return inner


def _checked_metadata(metadata: Mapping[str, str] | None, format: str) -> dict[str, str]:
    metadata = dict(metadata or {})
    if metadata and format == "dit":
        raise ValueError("metadata: got some, allowed is none in the format 'dit', a bare .pt")
    for name, text in metadata.items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise ValueError(f"metadata: got {name!r}: {text!r}, allowed are strings")
        if name in ("format", CONFIG_KEY):
            raise ValueError(f"metadata: got {name!r}, a name that the format keeps for itself")
    return metadata


def _save_torch(state: dict[str, Tensor], path: Path) -> None:
    # Through a file object, or the archive would record the temporary file's name.
    with open(path, "wb") as file:
        torch.save(state, file)


def _weights(
    contents: Contents, ema: bool, merge: str, overrides: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by their published names, and what the file says of the model."""
    data = contents.data
    if not isinstance(data, Mapping):
        raise CheckpointError(f"got a {type(data).__name__}, allowed is a dict of tensors")
    hints = own_config(contents.metadata)
    if isinstance(data.get("model"), Mapping) or isinstance(data.get("ema"), Mapping):
        which = "ema" if ema else "model"
        if not isinstance(data.get(which), Mapping):
            other = "model" if ema else "ema"
            raise CheckpointError(f"has no {which!r}; ema={not ema} loads its {other!r}")
        for name in ("args", "config"):
            hints = {**known_arguments(data.get(name)), **hints}
        data = data[which]
    state = _without_prefixes(data)
    bad = [
        str(name)
        for name, tensor in state.items()
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point()
    ]
    if bad:
        raise CheckpointError(f"not floating-point tensors: {key_report([], bad)}")
    if any(name.startswith(PREFIX) for name in state):
        state = from_diffusers(state, merge)
        if contents.folder_config is not None:
            hints = {**config_hints(contents.folder_config), **hints}
        _add_positions(state, {**hints, **overrides})
    return state, hints


def _without_prefixes(state: Mapping[str, Any]) -> dict[str, Any]:
    """Without what DDP (`module.`) and torch.compile (`_orig_mod.`) put before every name."""
    return {re.sub(r"^(?:module\.|_orig_mod\.)+", "", str(k)): v for k, v in state.items()}


def _add_positions(state: dict[str, Tensor], known: Mapping[str, Any]) -> None:
    if "input_size" not in known:
        raise CheckpointError(
            "no config.json says the latent's size: pass input_size=, for instance 32"
        )
    weight = state["x_embedder.proj.weight"]
    sizes = {"hidden_size": weight.shape[0], "patch_size": weight.shape[-1]}
    sizes["input_size"] = known["input_size"]
    state["pos_embed"] = positions(sizes, weight.dtype)


def _check_state(state: Mapping[str, Tensor], model: DiT) -> None:
    expected = model.state_dict()
    misshaped = tuple(
        f"{name} {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    )
    missing = [name for name in expected if name not in state]
    extra = [name for name in state if name not in expected]
    if missing or extra or misshaped:
        raise CheckpointError(key_report(missing, extra, misshaped))
