"""Files in and out: atomic writes, and reads that never run code.

A write goes to a temporary file beside its target, is flushed to the disk, and takes the target's
name in one step: whatever fails, the old file stays whole. A read of a pickle goes through
PyTorch's restricted unpickler with the few classes that training scripts store; anything else
in it is refused by name.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

WEIGHTS = "diffusion_pytorch_model"
FOLDER_FILES = (
    f"{WEIGHTS}.safetensors",
    f"{WEIGHTS}.safetensors.index.json",
    f"{WEIGHTS}.bin",
    f"{WEIGHTS}.bin.index.json",
    "model.safetensors",
)
"""Weights in a model's folder, the preferred first."""

SAFE_GLOBALS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    argparse.Namespace,
    # A training script's arguments may hold paths. A pure path opens nothing and exists everywhere.
    (PurePosixPath, "pathlib.PosixPath"),
    (PurePosixPath, "pathlib._local.PosixPath"),
]


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or does not hold the model it should."""


class Contents(NamedTuple):
    """A file's unpickled object or tensors by name, and what else it or its folder says."""

    data: Any
    metadata: dict[str, str] = {}  # noqa: RUF012 -- never written to
    folder_config: dict[str, Any] | None = None


@contextmanager
def staged(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new empty file beside `path` that becomes `path` when the block ends without error."""
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except OSError as error:
        error.filename = os.fspath(path)  # the name that the user knows
        raise
    mode = temporary.stat().st_mode
    try:
        yield temporary
        temporary.chmod(mode)  # safetensors 0.8 puts a file of its own there, private to its owner
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # elsewhere a folder cannot be opened; its entry is the system's care
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def atomic_write(path: str | os.PathLike[str], writer: Callable[[Path], Any]) -> None:
    """Write a file whole or not at all.

    Args:
        path: the file; its folder is made if need be, and a link is followed.
        writer: called with the path of a temporary file in the same folder, which it fills.

    Raises:
        OSError: the disk refused. Whatever `writer` raises passes through. The old file, if any,
            is as it was in either case, and the temporary file is gone.
    """
    with staged(path) as temporary:
        writer(temporary)


def read(path: Path) -> Contents:
    """A checkpoint file or a model's folder.

    Raises:
        CheckpointError: damaged, unsafe, or not a checkpoint.
    """
    if path.is_dir():
        return _read_folder(path)
    with open(path, "rb") as file:
        head = file.read(64)
    if not head:
        raise CheckpointError("the file is empty")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError("a Git LFS pointer, not the weights: run `git lfs pull` there")
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        contents = _read_safetensors(path)
    else:
        contents = Contents(_read_torch(path, is_zip=head.startswith(b"PK")))
    config = path.parent / "config.json"
    if path.name in FOLDER_FILES and config.is_file():
        return contents._replace(folder_config=_read_json(config))
    return contents


def _read_safetensors(path: Path) -> Contents:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return Contents(tensors, dict(file.metadata() or {}))
    except SafetensorError as error:
        raise CheckpointError(
            f"truncated or damaged, or not a safetensors file ({error})"
        ) from error


def _read_torch(path: Path, is_zip: bool) -> Any:
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            # Only the newer zip format can be mapped; an optimiser's state is then never read.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except OSError:
        raise
    except Exception as error:  # bytes at random raise anything: IndexError, struct.error, ...
        forbidden = re.search(r"GLOBAL (\S+)", str(error))
        if forbidden:
            raise CheckpointError(
                f"refused: the file wants to run {forbidden[1]}, which no weights need, and "
                "nothing of it was run. Ask who made it for safetensors"
            ) from None
        # Of PyTorch's long message only the cause: the rest advises to run what the file says.
        cause = str(error).rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
        raise CheckpointError(f"truncated or damaged, or not a PyTorch file ({cause})") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path.name}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name}: got {type(value).__name__}, allowed is an object")
    return value


def _read_folder(folder: Path) -> Contents:
    if (folder / "model_index.json").is_file() and (folder / "transformer").is_dir():
        folder = folder / "transformer"
    found = next((folder / name for name in FOLDER_FILES if (folder / name).is_file()), None)
    if found is None:
        variants = sorted(folder.glob(f"{WEIGHTS}.*.safetensors"))
        if len(variants) != 1:
            raise CheckpointError(
                f"no weights in {folder}: one of {', '.join(FOLDER_FILES)} is needed"
            )
        found = variants[0]
    contents = Contents(_read_shards(found)) if found.suffix == ".json" else read(found)
    config = folder / "config.json"
    return contents._replace(folder_config=_read_json(config) if config.is_file() else None)


def _read_shards(index: Path) -> dict[str, Tensor]:
    shards = _read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise CheckpointError(f"{index.name}: has no weight_map")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(shards.values())):
        if Path(name).name != name:
            raise CheckpointError(f"{index.name}: {name!r} lies outside its folder")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index.name}: the file {name} is missing")
        tensors.update(read(index.parent / name).data)
    return tensors


def locate(path: str | os.PathLike[str]) -> Path:
    """A local path as it is; a hub id as the folder that `huggingface_hub` keeps it in.

    Raises:
        FileNotFoundError: neither.
        ImportError: it reads like a hub id, but `huggingface_hub` is not installed.
    """
    local = Path(path).expanduser()
    if local.exists():
        return local
    name = os.fspath(path)
    is_file_name = local.suffix in (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
    if is_file_name or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        raise FileNotFoundError(f"no such checkpoint file or folder: {name}")
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            f"{name} is no local path; to fetch it from the Hugging Face hub, "
            "pip install huggingface_hub"
        ) from error
    patterns = ["model_index.json", "config.json", "transformer/*", f"{WEIGHTS}*", FOLDER_FILES[-1]]
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{name} is no local path, and the Hugging Face hub did not give it: {error}"
        ) from error
