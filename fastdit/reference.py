"""Every op of fastdit in eager PyTorch: the definition that all kernels are held to.

An op's forward is three to six lines of ordinary differentiable PyTorch, rounding where eager
PyTorch rounds. Below each stands `<op>_backward`, its gradient written out in the precision of
float32 or better: what a fused backward computes, and what `torch.ops.fastdit.<op>` runs when no
kernel covers a call. The eager forward needs it never: autograd differentiates it as it stands.

Arguments come checked from `fastdit.ops`; the shapes are described there.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdit import philox

TABLE_COLUMNS = ("a", "b", "cx", "c0", "cp", "sigma", "min_log", "max_log", "guidance")


def per_token(modulation: Tensor) -> Tensor:
    """`(B, D)` as `(B, 1, D)`, so that it broadcasts over tokens; `(B, N, D)` as it is."""
    return modulation.unsqueeze(1) if modulation.dim() == 2 else modulation


def _exact(tensor: Tensor) -> Tensor:
    """`tensor` in at least float32, the precision of every sum in a backward pass."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _reduced_to(gradient: Tensor, like: Tensor | None) -> Tensor:
    """A per-token gradient summed to the shape of `like`; empty where the input was absent."""
    if like is None:
        return gradient.new_empty(0)
    if like.dim() == 2:
        gradient = gradient.sum(1)
    elif like.dim() == 1:
        gradient = gradient.sum((0, 1))
    return gradient.to(like.dtype, copy=True)


# ---- adaln: LN(x)·(1 + scale) + shift -------------------------------------------------------


def adaln(x, shift, scale, weight, bias, eps, norm, plus_one):
    width = x.shape[-1:]
    y = (
        F.layer_norm(x, width, weight, bias, eps)
        if norm == "layer"
        else F.rms_norm(x, width, weight, eps)
    )
    if scale is not None:
        y = y * (1 + per_token(scale) if plus_one else per_token(scale))
    return (y if shift is None else y + per_token(shift)).to(x.dtype)


def adaln_saving(x, shift, scale, weight, bias, eps, norm, plus_one):
    """`adaln`, and the rows' mean and 1/std in float32 or better; no mean for RMS."""
    row = _exact(x)
    mean = row.mean(-1) if norm == "layer" else row.new_empty(0)
    centred = row - mean.unsqueeze(-1) if norm == "layer" else row
    rstd = torch.rsqrt(centred.square().mean(-1) + eps)
    return adaln(x, shift, scale, weight, bias, eps, norm, plus_one), mean, rstd


def adaln_backward(dout, x, mean, rstd, shift, scale, weight, bias, norm, plus_one):
    """With x̂ the normalised row, n = x̂·weight + bias, m = 1 + scale and g = dout·m·weight:
    dx = rstd·(g − mean(g) − x̂·mean(g·x̂)), without mean(g) for RMS."""
    rstd = rstd.unsqueeze(-1)
    centred = _exact(x) - mean.unsqueeze(-1) if norm == "layer" else _exact(x)
    unit, dout = centred * rstd, _exact(dout)
    normed = unit if weight is None else unit * _exact(weight)
    normed = normed if bias is None else normed + _exact(bias)
    m = 1 if scale is None else per_token(_exact(scale)) + (1 if plus_one else 0)
    dnormed = dout * m
    g = dnormed if weight is None else dnormed * _exact(weight)
    dx = g - unit * (g * unit).mean(-1, keepdim=True)
    dx = rstd * (dx - g.mean(-1, keepdim=True) if norm == "layer" else dx)
    return (
        dx.to(x.dtype),
        _reduced_to(dout, shift),
        _reduced_to(dout * normed, scale),
        _reduced_to(dnormed * unit, weight),
        _reduced_to(dnormed, bias),
    )


# ---- gated_residual: x + gate·y --------------------------------------------------------------


def gated_residual(x, y, gate):
    return (x + per_token(gate) * y).to(x.dtype).contiguous()


def gated_residual_backward(dout, y, gate):
    dy = _exact(per_token(gate)) * _exact(dout)
    return dy.to(y.dtype).contiguous(), _reduced_to(_exact(dout) * _exact(y), gate)


# ---- gated_adaln: h = x + gate·y, then adaln(h) ------------------------------------------------


