"""The backward of `adaln` and `gated_adaln` in one pass over the rows.

With x̂ the normalised row, n = x̂·weight + bias, m = 1 + scale and g = dout·m·weight:

    dx = rstd·(g − mean(g) − x̂·mean(g·x̂))  (+ dh),    dy = gate·dx
    dshift = Σ dout,  dscale = Σ dout·n,  dgate = Σ dx·y         over a sample's tokens
    dweight = Σ dout·m·x̂,  dbias = Σ dout·m                      over all rows

x̂ comes from the mean and rstd that the forward saved, so that both means of a row are summed
behind one barrier. Bytes: dout and x in, dx out; with a gate also dh and y in, dy out.

**Sums over tokens.** A program owns the tokens slot, slot + slots, … of one sample, keeps its sums
in registers and leaves them to `slot_sums`. Two sums serve all four of the modulation's gradients,
because m, weight and bias are the same for all tokens:

    U = Σ dout,  V = Σ dout·x̂:   dshift = U,  dscale = V·weight + U·bias,
                                 dweight = Σ m·V,  dbias = Σ m·U     over the samples

With a scale per token U and V are of dout·m, and a dshift per sample takes a sum of its own.
Gradients of per-token modulation are no sums: they are written row by row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdit.kernels import rows, slot_sums
from fastdit.kernels.launch import on_device
from fastdit.kernels.rows import Tile, fold, load, load_view, store, totals, zeros
from fastdit.kernels.slot_sums import store_partial

ADALN = rows.Backward(columns=12, half=80, full=80)
# 384 and 768 are padded here: 8 + 4 columns a thread take 128 registers, 8 of them 96. With 80 some
# spill on sm_100, also where modulation is read again for every row.
GATED_ADALN = rows.Backward(columns=9, half=96, full=80)
# A scale per token beside a shift per sample: one more sum.
MORE_SUMS = rows.Backward(columns=9, half=128, full=112)


@triton.jit
def factor(
    scale, weight_ptr, sample, token,
    START: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, PLUS_ONE: tl.constexpr,
):  # fmt: skip
    """A part of (1 + scale)·weight, without what is absent."""
    factor = 1.0
    if scale is not None:
        factor = load_view(scale, sample, token, START, SIZE, D)
        if PLUS_ONE:
            factor += 1.0
    if weight_ptr is not None:
        factor *= load(weight_ptr, START, SIZE, D)
    return factor


@triton.jit
def through_norm(
    g_main, g_tail, unit_main, unit_tail, rstd,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, LAYER: tl.constexpr,
):  # fmt: skip
    """The gradient of the row from that of its normalised form."""
    if LAYER:
        along, level = totals(
            g_main * unit_main, g_tail * unit_tail, g_main, g_tail, MAIN, TAIL
        )  # fmt: skip
        g_main, g_tail = g_main - level / D, g_tail - level / D
    else:
        along = tl.sum(fold(g_main * unit_main, g_tail * unit_tail, MAIN, TAIL), 0)
    along /= D
    return (g_main - unit_main * along) * rstd, (g_tail - unit_tail * along) * rstd


@triton.jit
def token_gradients(
    dout, unit, scale, weight_ptr, bias_ptr, dshift_ptr, dscale_ptr, start,
    START: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Write a part of the gradients of per-token modulation."""
    if dshift_ptr is not None:
        store(dshift_ptr + start, dout, START, SIZE, D)
    if dscale_ptr is not None:
        normed = unit
        if weight_ptr is not None:
            normed *= load(weight_ptr, START, SIZE, D)
        if bias_ptr is not None:
            normed += load(bias_ptr, START, SIZE, D)
        store(dscale_ptr + start, dout * normed, START, SIZE, D)


