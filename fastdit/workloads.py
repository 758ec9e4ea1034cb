"""One call of every op at a published model's size: what benchmarks time and models predict.

A call is the schema arguments of `torch.ops.fastdit.<op>`. Its least traffic is each input once in
and each output once out, saved statistics included; attention also does 4·B·N²·D flop forward and
10·B·N²·D backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdit import backends
from fastdit.model import SIZES
from fastdit.ops import _library
from fastdit.testing.counting import count_traffic


@dataclass(frozen=True)
class Workload:
    """One op's call at one size.

    Attributes:
        op: its name in `fastdit.ops`.
        args: schema arguments; tensors that are differentiated require gradients.
        flops: on tensor cores, forward.
    """

    op: str
    args: tuple[Any, ...]
    flops: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the first argument."""
        return tuple(self.args[0].shape)

    @property
    def leaves(self) -> list[Tensor]:
        return [a for a in self.args if isinstance(a, Tensor) and a.requires_grad]

    def forward(self) -> tuple[Tensor, ...]:
        """Run the op with the backend in force; its outputs."""
        out = _library.OPS[self.op](*self.args)
        return (out,) if isinstance(out, Tensor) else tuple(out)

    def least_bytes(self) -> dict[str, int]:
        """Least traffic of the passes: what the op and its gradient take in and give out, once."""
        args = tuple(
            a.detach().to("meta").requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a
            for a in self.args
        )
        with count_traffic() as traffic:
            out = getattr(torch.ops.fastdit, self.op).default(*args)
            outputs = [out] if isinstance(out, Tensor) else list(out)
            outputs = outputs[: _library.OPS[self.op].returns or len(outputs)]
            leaves = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
            if leaves:
                torch.autograd.grad(outputs, leaves, [torch.empty_like(o) for o in outputs])
        names = {"forward": self.op, "backward": f"{self.op}_backward"}
        moved = {key: traffic.bytes(f"fastdit::{name}") for key, name in names.items()}
        return moved if leaves else {"forward": moved["forward"]}


def workloads(
    size: str = "XL",
    batch: int = 32,
    patch: int = 2,
    latent: int = 32,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cuda",
    channels: int = 4,
) -> list[Workload]:
    """A call of every op in a DiT of this size, with random values (none on meta).

    Args:
        size: "S", "B", "L" or "XL".
        batch: samples.
        patch: patch size.
        latent: height and width of the latents.
        dtype: of every tensor but the sampler's table.
        device: where the tensors are.
        channels: of the latents; the model predicts twice as many.

    Raises:
        ValueError: the size is unknown.
    """
    if size not in SIZES:
        raise ValueError(f"size: got {size!r}, allowed are {', '.join(SIZES)}")
    _depth, width, heads = SIZES[size]
    grid, tokens = latent // patch, (latent // patch) ** 2

    def random(*shape: int, grad: bool = True, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, dtype=kind, device=device).requires_grad_(grad)

    def stream() -> Tensor:
        return random(batch, tokens, width)

    shift, scale, gate = (
        part.detach().requires_grad_() for part in random(batch, 6 * width).chunk(6, 1)[:3]
    )
    plain = (None, None, 1e-6, "layer", True)
    no_qk_options = (None, None, None, None, None, 1e-6, None, None, True)
    image = (batch, channels, latent, latent)
    x, weight, bias = random(*image), random(width, channels, patch, patch), random(width)
    pos = random(1, tokens, width, grad=False)
    rows = random(batch, tokens, patch * patch * 2 * channels)
    packed = random(batch, tokens, 2 * int(2 / 3 * 4 * width))
    table = torch.rand((50, 9), device=device)
    step = torch.zeros((), dtype=torch.long, device=device)
    predicted = random(batch, 2 * channels, latent, latent, grad=False)
    latents, noise = random(*image, grad=False), random(*image, grad=False)
    calls = [
        Workload("adaln", (stream(), shift, scale, *plain)),
        Workload("gated_residual", (stream(), stream(), gate)),
        Workload("gated_adaln", (stream(), stream(), gate, shift, scale, *plain)),
        Workload(
            "attention",
            (random(batch, tokens, 3 * width), heads, None, *no_qk_options),
            flops=4 * batch * tokens**2 * width,
        ),
        Workload("bias_gelu", (random(batch, tokens, 4 * width), random(4 * width))),
        Workload("glu", (packed, None, random(packed.shape[-1]), "silu", True)),
        Workload("patch_embed", (x, weight, bias, pos)),
        Workload("unpatchify", (rows, [patch, patch], [grid, grid], 2 * channels)),
        Workload(
            "diffusion_step",
            (latents, predicted, table, step, noise, None, None, True, 0, None, None),
        ),
    ]
    assert {call.op for call in calls} == set(backends.OPS)
    return calls
