"""A Triton driver without a GPU: launches compile, are interpreted or are simulated.

`VirtualGPU` replaces Triton's active driver. Triton's own front end then specialises and compiles
for the target it names, checks shared memory as on the device (`OutOfResources`), resolves the
grid and hands over the launch; what a launch then does is the mode's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import GPUDriver
from triton.runtime.jit import JITFunction

from fastdit.testing import interpreter
from fastdit.testing.gpus import GPU, gpu_of
from fastdit.testing.tracing import Recorder, Trace

MODES = ("interpret", "compile", "simulate")


@dataclass(frozen=True)
class Launch:
    """One launch of one kernel under a `VirtualGPU`.

    Attributes:
        name: the kernel function's name.
        arch: `"sm_90"` and the like.
        grid: programs along x, y and z.
        arguments: every parameter of the kernel by name, as the launcher gave it.
        compiled: Triton's compiled kernel (`asm["ptx"]`, `asm["sass"]` ...); None if interpreted.
        trace: memory traffic, flops and faults; None unless interpreted with tracing.
        simulation: what the PTX simulator counted; None unless simulated.
    """

    name: str
    arch: str
    grid: tuple[int, int, int]
    arguments: dict[str, Any]
    compiled: Any = None
    trace: Trace | None = None
    simulation: Any = None


class VirtualGPU:
    """Let `kernel[grid](...)` and `kernel.warmup(...)` run without a GPU.

        with VirtualGPU("sm_90", mode="compile") as gpu:
            launcher(torch.empty(8, 256, 1152, device="meta"))
        print(inspect(gpu.launches[0]).registers)

    Args:
        arch: what to compile for: `"sm_80"`, 86, 89, 90, 100, 120, `"gfx942"`, `"gfx950"`, or the
            name of a GPU (`fastdit.testing.GPUS`).
        mode: what a launch does.
            `"interpret"`: it runs in Triton's interpreter on CPU tensors, in the target's
            arithmetic, and is traced; nothing is compiled, and it returns None.
            `"compile"`: it compiles and is recorded; nothing runs, so that meta tensors will do.
            `"simulate"`: it compiles and its PTX runs in the simulator on CPU tensors.
        trace: with `"interpret"`, record a `Trace` of every launch.
        check: with a trace, raise `KernelFault` where the launch left its arguments' bounds or
            two of its programs meet at one byte.

    Inside the block `launches` lists what was launched. The driver is the whole process's, as
    Triton's is: use one block at a time, or nest them.

    Raises:
        ValueError: the architecture or the mode is unknown.
    """

    def __init__(
        self,
        arch: str | int = "sm_90",
        mode: str = "interpret",
        *,
        trace: bool = True,
        check: bool = True,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode: got {mode!r}, allowed are {', '.join(map(repr, MODES))}")
        self.gpu: GPU = gpu_of(arch)
        if mode == "simulate" and self.gpu.vendor != "cuda":
            raise ValueError(f"mode: got 'simulate' for {self.gpu.arch}, which has no PTX")
        self.target = GPUTarget(self.gpu.vendor, self.gpu.triton_arch, self.gpu.warp_size)
        self.mode, self.trace, self.check = mode, trace, check
        self.launches: list[Launch] = []
        self._driver = _Driver(self)
        self._outer: list[tuple[Any, Any]] = []

    def __enter__(self) -> VirtualGPU:
        patch = mock.patch.object(JITFunction, "run", self._jit_run())
        self._outer.append((triton.runtime.driver._active, patch))
        triton.runtime.driver.set_active(self._driver)
        patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        driver, patch = self._outer.pop()
        patch.stop()
        triton.runtime.driver.set_active(driver)

    def _jit_run(self) -> Callable[..., Any]:
        """Stands in for `JITFunction.run`, which every launch and warm-up goes through."""
        compile_and_launch = _JIT_RUN

        def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            if warmup:
                return compile_and_launch(kernel, *args, grid=grid, warmup=True, **kwargs)
            arguments = _arguments(kernel, args, kwargs)
            sizes = _sizes(grid, arguments)
            if self.mode == "interpret":
                self._interpret(kernel, sizes, arguments)
                return None
            compiled = compile_and_launch(kernel, *args, grid=sizes, warmup=False, **kwargs)
            self._compiled(kernel, sizes, arguments, compiled)
            return compiled

        return run

    def _interpret(
        self, kernel: JITFunction, grid: tuple[int, int, int], arguments: dict[str, Any]
    ) -> None:
        name = kernel.fn.__name__
        tensors = _tensors(arguments)
        for argument, tensor in tensors:
            if tensor.device.type != "cpu":
                raise ValueError(
                    f"{argument}: got a tensor on {tensor.device}, allowed is cpu in mode "
                    "'interpret'; mode='compile' takes meta tensors"
                )
        recorder = Recorder(tensors) if self.trace else None
        interpreter.run(kernel, grid, arguments, self.target, recorder)
        trace = recorder.finish() if recorder else None
        self.launches.append(Launch(name, self.gpu.arch, grid, arguments, trace=trace))
        if trace is not None and self.check:
            trace.check(name)

    def _compiled(
        self,
        kernel: JITFunction,
        grid: tuple[int, int, int],
        arguments: dict[str, Any],
        compiled: Any,
    ) -> None:
        simulation = None
        if self.mode == "simulate":
            from fastdit.testing.simulator import simulate

            simulation = simulate(compiled, grid, arguments)
        self.launches.append(
            Launch(kernel.fn.__name__, self.gpu.arch, grid, arguments, compiled, None, simulation)
        )


_JIT_RUN = JITFunction.run


def _arguments(kernel: JITFunction, args: tuple[Any, ...], kwargs: Any) -> dict[str, Any]:
    own = {name: value for name, value in kwargs.items() if name in kernel.arg_names}
    bound = inspect.signature(kernel.fn).bind(*args, **own)
    bound.apply_defaults()
    return dict(bound.arguments)


def _sizes(grid: Any, arguments: dict[str, Any]) -> tuple[int, int, int]:
    sizes = tuple(grid(arguments) if callable(grid) else grid)
    return tuple(map(int, (*sizes, 1, 1)[:3]))  # type: ignore[return-value]


def _tensors(arguments: dict[str, Any]) -> list[tuple[str, torch.Tensor]]:
    """The tensors among the arguments, also inside tuples, descriptors and wrappers."""
    found: list[tuple[str, torch.Tensor]] = []

    def visit(name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found.append((name, value))
        elif isinstance(value, tuple):
            for index, item in enumerate(value):
                visit(f"{name}[{index}]", item)
        elif isinstance(getattr(value, "base", None), torch.Tensor):
            found.append((name, value.base))

    for name, value in arguments.items():
        visit(name, value)
    return found


def trace(
    function: Callable[..., Any], *args: Any, arch: str | int = "sm_90", **kwargs: Any
) -> list[Launch]:
    """Run `function(*args, **kwargs)` in the interpreter and return its launches, traced.

    Faults are reported in each `launch.trace`, not raised.
    """
    with VirtualGPU(arch, check=False) as gpu:
        function(*args, **kwargs)
    return gpu.launches


class _Utils:
    """The part of a driver that loads binaries and knows the device's limits."""

    def __init__(self, gpu: GPU) -> None:
        self.gpu = gpu

    def get_device_properties(self, _device: Any) -> dict[str, int]:
        return {
            "max_shared_mem": 1024 * self.gpu.shared_kib_of_block,
            "multiprocessor_count": self.gpu.multiprocessors,
            "max_num_regs": 65536,
            "warpSize": self.gpu.warp_size,
        }

    def load_binary(self, name: str, *_: Any) -> tuple[str, str, int, int, int]:
        return name, name, 0, 0, 1024

    def unload_module(self, _module: Any) -> None: ...


class _Driver(GPUDriver):
    """Triton's view of the virtual GPU; the device "index" is the architecture's name, so that
    Triton's caches of compiled kernels keep one entry for each."""

    def __init__(self, virtual: VirtualGPU) -> None:
        self.virtual = virtual
        self.utils = _Utils(virtual.gpu)
        self.launcher_cls = lambda _source, _metadata: lambda *_: None
        self.get_current_stream = lambda _device=None: 0
        self.get_current_device = lambda: virtual.gpu.arch
        self.set_current_device = lambda _device: None
        arch = virtual.gpu.triton_arch
        self.get_device_capability = lambda *_: divmod(arch if isinstance(arch, int) else 94, 10)

    @staticmethod
    def is_active() -> bool:
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return self.virtual.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cpu

    def get_benchmarker(self) -> Callable[..., list[float]]:
        def benchmark(call: Callable[[], Any], quantiles: Any = None, **_: Any) -> list[float]:
            """Runs each configuration; no time is known, so that an autotuner takes the first."""
            call()
            return [1.0] * len(quantiles or (0.5,))

        return benchmark

    def get_empty_cache_for_benchmark(self) -> None: ...

    def clear_cache(self, _cache: Any) -> None: ...
