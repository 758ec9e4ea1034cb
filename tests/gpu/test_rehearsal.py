"""The checks of `device_checks`, on the CPU: the registered Triton kernels in the interpreter."""

from __future__ import annotations

import contextlib
import dataclasses

import device_checks
import pytest
import torch
from op_cases import case_ids

from fastdit import backends
from fastdit.testing import VirtualGPU

every_case = pytest.mark.parametrize("index", range(len(case_ids())), ids=case_ids())


@pytest.fixture
def gpu():
    """The Triton kernels of CUDA, registered for the CPU instead of what is there."""
    with contextlib.ExitStack() as replaced:
        for op in backends.OPS:
            for name in (op, f"{op}_backward"):
                kernels = [
                    dataclasses.replace(kernel, device="cpu")
                    for kernel in backends.kernels_for(name, "cuda")
                    if kernel.run.__module__.startswith("fastdit.kernels.")
                ]
                replaced.enter_context(backends.replaced(name, "cpu", kernels))
        yield replaced.enter_context(VirtualGPU("sm_90"))


def skip_without_a_kernel(index: int, dtype: torch.dtype) -> None:
    op, args = device_checks.case(index, dtype, "cpu")
    why = device_checks.why_not_native(op, args, "cpu")
    if why is not None:
        pytest.skip(why)


@every_case
def test_accuracy_and_determinism(gpu, index):
    skip_without_a_kernel(index, torch.bfloat16)
    device_checks.check_accuracy(index, torch.bfloat16, "cpu")
    device_checks.check_determinism(index, torch.bfloat16, "cpu")
    assert gpu.launches


def test_an_inaccurate_kernel_fails(gpu):
    """The check tells a kernel that is wrong in the last bits of one gradient."""
    index = case_ids().index("bias_gelu: tokens")
    (kernel,) = backends.kernels_for("bias_gelu_backward", "cpu")

    def off(*args):
        dx, dbias = kernel.run(*args)
        return dx * 1.05, dbias

    backends.kernels_for("bias_gelu_backward", "cpu")[:] = [dataclasses.replace(kernel, run=off)]
    with pytest.raises(AssertionError, match="bias_gelu: "):
        device_checks.check_accuracy(index, torch.bfloat16, "cpu")


def test_compile(gpu):
    index = case_ids().index("patch_embed: positions")
    device_checks.check_compile(index, torch.float32, "cpu", "aot_eager")