@triton.jit(do_not_specialize=["tokens", "slots"])
def row_gradients_kernel(
    dout_ptr, x_ptr, mean_ptr, rstd_ptr, scale, weight_ptr, bias_ptr, dh_ptr, y_ptr, gate,
    dx_ptr, dy_ptr, token_dgate_ptr, token_dshift_ptr, token_dscale_ptr,
    u_ptr, v_ptr, dshift_ptr, dgate_ptr, tokens, slots,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    LAYER: tl.constexpr, PLUS_ONE: tl.constexpr, SCALE_PER_TOKEN: tl.constexpr,
    GATE_PER_TOKEN: tl.constexpr,
):  # fmt: skip
    sample, slot = tl.program_id(0) // slots, tl.program_id(0) % slots
    u_main, u_tail, v_main, v_tail = zeros(MAIN), zeros(TAIL), zeros(MAIN), zeros(TAIL)
    dshift_main, dshift_tail = zeros(MAIN), zeros(TAIL)
    dgate_main, dgate_tail = zeros(MAIN), zeros(TAIL)
    factor_main, factor_tail, gate_main, gate_tail = 1.0, 1.0, 1.0, 1.0  # those per token
    if not SCALE_PER_TOKEN:
        factor_main = factor(scale, weight_ptr, sample, slot, 0, MAIN, D, PLUS_ONE)
        factor_tail = factor(scale, weight_ptr, sample, slot, MAIN, TAIL, D, PLUS_ONE)
    if gate is not None and not GATE_PER_TOKEN:
        gate_main = load_view(gate, sample, slot, 0, MAIN, D)
        gate_tail = load_view(gate, sample, slot, MAIN, TAIL, D)
    for token in range(slot, tokens, slots):
        row = sample * tokens + token
        start = row.to(tl.int64) * D
        dout_main = load(dout_ptr + start, 0, MAIN, D)
        dout_tail = load(dout_ptr + start, MAIN, TAIL, D)
        if dh_ptr is not None:
            dh_main = load(dh_ptr + start, 0, MAIN, D)
            dh_tail = load(dh_ptr + start, MAIN, TAIL, D)
        rstd = tl.load(rstd_ptr + row)
        mean = tl.load(mean_ptr + row) if LAYER else 0.0
        unit_main = (load(x_ptr + start, 0, MAIN, D) - mean) * rstd
        unit_tail = (load(x_ptr + start, MAIN, TAIL, D) - mean) * rstd
        du_main, du_tail = dout_main, dout_tail
        g_main, g_tail = dout_main * factor_main, dout_tail * factor_tail
        if SCALE_PER_TOKEN:
            du_main *= factor(scale, None, sample, token, 0, MAIN, D, PLUS_ONE)
            du_tail *= factor(scale, None, sample, token, MAIN, TAIL, D, PLUS_ONE)
            g_main *= factor(scale, weight_ptr, sample, token, 0, MAIN, D, PLUS_ONE)
            g_tail *= factor(scale, weight_ptr, sample, token, MAIN, TAIL, D, PLUS_ONE)
        u_main, u_tail = u_main + du_main, u_tail + du_tail
        v_main, v_tail = v_main + du_main * unit_main, v_tail + du_tail * unit_tail
        dshift_main, dshift_tail = dshift_main + dout_main, dshift_tail + dout_tail
        dx_main, dx_tail = through_norm(
            g_main, g_tail, unit_main, unit_tail, rstd, D, MAIN, TAIL, LAYER
        )
        if dh_ptr is not None:
            dx_main, dx_tail = dx_main + dh_main, dx_tail + dh_tail
        store(dx_ptr + start, dx_main, 0, MAIN, D)
        store(dx_ptr + start, dx_tail, MAIN, TAIL, D)
        if gate is not None:
            dy_main, dy_tail = gate_main * dx_main, gate_tail * dx_tail
            if GATE_PER_TOKEN:
                dy_main *= load_view(gate, sample, token, 0, MAIN, D)
                dy_tail *= load_view(gate, sample, token, MAIN, TAIL, D)
            y_main = load(y_ptr + start, 0, MAIN, D)
            y_tail = load(y_ptr + start, MAIN, TAIL, D)
            store(dy_ptr + start, dy_main, 0, MAIN, D)
            store(dy_ptr + start, dy_tail, MAIN, TAIL, D)
            if GATE_PER_TOKEN:
                store(token_dgate_ptr + start, dx_main * y_main, 0, MAIN, D)
                store(token_dgate_ptr + start, dx_tail * y_tail, MAIN, TAIL, D)
            else:
                dgate_main += dx_main * y_main
                dgate_tail += dx_tail * y_tail
        token_gradients(
            dout_main, unit_main, scale, weight_ptr, bias_ptr, token_dshift_ptr, token_dscale_ptr,
            start, 0, MAIN, D,
        )  # fmt: skip
        token_gradients(
            dout_tail, unit_tail, scale, weight_ptr, bias_ptr, token_dshift_ptr, token_dscale_ptr,
            start, MAIN, TAIL, D,
        )  # fmt: skip
    store_partial(u_ptr, u_main, u_tail, D, MAIN, TAIL)
    store_partial(v_ptr, v_main, v_tail, D, MAIN, TAIL)
    store_partial(dshift_ptr, dshift_main, dshift_tail, D, MAIN, TAIL)
    store_partial(dgate_ptr, dgate_main, dgate_tail, D, MAIN, TAIL)


