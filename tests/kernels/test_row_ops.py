"""The three ops on their Triton kernels: what users call, compiled, checked, under autocast."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch
from row_cases import CASES, OPS, Case, error, exact, on_the_cpu, overload, run
from torch import Tensor

import fastdit
from fastdit import backends, reference
from fastdit.kernels import gated_residual, launch, registry, slot_sums, tuning
from fastdit.testing import VirtualGPU, inspect

every_op = pytest.mark.parametrize("op", OPS)
SMALL = Case("small", width=24)


@pytest.fixture
def gpu():
    with on_the_cpu(), VirtualGPU("sm_90") as virtual:
        yield virtual


def block(x: Tensor, y: Tensor, projection: Tensor, tokens: Tensor) -> Tensor:
    """The three ops as a DiT block strings them together."""
    shift, scale, gate, gate2 = projection.chunk(4, -1)
    first = fastdit.ops.adaln(x, shift, scale)
    h, out = fastdit.ops.gated_adaln(x, y + first, gate, shift, scale)
    return fastdit.ops.gated_residual(h, out * tokens, gate2)


def block_inputs(dtype=torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = ((2, 3, 24), (2, 3, 24), (2, 96), (2, 3, 24))
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def test_the_registry_registers_them_for_cuda():
    names = {kernel.op for op in OPS for kernel in backends.kernels_for(op, "cuda")}
    assert names == set(OPS) <= set(registry.MODULES)
    for op in OPS:
        (kernel,) = backends.kernels_for(f"{op}_backward", "cuda")
        assert (kernel.name, kernel.device) == ("triton", "cuda")


def test_a_block_runs_forward_and_backward_on_the_kernels(gpu):
    inputs = block_inputs()
    (out,), gradients = run(block, inputs, 1)
    names = [ran.name for ran in gpu.launches]
    assert names == [
        "adaln_kernel",
        "gated_adaln_kernel",
        "gated_residual_kernel",
        "gated_residual_backward_kernel",
        "finish_kernel",
        "row_gradients_kernel",
        "finish_kernel",
        "row_gradients_kernel",
        "finish_kernel",
    ]
    with fastdit.backend("reference"):
        (truth,), true_gradients = run(block, exact(inputs), 1)
    assert error(out, truth) < 1e-5
    for got, want in zip(gradients, true_gradients, strict=True):
        assert error(got, want) < 2e-5


def test_torch_compile_takes_the_block_in_one_graph(gpu):
    torch.compiler.reset()
    inputs = block_inputs()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    (want,), wanted = run(block, inputs, 1)
    launches = len(gpu.launches)
    (got,), gradients = run(compiled, inputs, 1)
    assert len(gpu.launches) == 2 * launches
    assert torch.equal(got, want)
    for g, w in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-6, atol=1e-6)


@every_op
def test_opcheck(gpu, op):
    case = dataclasses.replace(SMALL, tokens=3, affine="weight, bias")
    arguments = case.arguments(op, torch.float32)
    report = torch.library.opcheck(overload(op), arguments)
    assert set(report.values()) == {"SUCCESS"}
    assert gpu.launches


def test_autocast_leaves_the_stream_in_float32(gpu):
    x, y, projection, tokens = block_inputs()
    low = [t.detach().bfloat16().requires_grad_() for t in (y, projection, tokens)]
    with torch.autocast("cpu", torch.bfloat16):
        shift, scale, gate, _ = low[1].chunk(4, -1)
        h, out = fastdit.ops.gated_adaln(x, low[0], gate, shift, scale)
    assert h.dtype == out.dtype == torch.float32
    assert [ran.name for ran in gpu.launches] == ["gated_adaln_kernel"]
    dx, dy, dprojection = torch.autograd.grad((h * out).sum(), (x, low[0], low[1]))
    assert (dx.dtype, dy.dtype, dprojection.dtype) == (torch.float32, *[torch.bfloat16] * 2)


@every_op
@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize("replaced", [False, True])
def test_given_tensors_are_what_the_kernel_writes(gpu, op, replaced, tuned, monkeypatch):
    """x and y themselves too; but copies, where a launch is repeated to be timed."""
    x, y, gate = (t.detach() for t in SMALL.arguments("gated_residual", torch.float32))
    rest = {"adaln": (gate, gate), "gated_residual": (y, gate), "gated_adaln": (y, gate, gate)}
    call = getattr(fastdit.ops, op)
    want = call(x, *rest[op])
    outs = (x, y)[: OPS[op]] if replaced else [torch.full_like(x, torch.nan)] * OPS[op]
    outs = tuple(outs) if replaced else tuple(out.clone() for out in outs)
    monkeypatch.setitem(tuning._state, "enabled", tuned)
    made = []

    def counted(*args, **kwargs):
        made.append(args)
        return torch.zeros(*args, **kwargs)

    monkeypatch.setattr(launch.torch, "empty", counted)
    with contextlib.nullcontext() if not tuned else pytest.warns(RuntimeWarning, match="no GPU"):
        got = call(x, *rest[op], out=outs if OPS[op] == 2 else outs[0])
    assert len(gpu.launches) == 2
    assert len(made) == tuned * OPS[op]
    pairs = zip(*((r,) if isinstance(r, Tensor) else r for r in (got, want, outs)), strict=False)
    for g, w, out in pairs:
        assert g is out
        assert torch.equal(g, w)


@every_op
@pytest.mark.parametrize("shape", [(0, 3, 24), (2, 0, 24)])
def test_empty_tensors_launch_nothing(gpu, op, shape):
    x = torch.zeros(shape, requires_grad=True)
    modulation = torch.ones(shape[0], 24, requires_grad=True)
    weight = torch.ones(24, requires_grad=True)
    rest = (modulation, modulation, weight, weight, 1e-6, "layer", True)
    args = {"adaln": (x, *rest), "gated_residual": (x, x, modulation)}
    out = overload(op)(*args.get(op, (x, x, modulation, *rest)))
    for o in [out] if op == "gated_residual" else out[: OPS[op]]:
        assert o.shape == shape
        dx, dmodulation = torch.autograd.grad(o.sum(), (x, modulation), retain_graph=True)
        assert (dx.shape, dmodulation.shape) == (x.shape, modulation.shape)
        assert not dmodulation.any()
    assert gpu.launches == []


def kernels_of(op: str) -> tuple[backends.Kernel, backends.Kernel]:
    (forward,), (backward,) = (backends.kernels_for(n, "cuda") for n in (op, f"{op}_backward"))
    return forward, backward


def backward_arguments(op: str, arguments: list, saved: tuple) -> tuple:
    """The backward op's arguments, with the forward's outputs in place of their gradients."""
    if op == "gated_residual":
        return saved[0], *arguments[1:]
    tensors, options = arguments[:-3], arguments[-2:]
    if op == "adaln":
        out, mean, rstd = saved
        return out, tensors[0], mean, rstd, *tensors[1:], *options
    h, out, mean, rstd = saved
    return h, out, h, mean, rstd, *tensors[1:], *options


@every_op
@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((1, 2, 4), torch.float16, None),
        ((1, 2, 4), torch.float64, "x is float64, the Triton kernels take float32, bfloat16 and"),
        ((1, 2, 70_000), torch.float32, "x is 70000 wide, the Triton kernels take widths from 1"),
        ((2**16, 2**15, 1), torch.float32, "x has 2147483648 rows, the Triton kernels take"),
    ],
)
def test_what_the_kernels_refuse(op, shape, dtype, reason):
    x = torch.empty(shape, dtype=dtype, device="meta")
    rest = [None, None, None, None, 1e-6, "layer", True]
    arguments = {"adaln": [x, *rest], "gated_residual": [x, x, x[:, 0]]}
    arguments = arguments.get(op, [x, x, x[:, 0], *rest])
    forward, backward = kernels_of(op)
    saved = (x,) * (OPS[op] + 2 * (op != "gated_residual"))
    for why in (
        forward.unsupported(*arguments),
        backward.unsupported(*backward_arguments(op, arguments, saved)),
    ):
        assert why is None if reason is None else reason in why


def test_explain_names_the_kernel_or_the_reason(gpu):
    x, modulation = torch.ones(1, 2, 24), torch.ones(1, 24)
    (choice,) = fastdit.explain("adaln", x, modulation)
    assert choice.runs == "triton"
    (choice,) = fastdit.explain("adaln", x.double(), modulation)
    assert (choice.runs, choice.rejected[0][0]) == ("reference", "triton")
    with fastdit.backend("native"), pytest.raises(fastdit.BackendError, match="float64"):
        fastdit.ops.adaln(x.double(), modulation)


OPTIONS = [
    *[("gated_adaln", name) for name in ("affine", "per token", "rms", "bare", "autocast")],
    ("gated_adaln", "scale per token, shift per sample"),
    ("gated_adaln", "shift alone, by columns"),
    *[(op, "per token") for op in ("adaln", "gated_residual")],
]


@pytest.mark.parametrize(("op", "name"), OPTIONS)
def test_launchers_read_nothing_on_the_host(op, name):
    """On meta tensors there is nothing to read: what runs on them, a CUDA graph can capture. And
    the compiler, which is stricter than the interpreter, accepts every option."""
    case = next(case for case in CASES if case.name == name)
    arguments = [
        a.detach().to("meta") if isinstance(a, Tensor) else a
        for a in case.arguments(op, torch.bfloat16)
    ]
    forward, backward = kernels_of(op)
    with VirtualGPU("sm_90", mode="compile") as gpu:
        saved = forward.run(*arguments)
        saved = (saved,) if op == "gated_residual" else saved
        gradients = backward.run(*backward_arguments(op, arguments, saved))
    assert len(gpu.launches) == 3 - (name == "per token")
    assert all(inspect(ran).spills == 0 for ran in gpu.launches)
    inputs = arguments[op == "gated_residual" :]  # whose dx is dout
    for gradient, tensor in zip(gradients, inputs, strict=False):
        if tensor is None:
            assert gradient.numel() == 0
        else:
            assert (gradient.shape, gradient.dtype) == (tensor.shape, tensor.dtype)


def test_many_slots_are_summed_in_rounds():
    """The tables as they are: 75 slots, 64 of them at a time."""
    generator = torch.Generator().manual_seed(1)
    dout, y = (torch.randn(1, 600, 8, generator=generator) for _ in range(2))
    gate = torch.randn(1, 8, generator=generator)
    with VirtualGPU("sm_90") as gpu:
        dy, dgate = gated_residual.gated_residual_backward(dout, y, gate)
    assert [ran.grid[0] for ran in gpu.launches] == [75, 1]
    assert slot_sums.FINISH.slots == 64
    truth = reference.gated_residual_backward(dout.double(), y.double(), gate.double())
    assert error(dy, truth[0]) <= 1e-6
    assert error(dgate, truth[1]) <= 2e-5
