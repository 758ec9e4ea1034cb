"""One representative call of every op and option, as schema arguments of `torch.ops.fastdit.*`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

B, N, D = 2, 7, 24


def random(*shape: int, dtype: torch.dtype, seed: int, grad: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
    return tensor.requires_grad_(grad)


def chunks(count: int, dtype: torch.dtype, per_token: bool = False) -> tuple[Tensor, ...]:
    """Modulation as a model makes it: strided views of one projection."""
    shape = (B, N, count * D) if per_token else (B, count * D)
    leaf = random(*shape, dtype=dtype, seed=9)
    return tuple(leaf.detach().chunk(count, -1)[i].requires_grad_() for i in range(count))


def step_table(rows: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    table = random(rows, 9, dtype=dtype, seed=4, grad=False).abs() + 0.1
    table[:, 6:8] = -table[:, 6:8]
    return table


def cases(dtype: torch.dtype = torch.float32) -> Iterator[tuple[str, str, tuple]]:
    """`(op, what is special, schema arguments)`; floating-point inputs require gradients."""
    x, y = random(B, N, D, dtype=dtype, seed=0), random(B, N, D, dtype=dtype, seed=1)
    shift, scale, gate = chunks(3, dtype)
    token_shift, token_scale, token_gate = chunks(3, dtype, per_token=True)
    weight, bias = random(D, dtype=dtype, seed=2), random(D, dtype=dtype, seed=3)
    plain = (None, None, 1e-6, "layer", True)
    yield "adaln", "per sample", (x, shift, scale, *plain)
    yield "adaln", "per token", (x, token_shift, token_scale, *plain)
    yield "adaln", "no modulation", (x, None, None, *plain)
    yield "adaln", "affine, no plus one", (x, shift, scale, weight, bias, 1e-5, "layer", False)
    yield "adaln", "rms", (x, None, scale, weight, None, 1e-6, "rms", True)
    yield "gated_residual", "per sample", (x, y, gate)
    yield "gated_residual", "per token", (x, y, token_gate)
    yield "gated_adaln", "per sample", (x, y, gate, shift, scale, *plain)
    yield "gated_adaln", "per token", (x, y, token_gate, token_shift, token_scale, *plain)
    affine = (weight, bias, 1e-5, "layer", False)
    yield "gated_adaln", "affine, no plus one", (x, y, gate, shift, scale, *affine)
    yield "gated_adaln", "rms", (x, y, gate, None, scale, weight, None, 1e-6, "rms", True)
    qkv = random(B, N, 3 * D, dtype=dtype, seed=5)
    yield from _attention_cases(qkv, dtype)
    yield "bias_gelu", "tokens", (x, bias)
    gate, up = random(B, N, D, dtype=dtype, seed=10), random(B, N, D, dtype=dtype, seed=11)
    packed, both = random(B, N, 2 * D, dtype=dtype, seed=10), random(2 * D, dtype=dtype, seed=11)
    yield "glu", "swiglu", (packed, None, both, "silu", True)
    yield "glu", "geglu, value first", (packed, None, both, "gelu", False)
    yield "glu", "tanh, no bias", (packed, None, None, "gelu_tanh", True)
    yield "glu", "two projections", (gate, up, None, "silu", True)
    image, pos = random(B, 3, 4, 6, dtype=dtype, seed=6), random(1, 6, D, dtype=dtype, seed=7)
    kernel = random(D, 3, 2, 2, dtype=dtype, seed=8)
    yield "patch_embed", "positions", (image, kernel, bias, pos)
    yield "patch_embed", "bare", (image, kernel, None, None)
    signal, kernel_1d = random(B, 3, 12, dtype=dtype, seed=6), random(D, 3, 4, dtype=dtype, seed=8)
    yield "patch_embed", "signal", (signal, kernel_1d, bias, None)
    yield "unpatchify", "image", (random(B, 6, 24, dtype=dtype, seed=0), [2, 4], [3, 2], 3)
    yield "unpatchify", "signal", (random(B, 6, 12, dtype=dtype, seed=0), [4], [6], 3)
    yield from _step_cases(dtype)


def _attention_cases(qkv: Tensor, dtype: torch.dtype) -> Iterator[tuple[str, str, tuple]]:
    """Heads of 8 and 12 channels."""
    absent = (None, None, None, None)
    yield "attention", "two heads", (qkv, 2, None, *absent, None, 1e-6, None, None, True)
    yield "attention", "scale", (qkv, 3, 0.5, *absent, None, 1e-6, None, None, True)
    yield "attention", "layer norm", (qkv, 2, None, *absent, "layer", 1e-6, None, None, True)
    affine = tuple(random(12, dtype=dtype, seed=seed) for seed in (20, 21, 22, 23))
    exact = torch.promote_types(dtype, torch.float32)
    tables = tuple(random(N, 12, dtype=exact, seed=seed, grad=False) for seed in (24, 25))
    # Without positions the key's bias would shift all scores of a query alike: no gradient.
    yield "attention", "layer norm, rope", (qkv, 2, None, *affine, "layer", 1e-5, *tables, True)
    yield "attention", "rope in halves", (qkv, 2, None, *absent, None, 1e-6, *tables, False)
    weights = (random(8, dtype=dtype, seed=20), None, random(8, dtype=dtype, seed=22), None)
    per_sample = tuple(random(B, N, 8, dtype=exact, seed=s, grad=False) for s in (24, 25))
    yield "attention", "rms, rope", (qkv, 3, 0.3, *weights, "rms", 1e-6, *per_sample, True)


def _step_cases(dtype: torch.dtype) -> Iterator[tuple[str, str, tuple]]:
    table = step_table(dtype=torch.promote_types(dtype, torch.float32))
    step, steps = torch.tensor(2), torch.tensor([3, 1])
    x, noise, previous = (random(B, 4, 5, 3, dtype=dtype, seed=seed) for seed in (0, 1, 2))
    image, before = (random(B, 4, 2, 6, dtype=dtype, seed=seed) for seed in (0, 2))
    plain, ranged = (random(B, c, 5, 3, dtype=dtype, seed=3) for c in (4, 8))
    halves = random(2 * B, 8, 5, 3, dtype=dtype, seed=3)
    rows = random(2 * B, 2, 6 * 8, dtype=dtype, seed=3)
    signal, signal_rows = (random(B, *s, dtype=dtype, seed=5) for s in ((2, 6), (3, 4)))
    seed, seeds = torch.tensor(7), torch.tensor([2**40 + 1, -3])
    for special, args in {
        "plain": (x, plain, table, step, None, None, None, False, 0, None, None),
        "noise": (x, plain, table, steps, noise, None, 1.0, False, 0, None, None),
        "learned": (x, ranged, table, step, noise, previous, 0.7, True, 0, None, None),
        "guided": (x, halves, table, steps, noise, None, None, True, 3, None, None),
        "guided sigma": (x, halves, table, step, noise, None, 1.0, True, 8, None, None),
        "seed": (x, ranged, table, steps, None, None, 1.0, True, 0, seed, None),
        "tokens": (image, rows, table, step, None, before, 1.0, True, 3, seeds, [2, 3]),
        "signal": (signal, signal_rows, table, step, None, None, None, False, 0, seed, [2]),
    }.items():
        yield "diffusion_step", special, args


def case_ids() -> list[str]:
    return [f"{op}: {special}" for op, special, _args in cases()]
