"""What a DiT knows besides its pixels: where a token is, when it is, and what it should become.

Three embeddings with the published names and values: fixed 2-D sine-cosine positions (He et al.
2021), sinusoidal timesteps through an MLP (Ho et al. 2020, Dhariwal & Nichol 2021), and a table
of labels with one row more for "no label" (classifier-free guidance, Ho & Salimans 2022). A
condition that is a vector goes through an MLP like the timestep's. Models that rotate queries and
keys by their position (RoPE) take their tables from `rope_2d`; `fastdit.positions` has the others.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn


def sincos_1d(width: int, positions: np.ndarray) -> np.ndarray:
    """`(M,)` positions as float64 `(M, width)`: [sin | cos] of frequencies 10000^(-2i/width)."""
    frequencies = 10000.0 ** -(np.arange(width // 2, dtype=np.float64) / (width / 2))
    angles = np.outer(positions.reshape(-1).astype(np.float64), frequencies)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def sincos_2d(width: int, grid: tuple[int, int]) -> np.ndarray:
    """Positions of a `(rows, columns)` grid as `(rows·columns, width)`, float64.

    The first half of the channels encodes the column and the second half the row, as published.

    Raises:
        ValueError: `width` is not divisible by 4.
    """
    if width % 4:
        raise ValueError(
            f"hidden_size: got {width}, allowed is a multiple of 4 (sin-cos positions)"
        )
    rows, columns = np.meshgrid(*(np.arange(n) for n in grid), indexing="ij")
    return np.concatenate([sincos_1d(width // 2, columns), sincos_1d(width // 2, rows)], axis=1)


def rope_2d(
    head_dim: int, grid: tuple[int, int], *, theta: float = 10000.0, interleaved: bool = True
) -> tuple[Tensor, Tensor]:
    """Rotary tables (cos, sin) of a `(rows, columns)` grid for `fastdit.ops.attention`.

    Half of a head's pairs of channels turn with the token's row and the other half with its
    column, the i-th of them by position·theta^(-4i/head_dim) radians.

    Args:
        head_dim: channels of a head, a multiple of 4.
        grid: rows and columns of tokens.
        theta: the base of the frequencies.
        interleaved: the layout of the pairs, `attention`'s `rope_interleaved`.

    Returns:
        Two float32 tables `(rows·columns, head_dim)`.

    Raises:
        ValueError: `head_dim` is not divisible by 4.

    Source: Su et al. 2021; in two dimensions Fang et al. 2023 (EVA-02).
    """
    if head_dim % 4:
        raise ValueError(f"head_dim: got {head_dim}, allowed is a multiple of 4 (2-D rotation)")
    frequencies = theta ** -(np.arange(head_dim // 4) / (head_dim / 4))
    positions = np.meshgrid(*(np.arange(n) for n in grid), indexing="ij")
    angles = np.concatenate([np.outer(p.reshape(-1), frequencies) for p in positions], axis=1)
    angles = np.repeat(angles, 2, axis=1) if interleaved else np.tile(angles, 2)
    cos, sin = (torch.from_numpy(f(angles).astype(np.float32)) for f in (np.cos, np.sin))
    return cos, sin


class TimestepEmbedder(nn.Module):
    """A timestep as a vector: [cos | sin] of 128 frequencies, in float32, through a two-layer MLP.

    Timesteps are those of the 1000-step training schedule, 0 to 999; fractions are allowed.
    """

    def __init__(self, hidden_size: int, frequency_embedding_size: int = 256) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(frequency_embedding_size, hidden_size),
            nn.SiLU(),
            nn.Linear(hidden_size, hidden_size),
        )
        self.frequency_embedding_size = frequency_embedding_size

    @staticmethod
    def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000) -> Tensor:
        """`(B,)` timesteps as `(B, dim)` float32 rows [cos | sin], a last zero where dim is odd."""
        half = dim // 2
        exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
        angles = t[:, None].float() * torch.exp(-math.log(max_period) * exponents)[None]
        rows = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return nn.functional.pad(rows, (0, 1)) if dim % 2 else rows

    def forward(self, t: Tensor) -> Tensor:
        """`(B,)` timesteps as `(B, D)` vectors in the parameters' dtype."""
        rows = self.timestep_embedding(t, self.frequency_embedding_size)
        return self.mlp(rows.to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Class labels as vectors; in training each is dropped to the null class with probability p.

    The null class is row `num_classes`, which exists only where `dropout_prob` > 0.
    """

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob

    def token_drop(self, labels: Tensor, force_drop_ids: Tensor | None = None) -> Tensor:
        """Labels with some made null: at random, or exactly where `force_drop_ids` is 1."""
        drop = _dropped(labels, self.dropout_prob, force_drop_ids)
        return torch.where(drop, self.num_classes, labels)

    def forward(self, labels: Tensor, train: bool, force_drop_ids: Tensor | None = None) -> Tensor:
        """`(B,)` labels as `(B, D)` vectors; `train` drops some, `force_drop_ids` says which.

        Raises:
            IndexError: a label that is neither a class nor the null class, on a CPU.
            ValueError: `force_drop_ids` of another shape, or in a model without a null class.
        """
        if (train and self.dropout_prob > 0) or force_drop_ids is not None:
            labels = self.token_drop(labels, force_drop_ids)
        try:
            return self.embedding_table(labels)
        except IndexError:
            last = self.embedding_table.num_embeddings - 1
            raise IndexError(f"y: got {labels.tolist()}, allowed is 0 to {last}") from None


class VectorEmbedder(nn.Module):
    """A vector, such as another model's embedding, through a two-layer MLP; in training each is
    dropped to a learned null vector with probability p.

    `null`, `(condition_dim,)`, exists only where `dropout_prob` > 0; a row of it is no condition.
    """

    def __init__(self, condition_dim: int, hidden_size: int, dropout_prob: float) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(condition_dim, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )
        null = nn.Parameter(torch.zeros(condition_dim)) if dropout_prob > 0 else None
        self.register_parameter("null", null)
        self.dropout_prob = dropout_prob

    def forward(self, vectors: Tensor, train: bool, force_drop_ids: Tensor | None = None) -> Tensor:
        """`(B, condition_dim)` vectors as `(B, D)`, some of them dropped as in `LabelEmbedder`.

        Raises:
            ValueError: `force_drop_ids` of another shape, or in a model without a null vector.
        """
        vectors = vectors.to(self.mlp[0].weight.dtype)
        if (train and self.dropout_prob > 0) or force_drop_ids is not None:
            drop = _dropped(vectors, self.dropout_prob, force_drop_ids)
            vectors = torch.where(drop.unsqueeze(1), self.null, vectors)
        return self.mlp(vectors)


def _dropped(conditions: Tensor, dropout_prob: float, force_drop_ids: Tensor | None) -> Tensor:
    """`(B,)`, which of B conditions are made null: at random, or those that are told."""
    batch = conditions.shape[0]
    if force_drop_ids is None:
        return torch.rand(batch, device=conditions.device) < dropout_prob
    if dropout_prob == 0:
        raise ValueError(
            "force_drop_ids: got a tensor, allowed is None in a model without a null condition "
            "(class_dropout_prob=0)"
        )
    if force_drop_ids.shape != (batch,):
        got = tuple(force_drop_ids.shape)
        raise ValueError(f"force_drop_ids: got {got}, allowed is ({batch},), one for each of y")
    return force_drop_ids == 1
