"""Run the published scripts, or a fork's, on fastdit without changing a line of them.

    python -m fastdit.published sample.py --ckpt DiT-XL-2-256x256.pt --image-size 256
    torchrun --nproc_per_node=8 -m fastdit.published train.py --data-path imagenet/train

While the script runs, its `from models import DiT_models`, `from diffusion import create_diffusion`
and `from download import find_model` get fastdit's.
"""

from __future__ import annotations

import os
import runpy
import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fastdit import diffusion, model


def find_model(model_name: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The weights in a checkpoint of any format that `fastdit.load_model` reads, under their
    published names; the averaged ones where it has both.

    Raises:
        CheckpointError: there is no such file, or it is no DiT's.
    """
    from fastdit.checkpoint import load_model

    with torch.random.fork_rng(devices=[]):  # the script's noise must not depend on our loading
        return load_model(model_name).state_dict()


@contextmanager
def published_names() -> Iterator[None]:
    """Inside the block, `models`, `diffusion` and `download` are fastdit's."""
    download = types.ModuleType("download")
    download.find_model = find_model  # type: ignore[attr-defined]
    ours = {"models": model, "diffusion": diffusion, "download": download}
    before = {name: sys.modules.get(name) for name in ours}
    sys.modules.update(ours)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def run(script: str | os.PathLike[str], arguments: Sequence[str] = ()) -> dict[str, object]:
    """Run a script as `python script arguments`, its published imports served by fastdit.

    Returns:
        The script's globals.
    """
    argv, sys.argv = sys.argv, [os.fspath(script), *arguments]
    try:
        with published_names():
            return runpy.run_path(os.fspath(script), run_name="__main__")
    finally:
        sys.argv = argv


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit("usage: python -m fastdit.published SCRIPT [ARGUMENT ...]")
    run(sys.argv[1], sys.argv[2:])
