"""`fastdit.ops.attention` through its Triton kernels, registered for the CPU of a virtual GPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from attention_cases import BF16, FP16, FP32, Case, eager, fused, make

import fastdit
from fastdit import backends
from fastdit.embeddings import rope_2d
from fastdit.kernels.attention import KERNELS, ROPE_TOKENS, slower, unsupported
from fastdit.kernels.attention_tiles import family_of
from fastdit.ops import attention
from fastdit.testing import VirtualGPU


@pytest.fixture
def gpu():
    """The kernels as the only native ones of the CPU, asked for by `native`."""
    kernels = [dataclasses.replace(kernel, device="cpu") for kernel in KERNELS]
    before = {k.op: backends.kernels_for(k.op, "cpu") for k in kernels}
    for kernel in kernels:
        backends._kernels[kernel.op, "cpu"] = [kernel]
    with VirtualGPU("sm_80", trace=False) as gpu, fastdit.backend("native"):
        yield gpu
    for op, kernels in before.items():
        backends._kernels[op, "cpu"] = kernels


def options(call):
    case = call.case
    names = ("q_weight", "q_bias", "k_weight", "k_bias")
    return {
        "scale": call.scale,
        "qk_norm": case.qk_norm,
        "qk_eps": 1e-5,
        "rope": None if case.rope is None else tuple(call.tables),
        "rope_interleaved": case.rope != "halves",
    } | dict(zip(names, call.parameters, strict=True))


SMALL = [
    Case(16, 2, 9, FP32),
    Case(24, 1, 9, FP16, qk_norm="layer", affine=True, rope="halves"),
    Case(16, 2, 9, BF16, batch=2, qk_norm="rms", affine=True, rope="per sample", strided=True),
]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_forward_and_backward(gpu, case):
    call = make(case)
    leaves = [t.requires_grad_() for t in (call.qkv, *call.parameters) if t is not None]
    out = attention(call.qkv, case.heads, **options(call))
    gradients = torch.autograd.grad(out, leaves, call.dout)
    names = [launch.name for launch in gpu.launches]
    prepared = case.qk_norm is not None or case.rope is not None
    forward = ["prepare_kernel"] * prepared + ["attention_kernel"]
    backward = ["prepare_kernel"] * prepared + ["dq_kernel", "dkv_kernel"]
    assert names == forward + backward + ["prepare_backward_kernel"] * prepared
    direct = fused(call)
    assert torch.equal(out, direct["out"])
    parts = torch.cat([direct["dq"], direct["dk"], direct["dv"]], -1)
    expected = [parts, *(direct[n] for n in direct if n.endswith(("weight", "bias")))]
    assert all(torch.equal(g, e) for g, e in zip(gradients, expected, strict=True))


@pytest.mark.parametrize("case", SMALL[:2], ids=str)
def test_opcheck(gpu, case):
    call = make(case)
    for tensor in (call.qkv, *call.parameters):
        if tensor is not None:
            tensor.requires_grad_()
    arguments = (call.qkv, case.heads, *call.schema)
    report = torch.library.opcheck(torch.ops.fastdit.attention.default, arguments)
    assert set(report.values()) == {"SUCCESS"}


def test_compiles_without_graph_breaks(gpu):
    torch.compiler.reset()
    call = make(SMALL[1])
    call.qkv.requires_grad_()

    def step(qkv):
        return attention(qkv * 2, 1, **options(call)).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    (ours,) = torch.autograd.grad(compiled(call.qkv), call.qkv)
    assert "prepare_backward_kernel" in {launch.name for launch in gpu.launches}
    (plain,) = torch.autograd.grad(step(call.qkv), call.qkv)
    torch.testing.assert_close(ours, plain)


def test_autocast(gpu):
    call = make(SMALL[0])
    with torch.autocast("cpu", BF16):
        out = attention(call.qkv, 2)
    assert out.dtype == BF16
    assert torch.equal(out, attention(call.qkv.bfloat16(), 2))
    exact = eager(call.in_dtype(torch.float64))["out"]
    assert (out - exact).abs().max() < 0.03


def test_native_says_what_the_kernels_cannot_run(gpu):
    for qkv, heads, more, reason in (
        (torch.ones(1, 4, 48).double(), 1, {}, "qkv is float64, the Triton kernels take float32"),
        (torch.ones(1, 4, 36), 1, {}, "head_dim is 12, the Triton kernels take multiples of 8"),
        (torch.ones(1, 4, 24), 1, {}, "head_dim is 8, .*from 16 to 128"),
        (torch.ones(1, 4, 408), 1, {}, "head_dim is 136"),
        (torch.ones(1, 4, 48), 1, {"rope": torch.ones(2, 4, 16).double()}, "rope is float64"),
    ):
        with pytest.raises(fastdit.BackendError, match=reason):
            attention(qkv, heads, **more)
    assert gpu.launches == []


def test_auto_prefers_sdpa_but_for_rope_on_few_tokens(gpu):
    qkv, tables = torch.ones(1, 16, 96, dtype=BF16), rope_2d(16, (4, 4))
    with fastdit.backend("auto"):
        (plain,) = fastdit.explain("attention", qkv, 2)
        (rope,) = fastdit.explain("attention", qkv, 2, rope=tables)
        (single,) = fastdit.explain("attention", qkv.float(), 2, rope=tables)
        assert attention(qkv, 2).dtype == BF16
        assert gpu.launches == []
        attention(qkv, 2, rope=tables)
    assert [launch.name for launch in gpu.launches] == ["prepare_kernel", "attention_kernel"]
    assert plain.runs == single.runs == "reference"
    assert plain.rejected[0][1].startswith("SDPA is modelled to be as fast or faster without RoPE")
    assert single.rejected[0][1] == "SDPA is modelled to be faster in float32"
    assert (rope.runs, rope.rejected) == ("triton", ())
    assert fastdit.explain("attention", qkv, 2)[0].runs == "triton"  # asked for by native


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_auto_prefers_sdpa_from_a_number_of_tokens_on(arch):
    with VirtualGPU(arch, mode="compile") as gpu:
        most = ROPE_TOKENS[family_of(gpu.target.arch)]
        for tokens, expected in ((most, None), (most + 1, "SDPA is modelled to be faster")):
            call = make(Case(72, 16, tokens, BF16, rope="adjacent"), device="meta")
            reason = slower(call.qkv, 16, *call.schema)
            assert unsupported(call.qkv, 16, *call.schema) is None
            assert reason is None if expected is None else reason.startswith(expected)


def test_auto_leaves_rope_to_torch_compile():
    call = make(Case(16, 1, 9, FP16, rope="adjacent"))
    torch.compiler.reset()
    compiled = torch.compile(
        lambda: slower(call.qkv, 1, *call.schema), fullgraph=True, backend="eager"
    )
    assert compiled().startswith("torch.compile is modelled to fuse RoPE")


def test_cuda_has_the_kernels():
    for op in ("attention", "attention_backward"):
        assert "triton" in [kernel.name for kernel in backends.kernels_for(op, "cuda")]


def test_families_of_architectures():
    families = {75: "sm_80", 80: "sm_80", 86: "sm_86", 87: "sm_80", 89: "sm_86", 90: "sm_90"}
    families |= {100: "sm_100", 103: "sm_100", 110: "sm_100", 120: "sm_86", 121: "sm_86"}
    families |= {"gfx942": "gfx942", "gfx1100": "gfx942"}
    assert {arch: family_of(arch) for arch in families} == families
