"""diffusion_step: one row of a sampler's table."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdit import philox
from fastdit.reference.tokens import unpatchify, unpatchify_backward

TABLE_COLUMNS = ("a", "b", "cx", "c0", "cp", "sigma", "min_log", "max_log", "guidance")


def _step_row(table: Tensor, step: Tensor, like: Tensor) -> dict[str, Tensor]:
    """The coefficients of `step`, each broadcastable against `like`, without a host sync."""
    dtype = torch.promote_types(like.dtype, table.dtype)
    row = table.to(dtype).index_select(0, step.reshape(-1))
    row = row.reshape(-1, len(TABLE_COLUMNS), *[1] * (like.dim() - 1))
    return dict(zip(TABLE_COLUMNS, row.unbind(1), strict=True))


def guide(model_output: Tensor, guidance, guided_channels: int) -> Tensor:
    """Classifier-free guidance u + s·(c − u) on the first channels of a `[cond, null]` batch;
    the other channels stay those of the conditional half."""
    cond, null = model_output.chunk(2)
    null = null[:, :guided_channels]
    guided = null + guidance * (cond[:, :guided_channels] - null)
    return torch.cat([guided, cond[:, guided_channels:]], 1)


def _step_sigma(row: dict[str, Tensor], output: Tensor, channels: int, learned_range: bool):
    if not learned_range:
        return row["sigma"]
    f = (output[:, channels:] + 1) / 2
    return row["sigma"] * torch.exp(0.5 * (f * row["max_log"] + (1 - f) * row["min_log"]))


def _step_output(x: Tensor, model_output: Tensor, patch) -> Tensor:
    """The model's output in the layout of `x`."""
    if patch is None:
        return model_output
    grid = [size // p for size, p in zip(x.shape[2:], patch, strict=True)]
    return unpatchify(model_output, patch, grid, model_output.shape[-1] // math.prod(patch))


def _step_noise(x: Tensor, table: Tensor, step: Tensor, noise, seed):
    if seed is None:
        return noise
    return philox.normal(seed, step, x.shape).to(torch.promote_types(x.dtype, table.dtype))


def diffusion_step(
    x,
    model_output,
    table,
    step,
    noise,
    x0_previous,
    clip,
    learned_range,
    guided_channels,
    seed=None,
    patch=None,
):
    row, channels = _step_row(table, step, x), x.shape[1]
    output, noise = _step_output(x, model_output, patch), _step_noise(x, table, step, noise, seed)
    output = guide(output, row["guidance"], guided_channels) if guided_channels else output
    x0 = row["a"] * x + row["b"] * output[:, :channels]
    x0 = x0 if clip is None else x0.clamp(-clip, clip)
    out = row["cx"] * x + row["c0"] * x0
    if x0_previous is not None:
        out = out + row["cp"] * x0_previous
    if noise is not None:
        out = out + _step_sigma(row, output, channels, learned_range) * noise
    return out.to(x.dtype).contiguous(), x0.to(x.dtype).contiguous()


def diffusion_step_backward(
    dout,
    dx0,
    x,
    model_output,
    table,
    step,
    noise,
    x0_previous,
    clip,
    learned_range,
    guided_channels,
    seed=None,
    patch=None,
):
    row, channels = _step_row(table, step, x), x.shape[1]
    like = torch.promote_types(x.dtype, table.dtype)
    z = _step_noise(x, table, step, noise, seed)
    dout, dx0, output = dout.to(like), dx0.to(like), _step_output(x, model_output, patch).to(like)
    output = guide(output, row["guidance"], guided_channels) if guided_channels else output
    dx0 = dx0 + row["c0"] * dout
    if clip is not None:
        inside = (row["a"] * x + row["b"] * output[:, :channels]).abs() <= clip
        dx0 = torch.where(inside, dx0, 0)
    doutput = torch.zeros_like(output)
    doutput[:, :channels] = row["b"] * dx0
    dnoise = dprevious = dout.new_empty(0)
    if z is not None:
        sigma = _step_sigma(row, output, channels, learned_range)
        dnoise = (sigma * dout).to(noise.dtype) if noise is not None else dnoise
        if learned_range:
            doutput[:, channels:] = dout * z * sigma * (row["max_log"] - row["min_log"]) / 4
    if x0_previous is not None:
        dprevious = (row["cp"] * dout).to(x0_previous.dtype)
    if guided_channels:
        guided, s = doutput[:, :guided_channels], row["guidance"]
        null = torch.zeros_like(doutput)
        null[:, :guided_channels] = (1 - s) * guided
        cond = torch.cat([s * guided, doutput[:, guided_channels:]], 1)
        doutput = torch.cat([cond, null])
    if patch is not None:
        doutput = unpatchify_backward(doutput, patch, None, doutput.shape[1])
    dx = row["cx"] * dout + row["a"] * dx0
    return dx.to(x.dtype), doutput.to(model_output.dtype), dnoise, dprevious.clone()
