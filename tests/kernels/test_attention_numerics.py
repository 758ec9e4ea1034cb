"""The Triton attention kernels in the interpreter: numbers, traffic, bounds, bit equality."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_cases import (
    BF16,
    FP16,
    FP32,
    Call,
    Case,
    eager,
    errors,
    exact_lse,
    fused,
    make,
    rms,
)

from fastdit.kernels import attention as forward
from fastdit.kernels import attention_backward as backward
from fastdit.kernels import qk_norm_rope
from fastdit.kernels.attention_tiles import HEAD_DIMS, parts_of
from fastdit.testing import VirtualGPU

LSE = {FP32: 1e-6, FP16: 2e-3, BF16: 2e-2}  # absolute, where q and k are rounded once more
CASES = [
    # Every number of parts and tails; N odd, 1, and no multiple of any block.
    Case(16, 3, 130, BF16),
    Case(24, 2, 37, FP16),
    Case(40, 1, 70, BF16, batch=2),
    Case(64, 2, 128, FP16),
    Case(72, 2, 150, BF16),
    Case(72, 1, 65, FP16, batch=2, strided=True),
    Case(72, 2, 33, FP32),
    Case(80, 1, 67, BF16, scale=0.3),
    Case(96, 1, 64, FP16),
    Case(104, 1, 45, FP32),
    Case(112, 1, 81, BF16),
    Case(128, 1, 66, BF16, strided=True),
    Case(72, 3, 1, BF16, batch=3),
    Case(64, 2, 1, FP32),
    Case(40, 1, 37, FP16, scale=-0.3),
    Case(16, 1, 37, FP32, scale=-0.5),
    Case(16, 1, 37, BF16, scale=0.0),
    # QK-norm and RoPE.
    Case(72, 1, 37, BF16, batch=2, qk_norm="layer", affine=True, rope="adjacent"),
    Case(64, 2, 70, FP16, qk_norm="rms", affine=True, strided=True),
    Case(40, 2, 25, FP32, batch=2, qk_norm="layer", affine=True, rope="per sample"),
    Case(72, 1, 67, BF16, qk_norm="rms", affine=True, rope="halves", batch=2),
    Case(24, 2, 37, FP16, rope="halves", strided=True),
    Case(16, 2, 33, FP32, qk_norm="layer"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_errors_are_at_most_those_of_eager(case):
    """Errors against float64, root mean square and largest: at most 1.25 times eager's.

    A parameter's gradient has as few elements as a head has channels: four draws of them. The
    largest error of few elements in float32 is the luck of its order: two units are let pass.
    """
    ours: dict[str, float] = {}
    theirs: dict[str, float] = {}
    our_largest: dict[str, float] = {}
    their_largest: dict[str, float] = {}
    for seed in range(4 if case.affine else 1):
        call = make(case, seed)
        exact = eager(call.in_dtype(torch.float64))
        with VirtualGPU("sm_80"):  # raises where a program leaves its bounds or two meet
            results = fused(call)
        for run, total, largest in (
            (results, ours, our_largest),
            (eager(call), theirs, their_largest),
        ):
            for name, error in errors(run, exact).items():
                total[name] = total.get(name, 0) + error**2
                worst = (run[name].double() - exact[name]).abs().max().item()
                largest[name] = max(largest.get(name, 0), worst)
        assert (
            rms(results["lse"] - exact_lse(call)) <= 4e-7 * rms(exact_lse(call)) + LSE[case.dtype]
        )
    for name in ours:
        if rms(exact[name]) < 1e-12:  # of one token: differences of two equal sums in float32
            assert ours[name] <= 1e-6**2
        else:
            assert ours[name] <= 1.25**2 * theirs[name], name
            units = 2 * torch.finfo(FP32).eps * exact[name].abs().max().item()
            assert our_largest[name] <= 1.25 * their_largest[name] + units, name


@pytest.mark.parametrize("tokens", [30, 150])
@pytest.mark.parametrize("arch", ["sm_90", "sm_100", "sm_120", "gfx942"])
def test_tiles_of_every_architecture(arch, tokens):
    call = make(Case(72, 1, tokens, BF16))
    exact = eager(call.in_dtype(torch.float64))
    with VirtualGPU(arch):
        ours = errors(fused(call), exact)
    theirs = errors(eager(call), exact)
    for name in ours:
        assert ours[name] <= 1.25 * theirs[name], name


def test_parts_cover_a_head_with_the_least_columns():
    for head_dim in HEAD_DIMS:
        parts = parts_of(head_dim)
        least = -(-head_dim // 16) * 16
        assert sum(width for _start, width in parts) == least
        assert [start for start, _ in parts] == [
            sum(w for _, w in parts[:i]) for i in range(len(parts))
        ]
        assert all(width & (width - 1) == 0 for _start, width in parts)
    assert parts_of(72) == ((0, 64), (64, 16))
    assert parts_of(104) == ((0, 64), (64, 32), (96, 16))


def launches(call: Call) -> dict[str, list]:
    with VirtualGPU("sm_80") as gpu:
        fused(call)
    found: dict[str, list] = {}
    for launch in gpu.launches:
        found.setdefault(launch.name, []).append(launch.trace)
    return found


@pytest.mark.parametrize("tokens", [128, 150])
def test_traffic_is_the_algorithms(tokens):
    """The tile that a program owns once; those it walks over once a program; every store once."""
    case = Case(72, 2, tokens, BF16, strided=True)
    call = make(case)
    found = launches(call)
    rows = case.heads * case.tokens
    head, row = rows * case.head_dim * 2, rows * 4
    tile = forward.FORWARD["sm_80"][0]
    programs = -(-case.tokens // tile.block_m)
    (trace,) = found["attention_kernel"]
    assert trace.loaded == {"q_ptr": head, "k_ptr": programs * head, "v_ptr": programs * head}
    assert trace.unique_loaded == {"q_ptr": head, "k_ptr": head, "v_ptr": head}
    assert trace.stored == {"out_ptr": head, "lse_ptr": row}
    tile = backward.DQ["sm_80"][0]
    programs = -(-case.tokens // tile.block_m)
    (trace,) = found["dq_kernel"]
    own = dict.fromkeys(("q_ptr", "out_ptr", "dout_ptr"), head) | {"lse_ptr": row}
    assert trace.loaded == own | {"k_ptr": programs * head, "v_ptr": programs * head}
    assert trace.stored == {"delta_ptr": row, "dq_ptr": head}
    tile = backward.DKV["sm_80"][1]
    programs = -(-case.tokens // tile.block_n)
    (trace,) = found["dkv_kernel"]
    walked = dict.fromkeys(("q_ptr", "dout_ptr"), programs * head)
    walked |= dict.fromkeys(("lse_ptr", "delta_ptr"), programs * row)
    assert trace.loaded == walked | {"k_ptr": head, "v_ptr": head}
    assert trace.stored == {"dk_ptr": head, "dv_ptr": head}


@pytest.mark.parametrize("rope", ["adjacent", "halves"])
def test_traffic_of_qk_norm_and_rope(rope):
    case = Case(72, 2, 50, BF16, batch=2, qk_norm="layer", affine=True, rope=rope)
    found = launches(make(case))
    half = case.batch * case.heads * case.tokens * case.head_dim * 2
    forward_trace, again = found["prepare_kernel"]
    assert forward_trace.loaded == again.loaded
    for trace in (forward_trace, again):
        assert (trace.loaded["q_ptr"], trace.loaded["k_ptr"]) == (half, half)
        assert trace.loaded["cos_ptr"] == trace.loaded["sin_ptr"] == 2 * half
        assert trace.unique_loaded["cos_ptr"] == case.tokens * case.head_dim * 4
        assert trace.stored == {"q_out_ptr": half, "k_out_ptr": half}
    (trace,) = found["prepare_backward_kernel"]
    assert {trace.loaded[f"{name}_ptr"] for name in ("q", "k", "dq", "dk")} == {half}
    assert (trace.stored["dq_ptr"], trace.stored["dk_ptr"]) == (half, half)


@pytest.mark.parametrize(
    "case",
    [
        Case(72, 2, 70, BF16, batch=2),
        Case(24, 2, 50, FP16, batch=2, qk_norm="layer", affine=True, rope="per sample"),
    ],
    ids=str,
)
def test_runs_are_bit_equal_and_samples_independent(case):
    call = make(case)
    with VirtualGPU("sm_80", trace=False):
        first, second = fused(call), fused(call)
        tables = [t if t is None or t.dim() == 2 else t[1:] for t in call.tables]
        alone = fused(replace(call, qkv=call.qkv[1:], dout=call.dout[1:], tables=tables))
    for name in first:
        assert torch.equal(first[name], second[name])
        if "weight" not in name and "bias" not in name:
            assert torch.equal(first[name][1:], alone[name])


def test_many_programs_share_the_rows_of_a_parameters_gradient(monkeypatch):
    call = make(Case(16, 2, 150, FP16, batch=2, qk_norm="layer", affine=True, rope="adjacent"))
    with VirtualGPU("sm_80", trace=False):
        whole = fused(call)
        monkeypatch.setattr(qk_norm_rope, "PROGRAMS", 2)
        with VirtualGPU("sm_80") as gpu:
            shared = fused(call)
    assert gpu.launches[-1].grid[0] == 2
    for name, truth in eager(call.in_dtype(torch.float64)).items():
        assert rms(shared[name] - truth) <= 1.1 * rms(whole[name] - truth)


def test_very_negative_scores_beside_a_masked_tail():
    """Keys past N score 0, far above these: they must not count, forward or backward."""
    call = make(Case(64, 1, 37, FP32))
    call.qkv[..., :64] = 3 + 0.01 * call.qkv[..., :64]
    call.qkv[..., 64:128] = -12 + 0.01 * call.qkv[..., 64:128]
    exact = eager(call.in_dtype(torch.float64))
    with VirtualGPU("sm_80"):
        results = fused(call)
    assert exact_lse(call).max() < -200
    for name, error in errors(results, exact).items():
        assert error <= 2e-4 * rms(exact[name]) + 1e-6, name


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
@pytest.mark.parametrize("qk_norm", [None, "layer"])
def test_no_tokens_no_launch(shape, qk_norm):
    batch, tokens = shape
    call = make(Case(16, 2, tokens, BF16, batch=batch, qk_norm=qk_norm, affine=qk_norm is not None))
    with VirtualGPU("sm_80") as gpu:
        results = fused(call)
    assert gpu.launches == []
    assert results["dq"].shape == (*shape, 32)
    assert all(not results[n].any() for n in results if "weight" in n)


def test_channels_apart_are_copied_first():
    call = make(Case(16, 2, 20, FP16))
    apart = call.qkv.repeat_interleave(2, -1)[..., ::2]
    with VirtualGPU("sm_80"):
        assert torch.equal(fused(replace(call, qkv=apart))["dv"], fused(call)["dv"])


def test_samples_beyond_32_bit_offsets():
    """The second sample starts 2^31 elements behind the first, in memory that is never touched."""
    call = make(Case(16, 1, 20, FP16, batch=2, qk_norm="rms"))
    far = torch.empty(2**31 + 20 * 48, dtype=FP16).as_strided((2, 20, 48), (2**31, 48, 1))
    far.copy_(call.qkv)
    with VirtualGPU("sm_80", trace=False):
        near, distant = fused(call), fused(replace(call, qkv=far))
        plain = replace(call, case=Case(16, 1, 20, FP16, batch=2))
        near_plain, distant_plain = fused(plain), fused(replace(plain, qkv=far))
    assert all(torch.equal(near[name], distant[name]) for name in near)
    assert all(torch.equal(near_plain[name], distant_plain[name]) for name in near)
