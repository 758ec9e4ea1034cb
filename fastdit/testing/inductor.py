"""What torch.compile would launch on an NVIDIA GPU, generated on a machine without one.

For comparisons in documents, not for tests: it reaches into private parts of PyTorch (2.13) and
pretends that a CUDA device is there while Inductor generates code. Nothing is run.
"""

from __future__ import annotations

import contextlib
import re
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from fastdit.testing.gpus import GPU, gpu_of


@dataclass(frozen=True)
class InductorCode:
    """Inductor's output for one graph.

    Attributes:
        source: the generated Python module.
        kernels: the generated Triton kernels' names; those of the name's ops are fused.
        bytes: of each kernel, what Inductor itself estimates that it moves.
        extern: calls of library kernels (`extern_kernels.addmm` and the like).
    """

    source: str
    kernels: tuple[str, ...]
    bytes: tuple[int, ...]
    extern: tuple[str, ...]

    @property
    def launches(self) -> int:
        return len(self.kernels) + len(self.extern)


class _Generated(Exception):
    pass


def inductor_code(
    function: Callable[..., Any],
    inputs: Sequence[tuple[Sequence[int], torch.dtype]],
    arch: str | int = "sm_90",
) -> InductorCode:
    """The code that `torch.compile(function)` would generate for a forward pass.

    Args:
        function: of tensors, to one tensor or a tuple.
        inputs: shape and dtype of each argument.
        arch: the NVIDIA GPU to pretend.

    Raises:
        ValueError: the GPU is not NVIDIA's.
    """
    import torch._inductor.config as config
    from torch._guards import TracingContext, tracing
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.graph import GraphLowering
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    from fastdit.testing.virtual import VirtualGPU

    gpu = gpu_of(arch)
    if gpu.vendor != "cuda":
        raise ValueError(f"arch: got {arch!r}, allowed are NVIDIA's architectures")
    sources: list[str] = []

    def save(source: str) -> None:
        sources.append(source)
        raise _Generated

    fake = FakeTensorMode(allow_non_fake_inputs=True)
    options = {
        "compile_threads": 1,
        "fx_graph_cache": False,
        "triton.unique_kernel_names": True,
        "benchmark_kernel": True,  # for the estimate of bytes
    }
    with _pretended(gpu), config.patch(options), torch.no_grad():
        with fake:
            arguments = [torch.empty(s, dtype=t, device="cuda") for s, t in inputs]
            graph = make_fx(
                lambda *tensors: torch.utils._pytree.tree_leaves(function(*tensors)),
                decomposition_table=select_decomp_table(),
                tracing_mode="real",
            )(*arguments)
        with (
            mock.patch.object(GraphLowering, "save_output_code", staticmethod(save)),
            VirtualGPU(gpu.arch, mode="compile"),
            tracing(TracingContext(fake)),
        ):
            try:
                compile_fx_inner(graph, arguments)
            except Exception:
                if not sources:
                    raise
    return _read(sources[-1])


def _read(source: str) -> InductorCode:
    gigabytes = re.findall(r"'kernel_num_gb': ([\d.e+-]+)", source)
    return InductorCode(
        source=source,
        kernels=tuple(re.findall(r"async_compile\.triton\('(\w+)'", source)),
        bytes=tuple(round(1e9 * float(value)) for value in gigabytes),
        extern=tuple(
            re.findall(
                r"^ +(?:\w+ = )?((?:extern_kernels|torch\.ops\.\w+)\.[\w.]+)\(", source, re.M
            )
        ),
    )


@contextlib.contextmanager
def _pretended(gpu: GPU) -> Iterator[None]:
    """Inside, PyTorch's Python code believes that this GPU is there."""
    from torch._dynamo.device_interface import CudaInterface
    from torch.utils._triton import has_triton

    assert isinstance(gpu.triton_arch, int)
    capability = divmod(gpu.triton_arch, 10)
    properties = types.SimpleNamespace(
        name=f"NVIDIA {gpu.name}",
        major=capability[0],
        minor=capability[1],
        total_memory=80 << 30,
        multi_processor_count=gpu.multiprocessors,
        max_threads_per_multi_processor=32 * gpu.warps,
        max_threads_per_block=1024,
        regs_per_multiprocessor=65536,
        warp_size=32,
        shared_memory_per_block=48 << 10,
        shared_memory_per_block_optin=gpu.shared_kib_of_block << 10,
        shared_memory_per_multiprocessor=gpu.shared_kib << 10,
        L2_cache_size=50 << 20,
        gcnArchName="",
        clock_rate=int(gpu.gigahertz * 1e6),
        memory_clock_rate=2_619_000,
        memory_bus_width=5120,
    )
    state = torch.zeros(16, dtype=torch.uint8)
    answers: dict[Any, dict[str, Any]] = {
        torch.cuda: {
            "is_available": True,
            "device_count": 1,
            "current_device": 0,
            "get_device_properties": properties,
            "get_device_capability": capability,
            "get_device_name": properties.name,
            "is_bf16_supported": True,
            "synchronize": None,
            "_lazy_init": None,
            "set_device": None,
            "_exchange_device": 0,
            "_maybe_exchange_device": 0,
            "get_rng_state": state,
            "set_rng_state": None,
        },
        CudaInterface: {
            "get_device_properties": properties,
            "is_available": True,
            "current_device": 0,
            "get_compute_capability": gpu.triton_arch,
            "is_triton_capable": True,
            "raise_if_triton_unavailable": None,
            "exchange_device": 0,
            "maybe_exchange_device": 0,
            "synchronize": None,
        },
        CudaInterface.Worker: {"get_device_properties": properties, "current_device": 0},
    }
    with contextlib.ExitStack() as stack:
        # PyTorch remembers whether Triton has a device: ask it again, inside and afterwards.
        stack.callback(has_triton.cache_clear)
        has_triton.cache_clear()
        for owner, functions in answers.items():
            for name, answer in functions.items():
                function: Any = lambda *_args, _answer=answer, **_kwargs: _answer  # noqa: E731
                if isinstance(owner, type):
                    function = staticmethod(function)
                stack.enter_context(mock.patch.object(owner, name, function, create=True))
        has_triton.cache_clear()  # any torch.compile before has asked for a real GPU
        stack.callback(has_triton.cache_clear)
        yield
