"""attention: multi-head self-attention on packed projections.

    out = softmax(Q·Kᵀ·scale)·V        for each head, without a mask

`qkv` is the output of one Linear, read in place as strided views; the backward writes one packed
gradient, so that nothing is concatenated. Least traffic: qkv once in, out once out.

Queries and keys can be normalised over each head's channels (QK-norm, which keeps the softmax from
saturating in large models) and rotated by their token's position (RoPE, Su et al. 2021), in that
order: both act on one head of one token and need no more than a look at qkv. The schema op also
returns each row's log of the softmax's denominator, 4 bytes a row and head in float32, from which
the backward recomputes the softmax.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdit import reference
from fastdit.ops import _checks
from fastdit.ops._library import Op, define, gradient_like, present

QK_OPTIONS = (
    "Tensor? q_weight, Tensor? q_bias, Tensor? k_weight, Tensor? k_bias, str? qk_norm, "
    "float qk_eps, Tensor? rope_cos, Tensor? rope_sin, bool rope_interleaved"
)


def _fake(qkv, num_heads, scale, *qk_options):
    batch, tokens, width = qkv.shape
    lse_dtype = torch.promote_types(qkv.dtype, torch.float32)
    lse = qkv.new_empty(batch, num_heads, tokens, dtype=lse_dtype)
    return qkv.new_empty(batch, tokens, width // 3), lse


def _setup_context(ctx, inputs, output):
    qkv, ctx.num_heads, ctx.scale, *affine = inputs[:7]
    ctx.qk_norm, ctx.qk_eps, cos, sin, ctx.interleaved = inputs[7:]
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(qkv, out, lse, *affine, cos, sin)


def _backward(ctx, dout, _dlse):
    qkv, out, lse, *affine, cos, sin = ctx.saved_tensors
    dqkv, *gradients = _attention_backward(
        dout.contiguous(),
        qkv,
        out,
        lse,
        ctx.num_heads,
        ctx.scale,
        *affine,
        ctx.qk_norm,
        ctx.qk_eps,
        cos,
        sin,
        ctx.interleaved,
    )
    return dqkv, None, None, *present(gradients, affine), None, None, None, None, None


_attention_backward = define(
    "attention_backward(Tensor dout, Tensor qkv, Tensor out, Tensor lse, int num_heads, "
    f"float? scale, {QK_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.attention_backward,
    lambda dout, qkv, out, lse, num_heads, scale, *options: gradient_like((qkv, *options[:4]), qkv),
)
_attention = Op(
    f"attention(Tensor qkv, int num_heads, float? scale, {QK_OPTIONS}) -> (Tensor, Tensor)",
    reference=reference.attention,
    saving=reference.attention_saving,
    returns=1,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)


def _affine(qkv, head_dim, qk_norm, **parameters):
    """Check q's and k's weights and biases, `(head_dim,)` each."""
    for name, value in parameters.items():
        if value is None:
            continue
        weight = parameters[name.replace("bias", "weight")]
        if qk_norm is None:
            _checks.fail(name, _checks.described(value), "None, unless qk_norm is given")
        if name.endswith("bias") and (qk_norm == "rms" or weight is None):
            allowed = f"None, unless qk_norm='layer' and {name[0]}_weight is given"
            _checks.fail(name, _checks.described(value), allowed)
        _checks.like(name, value, qkv, (head_dim,))


def _rope_tables(rope, qkv, head_dim):
    """`rope` as its two checked tables."""
    batch, tokens, _width = qkv.shape
    layout = (
        f"(cos, sin), each ({tokens}, {head_dim}) or ({batch}, {tokens}, {head_dim}), floating "
        f"point, on {qkv.device}, without gradient"
    )
    if not isinstance(rope, tuple | list | Tensor) or len(rope) != 2:
        size = f" of {len(rope)}" if isinstance(rope, tuple | list | Tensor) else ""
        _checks.fail("rope", f"{type(rope).__name__}{size}", layout)
    if head_dim % 2:
        _checks.fail("rope", f"tables for head_dim {head_dim}", "an even head_dim")
    for table in rope:
        shapes = ((tokens, head_dim), (batch, tokens, head_dim))
        if (
            not isinstance(table, Tensor)
            or tuple(table.shape) not in shapes
            or not table.is_floating_point()
            or table.device != qkv.device
            or table.requires_grad
        ):
            _checks.fail("rope", _checks.described(table), layout)
    cos, sin = rope
    if cos.shape != sin.shape or cos.dtype != sin.dtype:
        got = f"{_checks.described(cos)} and {_checks.described(sin)}"
        _checks.fail("rope", got, "two tables of one shape and dtype")
    return cos, sin


def _arguments(
    qkv,
    num_heads,
    *,
    scale,
    q_weight,
    q_bias,
    k_weight,
    k_bias,
    qk_norm,
    qk_eps,
    rope,
    rope_interleaved,
):
    _checks.tensor("qkv", qkv, (3,), "(B, N, 3·D)")
    _checks.positive("num_heads", num_heads)
    if qkv.shape[2] == 0 or qkv.shape[2] % (3 * num_heads):
        _checks.fail(
            "qkv", _checks.described(qkv), f"a width divisible by 3·num_heads = {3 * num_heads}"
        )
    head_dim = qkv.shape[2] // (3 * num_heads)
    if qk_norm is not None and qk_norm not in _checks.NORMS:
        _checks.fail("qk_norm", repr(qk_norm), "None, 'layer' or 'rms'")
    if not qk_eps >= 0:
        _checks.fail("qk_eps", repr(qk_eps), "a number >= 0")
    affine = {"q_weight": q_weight, "q_bias": q_bias, "k_weight": k_weight, "k_bias": k_bias}
    dtype = _checks.autocast_dtype(qkv)
    if dtype is not None:
        qkv = qkv.to(dtype)
        affine = {n: t.to(dtype) if isinstance(t, Tensor) else t for n, t in affine.items()}
    _affine(qkv, head_dim, qk_norm, **affine)
    cos, sin = (None, None) if rope is None else _rope_tables(rope, qkv, head_dim)
    return qkv, num_heads, scale, *affine.values(), qk_norm, qk_eps, cos, sin, rope_interleaved


@_attention.public(_arguments)
def attention(
    qkv: Tensor,
    num_heads: int,
    *,
    scale: float | None = None,
    q_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_weight: Tensor | None = None,
    k_bias: Tensor | None = None,
    qk_norm: str | None = None,
    qk_eps: float = 1e-6,
    rope: tuple[Tensor, Tensor] | Tensor | None = None,
    rope_interleaved: bool = True,
) -> Tensor:
    """Non-causal multi-head attention on packed queries, keys and values.

    Args:
        qkv: `(B, N, 3·D)`, the channels ordered (q|k|v, head, head_dim) as timm's and the
            published `attn.qkv` give them. Under autocast it is cast to autocast's dtype.
        num_heads: heads; must divide D.
        scale: factor of QKᵀ; None is 1/√head_dim.
        q_weight, q_bias, k_weight, k_bias: `(head_dim,)`, QK-norm's parameters, in `qkv`'s dtype
            (under autocast cast with it); a bias needs `qk_norm="layer"` and its weight.
        qk_norm: `"layer"` or `"rms"` normalises each query and key over head_dim.
        qk_eps: added to the variance by QK-norm.
        rope: the rotary tables (cos, sin), `(N, head_dim)` each, or `(B, N, head_dim)` where the
            samples' positions differ; also as one stacked tensor. Queries and keys become
            `x·cos + rotate(x)·sin` after QK-norm; a channel with cos 1 and sin 0 stays as it is.
            The tables have no gradient; `fastdit.embeddings.rope_2d` makes those of an image.
        rope_interleaved: what rotate makes of the channels: True pairs 2i with 2i + 1 (EVA,
            LightningDiT, Flux), False pairs i with i + head_dim/2 (GPT-NeoX, Llama).

    Returns:
        `(B, N, D)`, contiguous, in `qkv`'s dtype.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or value, which is named.

    Source: Vaswani et al. 2017, equation 1; QK-norm: Henry et al. 2020, Dehghani et al. 2023;
    RoPE: Su et al. 2021.
    """
    return _attention(
        *_arguments(
            qkv,
            num_heads,
            scale=scale,
            q_weight=q_weight,
            q_bias=q_bias,
            k_weight=k_weight,
            k_bias=k_bias,
            qk_norm=qk_norm,
            qk_eps=qk_eps,
            rope=rope,
            rope_interleaved=rope_interleaved,
        )
    )
