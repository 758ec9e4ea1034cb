"""What a layer makes of the condition alone, so that a sampler can compute it before it samples.

A modulated layer regresses the parts of its modulation (`fastdit.designs.MODULATIONS`) from the
condition c: by one `Linear(SiLU(c))`, published as `adaLN_modulation`, or by a two-layer MLP for
each part. A layer's `rows(c)` are all that it reads of c, `rows_width` numbers for a sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastdit.designs import Design


class PartMlps(nn.ModuleDict):
    """A two-layer MLP for each part of a modulation, side by side in its output."""

    def __init__(self, width: int, hidden_size: int, names: Sequence[str]) -> None:
        super().__init__()
        for name in names:
            self[name] = nn.Sequential(
                nn.Linear(width, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
            )

    def forward(self, c: Tensor) -> Tensor:
        """The condition `(B, width)` as `(B, len(names)·D)`."""
        return torch.cat([mlp(c) for mlp in self.values()], dim=1)


class Modulated(nn.Module):
    """A layer whose normalisations the condition may modulate.

    Attributes:
        names: the parts of the modulation, in its output's order.
        adaLN_modulation: the layer that regresses them, or None.
        rows_width: how many numbers of a sample's condition the layer reads.
    """

    def add_modulation(
        self, design: Design, hidden_size: int, names: Sequence[str], sources: int
    ) -> None:
        """Build `adaLN_modulation` for these parts, none for none.

        Args:
            design: its form.
            hidden_size: width of a part.
            names: of the parts.
            sources: embeddings that the condition is made of: the timestep, and perhaps a label.
        """
        self.names, self.rows_width = tuple(names), len(names) * hidden_size
        self.plus_one = design.scale_plus_one
        self.adaLN_modulation = None
        if not names:
            return
        width = hidden_size * (sources if design.condition_fusion == "concat" else 1)
        if design.modulation == "mlp":
            self.adaLN_modulation = PartMlps(width, hidden_size, names)
        else:
            linear = nn.Linear(width, len(names) * hidden_size)
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), linear)

    def rows(self, c: Tensor) -> Tensor | None:
        """`(B, rows_width)` of the condition, None where the layer reads nothing of it."""
        return None if self.adaLN_modulation is None else self.adaLN_modulation(c)

    def initialize_modulation(self) -> None:
        """Zero weights, so that nothing is modulated at first: the gates are closed, and a scale
        to which no 1 is added starts as one."""
        layer = self.adaLN_modulation
        if layer is None:
            return
        lasts = [mlp[-1] for mlp in layer.values()] if isinstance(layer, PartMlps) else [layer[-1]]
        for last in lasts:
            nn.init.zeros_(last.weight)
        start = [float(name.startswith("scale") and not self.plus_one) for name in self.names]
        with torch.no_grad():
            parts = [part for last in lasts for part in last.bias.chunk(len(start) // len(lasts))]
            for part, value in zip(parts, start, strict=True):
                part.fill_(value)
