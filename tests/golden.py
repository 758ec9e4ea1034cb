"""The oracle: weights, inputs and outputs of the published implementation (tests/data/*.npz)."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

DATA = Path(__file__).parent / "data"


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(DATA / f"{name}.npz") as file:
        return dict(file)


def config(data: dict[str, np.ndarray], key: str) -> dict:
    return json.loads(str(data[key]))


def set_reference_weights(model: nn.Module, seed: int, std: float = 0.05) -> None:
    """Every parameter but `pos_embed`, drawn by name as the oracle's were."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "pos_embed":
                rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
                draw = rng.standard_normal(parameter.shape, dtype=np.float32) * np.float32(std)
                parameter.copy_(torch.from_numpy(draw))


def relative_error(got: Tensor | np.ndarray, want: np.ndarray) -> float:
    """The largest deviation, relative to the largest value of the oracle."""
    got = got.detach().double().numpy() if isinstance(got, Tensor) else np.asarray(got, np.float64)
    assert got.shape == want.shape
    return float(np.abs(got - want).max() / np.abs(want).max())