def gated_adaln(x, y, gate, shift, scale, weight, bias, eps, norm, plus_one):
    h = gated_residual(x, y, gate)
    return h, adaln(h, shift, scale, weight, bias, eps, norm, plus_one)


def gated_adaln_saving(x, y, gate, *rest):
    h = gated_residual(x, y, gate)
    return h, *adaln_saving(h, *rest)


def gated_adaln_backward(
    dh, dout, h, mean, rstd, y, gate, shift, scale, weight, bias, norm, plus_one
):
    dnorm, *dmodulation = adaln_backward(
        dout, _exact(h), mean, rstd, shift, scale, weight, bias, norm, plus_one
    )
    dx = _exact(dh) + dnorm
    dy, dgate = gated_residual_backward(dx, y, gate)
    return dx.to(h.dtype, copy=True), dy, dgate, *dmodulation


# ---- attention: softmax(QKᵀ·scale)V on packed qkv, Q and K normalised and rotated if asked ------


def split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Packed `(B, N, 3·H·d)` as three strided views `(B, H, N, d)`; nothing is copied."""
    packed = qkv.unflatten(-1, (3, num_heads, qkv.shape[-1] // (3 * num_heads)))
    return packed.permute(2, 0, 3, 1, 4).unbind(0)


def _per_head(table: Tensor) -> Tensor:
    """A rotary table `(N, d)` or `(B, N, d)` so that it broadcasts over `(B, H, N, d)`."""
    return table if table.dim() == 2 else table.unsqueeze(1)


def rotate(x: Tensor, interleaved: bool) -> Tensor:
    """Each pair (a, b) as (−b, a): channels 2i and 2i + 1, or i and i + d/2."""
    if interleaved:
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([-b, a], -1).flatten(-2)
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


def _prepared(x, weight, bias, norm, eps, cos, sin, interleaved):
    """Queries or keys `(B, H, N, d)` as they enter the product: QK-norm over d, then RoPE."""
    x = x if norm is None else adaln(x, None, None, weight, bias, eps, norm, True)
    if cos is None:
        return x
    return (x * _per_head(cos) + rotate(x, interleaved) * _per_head(sin)).to(x.dtype)


def _prepared_backward(dout, x, weight, bias, norm, eps, cos, sin, interleaved):
    """dx, dweight, dbias: the transposed rotation, then the normalisation's backward."""
    if cos is not None:
        cos, sin = _exact(_per_head(cos)), _exact(_per_head(sin))
        dout = dout * cos - rotate(dout * sin, interleaved)
    if norm is None:
        return dout, dout.new_empty(0), dout.new_empty(0)
    heads = _exact(x).flatten(0, 1)
    _unit, mean, rstd = adaln_saving(heads, None, None, None, None, eps, norm, True)
    dx, _dshift, _dscale, *daffine = adaln_backward(
        dout.flatten(0, 1), heads, mean, rstd, None, None, weight, bias, norm, True
    )
    return dx.view_as(dout), *daffine


def _scores(qkv, num_heads, scale, q_weight, q_bias, k_weight, k_bias, *shared):
    """Q, K, V as attention multiplies them, and the factor of QKᵀ."""
    q, k, v = split_heads(qkv, num_heads)
    q, k = _prepared(q, q_weight, q_bias, *shared), _prepared(k, k_weight, k_bias, *shared)
    return q, k, v, q.shape[-1] ** -0.5 if scale is None else scale


def attention(qkv, num_heads, scale, *qk_options):
    q, k, v, scale = _scores(qkv, num_heads, scale, *qk_options)
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)


def attention_saving(qkv, num_heads, scale, *qk_options):
    """`attention`, and the log of each softmax's denominator, (B, H, N) in float32 or better."""
    q, k, _v, scale = _scores(qkv, num_heads, scale, *qk_options)
    lse = torch.logsumexp(_exact(q) @ _exact(k).mT * scale, -1)
    return attention(qkv, num_heads, scale, *qk_options), lse


