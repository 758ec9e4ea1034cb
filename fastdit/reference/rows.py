"""adaln, gated_residual and gated_adaln."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastdit.reference.precision import exact, per_token, reduced_to

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
    row = exact(x)
    mean = row.mean(-1) if norm == "layer" else row.new_empty(0)
    centred = row - mean.unsqueeze(-1) if norm == "layer" else row
    rstd = torch.rsqrt(centred.square().mean(-1) + eps)
    return adaln(x, shift, scale, weight, bias, eps, norm, plus_one), mean, rstd


def adaln_backward(dout, x, mean, rstd, shift, scale, weight, bias, norm, plus_one):
    """With x̂ the normalised row, n = x̂·weight + bias, m = 1 + scale and g = dout·m·weight:
    dx = rstd·(g − mean(g) − x̂·mean(g·x̂)), without mean(g) for RMS."""
    rstd = rstd.unsqueeze(-1)
    centred = exact(x) - mean.unsqueeze(-1) if norm == "layer" else exact(x)
    unit, dout = centred * rstd, exact(dout)
    normed = unit if weight is None else unit * exact(weight)
    normed = normed if bias is None else normed + exact(bias)
    m = 1 if scale is None else per_token(exact(scale)) + (1 if plus_one else 0)
    dnormed = dout * m
    g = dnormed if weight is None else dnormed * exact(weight)
    dx = g - unit * (g * unit).mean(-1, keepdim=True)
    dx = rstd * (dx - g.mean(-1, keepdim=True) if norm == "layer" else dx)
    return (
        dx.to(x.dtype),
        reduced_to(dout, shift),
        reduced_to(dout * normed, scale),
        reduced_to(dnormed * unit, weight),
        reduced_to(dnormed, bias),
    )


# ---- gated_residual: x + gate·y --------------------------------------------------------------


def gated_residual(x, y, gate):
    return (x + per_token(gate) * y).to(x.dtype).contiguous()


def gated_residual_backward(dout, y, gate):
    dy = exact(per_token(gate)) * exact(dout)
    return dy.to(y.dtype).contiguous(), reduced_to(exact(dout) * exact(y), gate)


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
        dout, exact(h), mean, rstd, shift, scale, weight, bias, norm, plus_one
    )
    dx = exact(dh) + dnorm
    dy, dgate = gated_residual_backward(dx, y, gate)
    return dx.to(h.dtype, copy=True), dy, dgate, *dmodulation
