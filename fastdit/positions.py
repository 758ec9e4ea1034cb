"""Where a token is: absolute positions that are added, rotary ones that turn queries and keys.

A token's place is its coordinates on the grid of patches, one for an axis. A model knows one grid,
that of its `base_size`. On another grid, coordinates are either squeezed into the known range,
i·base/n, as EVA and PixArt do ("interpolate"), or simply counted, i ("extrapolate"). Learned tables
have no values between their entries: they are resampled, bicubically in two dimensions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdit import sizes
from fastdit.embeddings import sincos_2d

Grid = tuple[int, ...]
THETA = 10000.0


def coordinates(grid: Grid, base: Grid, scaling: str, device: torch.device) -> list[Tensor]:
    """Each axis' coordinates in the base grid, float64 (float32 where the device has no other)."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    axes = [torch.arange(n, dtype=dtype, device=device) for n in grid]
    if scaling == "extrapolate":
        return axes
    return [axis * (known / n) for axis, n, known in zip(axes, grid, base, strict=True)]


def _angles(places: Tensor, pairs: int) -> Tensor:
    """`(M,)` places as `(M, pairs)` angles at frequencies 10000^(-i/pairs)."""
    steps = torch.arange(pairs, dtype=places.dtype, device=places.device) / pairs
    return torch.outer(places, THETA**-steps)