def attention_backward(dout, qkv, out, lse, num_heads, scale, *qk_options):
    """With P = exp(QKᵀ·scale − lse), dS = P∘(dO·Vᵀ − rowsum(dO∘O))·scale: (dS·K, dSᵀQ, PᵀdO)."""
    q, k, v, scale = _scores(qkv, num_heads, scale, *qk_options)
    q, k, v = _exact(q), _exact(k), _exact(v)
    dout, out = (_exact(t).unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (dout, out))
    p = torch.exp(q @ k.mT * scale - lse.unsqueeze(-1))
    ds = p * (dout @ v.mT - (dout * out).sum(-1, keepdim=True)) * scale
    raw_q, raw_k, _v = split_heads(qkv, num_heads)
    dq, *dq_affine = _prepared_backward(ds @ k, raw_q, *qk_options[:2], *qk_options[4:])
    dk, *dk_affine = _prepared_backward(ds.mT @ q, raw_k, *qk_options[2:])
    dqkv = torch.stack([dq, dk, p.mT @ dout]).permute(1, 3, 0, 2, 4).flatten(2).to(qkv.dtype)
    return dqkv, *dq_affine, *dk_affine


# ---- bias_gelu: gelu_tanh(x + bias) -------------------------------------------------------------


def bias_gelu(x, bias):
    return F.gelu((x + bias).to(x.dtype).contiguous(), approximate="tanh")


def bias_gelu_backward(dout, x, bias):
    dx = torch.ops.aten.gelu_backward(_exact(dout), _exact(x) + _exact(bias), approximate="tanh")
    dbias = dx.flatten(0, -2).sum(0)
    return dx.to(x.dtype).contiguous(), dbias.to(bias.dtype)


# ---- patch_embed: a convolution whose stride is its kernel, + pos -------------------------------


def patch_embed(x, weight, bias, pos):
    convolve = F.conv2d if x.dim() == 4 else F.conv1d
    tokens = convolve(x, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    return (tokens if pos is None else tokens + pos).contiguous()


def patchify(x: Tensor, patch) -> Tensor:
    """`(B, C, *size)` as rows `(B, T, C·prod(patch))` in a convolution weight's order."""
    axes = range(len(patch))
    sizes = [n for axis in axes for n in (x.shape[2 + axis] // patch[axis], patch[axis])]
    rows = x.reshape(*x.shape[:2], *sizes)
    order = [0, *(2 + 2 * axis for axis in axes), 1, *(3 + 2 * axis for axis in axes)]
    return rows.permute(order).flatten(len(patch) + 1).flatten(1, len(patch))


def patch_embed_backward(dtokens, x, weight, bias, pos, output_mask):
    patch, grad = weight.shape[2:], _exact(dtokens)
    grid = [size // p for size, p in zip(x.shape[2:], patch, strict=True)]
    flat = _exact(weight).flatten(1)
    absent = [grad.new_empty(0) for _ in range(4)]
    if output_mask[0]:
        rows = (grad @ flat).unflatten(-1, (weight.shape[1], -1)).mT.flatten(-2)
        absent[0] = unpatchify(rows, patch, grid, weight.shape[1]).to(x.dtype)
    if output_mask[1]:
        dweight = torch.einsum("btd,btk->dk", grad, patchify(_exact(x), patch))
        absent[1] = dweight.reshape(weight.shape).to(weight.dtype)
    if output_mask[2]:
        absent[2] = grad.sum((0, 1)).to(bias.dtype)
    if output_mask[3]:
        absent[3] = grad.sum(0).reshape(pos.shape).to(pos.dtype)
    return tuple(absent)


# ---- unpatchify: token rows in (*patch, c) order back to an image --------------------------------


def unpatchify(tokens, patch, grid, channels):
    dims = len(patch)
    rows = tokens.reshape(tokens.shape[0], *grid, *patch, channels)
    order = [0, 2 * dims + 1, *(axis for i in range(dims) for axis in (1 + i, 1 + dims + i))]
    size = [g * p for g, p in zip(grid, patch, strict=True)]
    image = rows.permute(order).clone(memory_format=torch.contiguous_format)
    return image.view(tokens.shape[0], channels, *size)


def unpatchify_backward(dimage, patch, grid, channels):
    rows = patchify(dimage, patch).unflatten(-1, (channels, -1)).mT
    return rows.clone(memory_format=torch.contiguous_format).flatten(-2)


# ---- diffusion_step: one row of a sampler's table ------------------------------------------------


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
