"""Every op and option on a real GPU, through the native kernels: `pytest -m gpu`."""

from __future__ import annotations

import device_checks
import pytest
import torch
from op_cases import case_ids

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
every_case = pytest.mark.parametrize("index", range(len(case_ids())), ids=case_ids())
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])


@pytest.fixture(autouse=True)
def ieee_float32(monkeypatch):
    """Eager's float32 products in float32: cuDNN's default is TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def skip_without_a_kernel(index: int, dtype: torch.dtype) -> None:
    op, args = device_checks.case(index, dtype, "cuda")
    why = device_checks.why_not_native(op, args, "cuda")
    if why is not None:
        pytest.skip(why)


@every_dtype
@every_case
def test_accuracy(index, dtype):
    skip_without_a_kernel(index, dtype)
    device_checks.check_accuracy(index, dtype, "cuda")


@every_dtype
@every_case
def test_determinism(index, dtype):
    skip_without_a_kernel(index, dtype)
    device_checks.check_determinism(index, dtype, "cuda")


@every_case
def test_cuda_graph(index):
    skip_without_a_kernel(index, torch.bfloat16)
    device_checks.check_graph(index, torch.bfloat16)


@every_case
def test_compile(index):
    skip_without_a_kernel(index, torch.float32)
    device_checks.check_compile(index, torch.float32, "cuda", "inductor")
