"""The row-wise kernels in the interpreter: right, within bounds, each byte once, the same twice."""

from __future__ import annotations

import pytest
import torch
from row_cases import (
    BATCH,
    CASES,
    DTYPES,
    OPS,
    TOKENS,
    Case,
    error,
    exact,
    gated_adaln_at,
    on_the_cpu,
    overload,
    run,
)

from fastdit import reference
from fastdit.testing import VirtualGPU

every_op = pytest.mark.parametrize("op", OPS)


def calls() -> list:
    """Every case of every op in float32 and bfloat16, the first ones also in float16."""
    found = []
    for op in OPS:
        for index, case in enumerate(CASES):
            normalises = case.affine or case.norm == "rms" or case.scale is None
            if op == "gated_residual" and normalises:
                continue  # the same as another case without these options
            names = ["bf16"] + ["fp32"] * (not case.mixed) + ["fp16"] * (index < 3)
            found += [
                pytest.param(op, case, DTYPES[name], id=f"{op}-{case.name}-{name}")
                for name in names
            ]
    return found


def interpreted(op: str, arguments: list):
    """Outputs, gradients and launches; a fault of any launch raises."""
    with on_the_cpu(), VirtualGPU("sm_90") as gpu:
        return *run(overload(op), arguments, OPS[op]), gpu.launches


def truth_of(op: str, out: tuple):
    """The op in float64; `gated_adaln` goes on from the h of `out`."""
    return gated_adaln_at(out[0]) if op == "gated_adaln" else getattr(reference, op)


@pytest.mark.parametrize(("op", "case", "dtype"), calls())
def test_outputs_and_gradients_against_float64(op, case, dtype):
    """Outputs are one rounding from float64, each gradient as close to it as eager PyTorch's."""
    arguments, count = case.arguments(op, dtype), OPS[op]
    out, gradients, _launches = interpreted(op, arguments)
    truth, truth_gradients = run(truth_of(op, out), exact(arguments), count)
    for got, want in zip(out, truth, strict=True):
        assert got.dtype == arguments[0].dtype
        assert got.is_contiguous()
        assert error(got, want) <= 1.02 * error(want.to(got.dtype), want) + 4e-6
    eager_out, eager = run(getattr(reference, op), arguments, count)
    _, eager_truth = run(truth_of(op, eager_out), exact(arguments), count)
    for index, (got, want) in enumerate(zip(gradients, truth_gradients, strict=True)):
        assert (got.dtype, got.shape) == (eager[index].dtype, eager[index].shape)
        allowed = 1.25 * error(eager[index], eager_truth[index])
        noise = 2 * torch.finfo(torch.float32).eps * float(want.abs().max())
        assert error(got, want) <= allowed + noise, f"gradient {index}"


@pytest.mark.parametrize("op", ["adaln", "gated_adaln"])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_saved_statistics(op, norm):
    """Beside a mean of 100 the saved mean is the nearest float32, or its neighbour."""
    case = Case("statistics", width=600, mean=100.0, norm=norm)
    with on_the_cpu(), VirtualGPU("sm_90"):
        *streams, mean, rstd = overload(op)(*case.arguments(op, torch.float32))
    rows = (case.arguments(op, torch.float32) if op == "adaln" else streams)[0].detach().double()
    if norm == "layer":
        torch.testing.assert_close(mean.double(), rows.mean(-1), rtol=1e-7, atol=0)
        rows = rows - rows.mean(-1, keepdim=True)
    else:
        assert mean.numel() == 0
    truth = (rows.square().mean(-1) + 1e-6).rsqrt()
    torch.testing.assert_close(rstd.double(), truth, rtol=3e-7, atol=0)


@every_op
def test_two_runs_give_the_same_bits(op):
    case = Case("affine", width=600, affine="weight, bias")
    arguments = case.arguments(op, torch.bfloat16)
    first, second = interpreted(op, arguments), interpreted(op, arguments)
    for a, b in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True):
        assert torch.equal(a, b)


def traffic(launches, name: str) -> tuple[dict[str, int], dict[str, int]]:
    (trace,) = [launch.trace for launch in launches if launch.name == name]
    assert not trace.atomics
    return trace.loaded, trace.stored


@every_op
@pytest.mark.parametrize("kind", ["sample", "token"])
def test_each_byte_crosses_the_bus_once(op, kind):
    """Streamed tensors, forward and backward, are loaded once and stored once, to the byte."""
    width = 600
    case = Case("traffic", width=width, gate=kind, shift=kind, scale=kind)
    _out, _grads, launches = interpreted(op, case.arguments(op, torch.bfloat16))
    rows = BATCH * TOKENS
    stream = 2 * rows * width
    loaded, stored = traffic(launches, f"{op}_kernel")
    expect_loaded = {"x_ptr"} | ({"y_ptr"} if op != "adaln" else set())
    expect_stored = {"adaln": {"out_ptr"}, "gated_residual": {"h_ptr"}}
    expect_stored = expect_stored.get(op, {"h_ptr", "out_ptr"})
    statistics = {} if op == "gated_residual" else {"mean_ptr": 4 * rows, "rstd_ptr": 4 * rows}
    modulation = {"adaln": 2, "gated_residual": 1, "gated_adaln": 3}[op]
    assert {k: n for k, n in loaded.items() if k.endswith("_ptr")} == dict.fromkeys(
        expect_loaded, stream
    )
    assert sum(n for k, n in loaded.items() if not k.endswith("_ptr")) == modulation * stream
    assert stored == dict.fromkeys(expect_stored, stream) | statistics

    name = "gated_residual_backward_kernel" if op == "gated_residual" else "row_gradients_kernel"
    loaded, stored = traffic(launches, name)
    expect_loaded = {
        "adaln": {"dout_ptr", "x_ptr"},
        "gated_residual": {"dout_ptr", "y_ptr"},
        "gated_adaln": {"dout_ptr", "dh_ptr", "x_ptr", "y_ptr"},
    }[op]
    assert {k: n for k, n in loaded.items() if k.endswith("_ptr")} == (
        dict.fromkeys(expect_loaded, stream) | statistics
    )
    streamed = {k: n for k, n in stored.items() if k in ("dx_ptr", "dy_ptr")}
    assert streamed == dict.fromkeys(
        {"dx_ptr", "dy_ptr"} - {"adaln": {"dy_ptr"}, "gated_residual": {"dx_ptr"}}.get(op, set()),
        stream,
    )
    sums = sum(stored.values()) - sum(streamed.values())
    slots = 3 * BATCH
    assert sums == modulation * (stream if kind == "token" else 4 * slots * width)