def _sincos(places: Tensor, width: int) -> Tensor:
    angles = _angles(places, width // 2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _each(axes: Sequence[Tensor]) -> list[Tensor]:
    """Every token's coordinate on each axis, tokens in row-major order."""
    return [axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij")]


def _table_2d(axes: list[Tensor], base: Grid, width: int) -> Tensor:
    """The column in the first half of the channels, the row in the second, as published."""
    rows, columns = _each(axes)
    return torch.cat([_sincos(columns, width // 2), _sincos(rows, width // 2)], dim=1)


def _table_1d(axes: list[Tensor], base: Grid, width: int) -> Tensor:
    """The place in the base grid's sequence; between two rows, between their sequences."""
    places = _each(axes)
    place = places[0] if len(places) == 1 else places[0] * base[1] + places[1]
    return _sincos(place, width)


FIXED: dict[str, Callable[[list[Tensor], Grid, int], Tensor]] = {
    "sincos_2d": _table_2d,
    "sincos_1d": _table_1d,
}
"""Tables `(T, width)` that are computed."""

LEARNED = {"learned_1d": ("pos_embed",), "learned_2d": ("pos_rows", "pos_columns")}
"""Parameters that are trained, by their names in a model."""


def check_positions(kind: str, rope: bool, grid: Grid, width: int, head_dim: int) -> None:
    """Whether these positions exist on such a grid.

    Raises:
        ValueError: they do not.
    """
    if kind.endswith("_2d") and len(grid) != 2:
        raise ValueError(
            f"positions: got {kind!r} for a signal, allowed is 'sincos_1d', 'learned_1d', 'none'"
        )
    multiple = {"sincos_2d": 4, "sincos_1d": 2}.get(kind, 1)
    if width % multiple:
        raise ValueError(
            f"hidden_size: got {width}, allowed is a multiple of {multiple} (sin-cos positions)"
        )
    if rope and head_dim % (2 * len(grid)):
        raise ValueError(
            f"rope: got True with hidden_size/num_heads = {head_dim}, allowed is a multiple of "
            f"{2 * len(grid)}"
        )


def fixed_table(kind: str, grid: Grid, base: Grid, scaling: str, like: Tensor) -> Tensor:
    """`(1, T, D)` computed positions in the dtype and on the device of `like`, `(…, D)`."""
    base = grid if scaling == "extrapolate" else base
    axes = coordinates(grid, base, scaling, like.device)
    return FIXED[kind](axes, base, like.shape[-1]).to(like.dtype).unsqueeze(0)


def initial_table(kind: str, grid: Grid, base: Grid, scaling: str, width: int) -> Tensor:
    """`(1, T, D)` float32 positions for a new model; the published ones to the bit."""
    if kind == "sincos_2d" and grid == base:
        return torch.from_numpy(sincos_2d(width, grid)).float().unsqueeze(0)
    return fixed_table(kind, grid, base, scaling, torch.empty(0, width, device="cpu"))


def resampled(table: Tensor, base: Grid, grid: Grid) -> Tensor:
    """A learned `(1, T, D)` table of the base grid on another: linear along a signal, bicubic and
    antialiased on an image, in float32."""
    if grid == base:
        return table
    image = table.transpose(1, 2).unflatten(2, base).float()
    if len(base) == 1:
        image = F.interpolate(image, size=grid, mode="linear")
    else:
        image = F.interpolate(image, size=grid, mode="bicubic", antialias=True)
    return image.flatten(2).transpose(1, 2).to(table.dtype)


def crossed(rows: Tensor, columns: Tensor) -> Tensor:
    """`(1, H, D)` and `(1, W, D)` as the table `(1, H·W, D)` of their sums."""
    return (rows.unsqueeze(2) + columns.unsqueeze(1)).flatten(1, 2)


class RotaryPositions(nn.Module):
    """The tables (cos, sin) of a grid for `fastdit.ops.attention`, under LightningDiT's names.

    A head's pairs of channels are shared out among the axes; those of an axis turn by
    coordinate·10000^(-i/pairs). Tokens behind the grid's, such as an in-context condition, are not
    turned. The tables stay float32 whatever the model is cast to: 16 bits are too few for angles.
    """

    freqs_cos: Tensor
    freqs_sin: Tensor

    def __init__(self, head_dim: int, grid: Grid, base: Grid, scaling: str) -> None:
        super().__init__()
        self.head_dim, self.scaling = head_dim, scaling
        self.set_grid(grid, base)

    def set_grid(self, grid: Grid, base: Grid, device: torch.device | None = None) -> None:
        """Make `grid` the one whose tables are kept."""
        self.grid, self.base = grid, base
        device = device or torch.get_default_device()
        cos, sin = self._computed(grid, device)
        self.register_buffer("freqs_cos", cos)
        self.register_buffer("freqs_sin", sin)

    def _computed(self, grid: Grid, device: torch.device) -> tuple[Tensor, Tensor]:
        axes = _each(coordinates(grid, self.base, self.scaling, device))
        pairs = self.head_dim // (2 * len(axes))
        angles = torch.cat([_angles(axis, pairs) for axis in axes], dim=1)
        angles = angles.repeat_interleave(2, dim=1)
        return angles.cos().float(), angles.sin().float()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryPositions:
        for name, table in self._buffers.items():
            moved = fn(table)
            self._buffers[name] = moved if moved.dtype == table.dtype else table.to(moved.device)
        return self

    def forward(self, grid: Grid, extra: int = 0) -> tuple[Tensor, Tensor]:
        """The tables `(T + extra, head_dim)` of `grid`."""
        cos, sin = self.freqs_cos, self.freqs_sin
        if grid != self.grid:
            cos, sin = self._computed(grid, cos.device)
        if extra:
            cos, sin = F.pad(cos, (0, 0, 0, extra), value=1.0), F.pad(sin, (0, 0, 0, extra))
        return cos, sin


def add(model: Any) -> None:
    """Give `model` the parameters and tables of its positions.

    Raises:
        ValueError: positions that do not exist on its grid.
    """
    design, width = model.design, model.hidden_size
    model.base_grid = _base_grid(model)
    head_dim = width // model.num_heads
    check_positions(design.positions, design.rope, model.grid, width, head_dim)
    _register(model)
    model.feat_rope = None
    if design.rope:
        scaling = design.position_scaling
        model.feat_rope = RotaryPositions(head_dim, model.grid, model.base_grid, scaling)


def _base_grid(model: Any) -> Grid:
    size = model.design.base_size
    if size is None:
        return model.grid
    return sizes.grid(sizes.resized("base_size", size, model.patch), model.patch)


def _register(model: Any) -> None:
    """The parameters: a fixed table is one of the model's own grid, learned ones of the base's."""
    kind, width, base = model.design.positions, model.hidden_size, model.base_grid
    tokens = {"none": (), "learned_2d": base, "learned_1d": (torch.Size(base).numel(),)}
    own = (torch.Size(model.grid).numel(),)
    names = LEARNED.get(kind, ("pos_embed",))
    for name, count in zip(names, tokens.get(kind, own), strict=kind != "none"):
        table = nn.Parameter(torch.zeros(1, count, width), requires_grad=kind in LEARNED)
        model.register_parameter(name, table)


@torch.no_grad()
def initialize(model: Any) -> None:
    """The values of a new model's positions."""
    kind, scaling = model.design.positions, model.design.position_scaling
    if kind in FIXED:
        table = initial_table(kind, model.grid, model.base_grid, scaling, model.hidden_size)
        model.pos_embed.copy_(table)
    for name in LEARNED.get(kind, ()):
        nn.init.normal_(getattr(model, name), std=0.02)


def resize(model: Any, input_size: int | tuple[int, ...]) -> None:
    """Make `input_size` the model's own: see `DiT.set_input_size`."""
    design, before = model.design, model.config["input_size"]
    size = sizes.resized("input_size", input_size, model.patch)
    base = None
    if design.position_scaling == "interpolate":
        base = before if design.base_size is None else design.base_size
        base = None if sizes.axes("base_size", base, len(size)) == size else base
    model.design = dataclasses.replace(design, base_size=base)
    model.config = {k: v for k, v in model.config.items() if k != "base_size"}
    model.config |= {"input_size": input_size, **model.design.options()}
    model.input_size, model.grid = size, sizes.grid(size, model.patch)
    model.base_grid = _base_grid(model)
    if design.positions in FIXED:
        old, scaling = model.pos_embed, design.position_scaling
        table = initial_table(design.positions, model.grid, model.base_grid, scaling, old.shape[-1])
        model.pos_embed = nn.Parameter(table.to(old), requires_grad=False)
    if model.feat_rope is not None:
        model.feat_rope.set_grid(model.grid, model.base_grid, model.feat_rope.freqs_cos.device)


def table_for(model: Any, grid: Grid) -> Tensor | None:
    """The positions `(1, T, D)` that `model` adds to the tokens of `grid`."""
    kind, base = model.design.positions, model.base_grid
    if kind == "none":
        return None
    if kind == "learned_2d":
        return crossed(
            resampled(model.pos_rows, base[:1], grid[:1]),
            resampled(model.pos_columns, base[1:], grid[1:]),
        )
    if kind == "learned_1d":
        return resampled(model.pos_embed, base, grid)
    if grid == model.grid:
        return model.pos_embed
    return fixed_table(kind, grid, base, model.design.position_scaling, model.pos_embed)