def row_gradients(
    dout, x, mean, rstd, shift, scale, weight, bias, norm, plus_one, *, dh=None, y=None, gate=None
) -> tuple[Tensor, ...]:
    """The gradients of x, y, gate, shift, scale, weight and bias; empty where the input is absent.

    Reads dout, x and, with a gate, dh and y, each once; writes dx, dy once. Tensors that are not
    contiguous are copied first.
    """
    dout, x = dout.contiguous(), x.contiguous()
    dh = None if dh is None else dh.contiguous()
    y = None if y is None else y.contiguous()
    if x.numel() == 0:
        gradients = [_like(t, torch.zeros) for t in (x, y, gate, shift, scale, weight, bias)]
    else:
        gradients = [_like(t, torch.empty) for t in (x, y, gate, shift, scale)]
        with on_device(x):
            gradients += _launch(
                dout, x, mean, rstd, scale, weight, bias, norm, plus_one, dh, y, gate, *gradients
            )
    return tuple(x.new_empty(0) if t is None else t for t in gradients)


def _like(tensor: Tensor | None, make) -> Tensor | None:
    """A contiguous tensor like `tensor`, made by `torch.empty` or `torch.zeros`."""
    if tensor is None:
        return None
    return make(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def _launch(
    dout, x, mean, rstd, scale, weight, bias, norm, plus_one, dh, y, gate,
    dx, dy, dgate, dshift, dscale,
):  # fmt: skip
    """Fill in the gradients dx to dscale; return those of weight and bias."""
    token_dgate, sample_dgate = _by_kind(dgate)
    token_dshift, sample_dshift = _by_kind(dshift)
    token_dscale, sample_dscale = _by_kind(dscale)
    scale_per_token = token_dscale is not None
    limits = ADALN if gate is None else GATED_ADALN
    if scale_per_token and sample_dshift is not None:
        limits = MORE_SUMS
    wanted = {
        "u": bias is not None or (sample_dshift is not None and not scale_per_token),
        "v": weight is not None or sample_dscale is not None,
        "dshift": sample_dshift is not None and scale_per_token,
        "dgate": sample_dgate is not None,
    }

    def run(tile: Tile) -> tuple[Tensor | None, Tensor | None]:
        slots = slot_sums.slots_for(x, tile)
        partials = slot_sums.Partials.empty(x, slots, **wanted)
        row_gradients_kernel[(x.shape[0] * slots,)](
            dout, x, mean, rstd, rows.view(scale), weight, bias, dh, y, rows.view(gate),
            dx, dy, token_dgate, token_dshift, token_dscale,
            partials.u, partials.v, partials.dshift, partials.dgate, x.shape[1], slots,
            x.shape[2], tile.main, tile.tail, norm == "layer", plus_one, scale_per_token,
            token_dgate is not None, **tile.options,
        )  # fmt: skip
        return slot_sums.finish(
            partials, scale=None if scale_per_token else scale, weight=weight, bias=bias,
            plus_one=plus_one, dshift=sample_dshift, dscale=sample_dscale, dgate=sample_dgate,
        )  # fmt: skip

    op = "adaln_backward" if gate is None else "gated_adaln_backward"
    return rows.launch(op, x, rows.backward_tile(x, limits), run, norm, *wanted.values())


def _by_kind(gradient: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """A gradient of modulation as (per token, per sample); the other is None."""
    per_token = gradient is not None and gradient.dim() == 3
    return (gradient, None) if per_token else (None, gradient)
