"""Triton's interpreter on CPU tensors, in this process and with a GPU's arithmetic.

Upstream's interpreter is chosen by an environment variable before Triton is imported. Here it is
switched on for one launch and off again, so that the same kernels also compile in the process.
`tl.dot` has the target's least block sizes; `numerics` holds the corrected arithmetic.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import triton.language as tl
from triton import knobs
from triton.compiler import make_backend
from triton.language.extra import libdevice
from triton.runtime import interpreter as upstream
from triton.runtime.jit import JITFunction

from fastdit.testing import numerics
from fastdit.testing.tracing import Recorder


def _call_helper(helper: JITFunction, *args: Any, **kwargs: Any) -> Any:
    """Stands in for `JITFunction.__call__`: a kernel calls another @triton.jit function."""
    kwargs.pop("_semantic", None)
    kwargs.pop("_generator", None)
    return _rewritten(helper.fn)(*args, **kwargs)


@functools.cache
def _rewritten(function: Callable[..., Any]) -> Callable[..., Any]:
    return upstream.InterpretedFunction(function).rewrite()


@contextlib.contextmanager
def _interpreting(target: Any, recorder: Recorder | None) -> Iterator[None]:
    """Inside, Triton's language runs on numpy; patched once a launch, where upstream patches
    anew for every call of a helper and leaves that behind."""
    builder = upstream.interpreter_builder
    backend = make_backend(target)
    codegen = backend.get_codegen_implementation(backend.parse_options({}))
    language = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    with contextlib.ExitStack() as stack:
        stack.enter_context(knobs.runtime.scope())
        knobs.runtime.interpret = True
        scope = upstream._patch_lang(language)
        stack.callback(scope.restore)
        scope.set_attr(tl.tensor, "__index__", lambda self: int(self.handle.data.squeeze()))
        for name, member in inspect.getmembers(libdevice, inspect.isfunction):
            if not name.startswith("_"):
                scope.set_attr(libdevice, name, numerics.libdevice_function(member.__name__))
        least = mock.patch.dict(builder.codegen_fns, min_dot_size=codegen["min_dot_size"])
        stack.enter_context(least)
        stack.enter_context(mock.patch.object(JITFunction, "__call__", _call_helper))
        stack.enter_context(numerics.installed(recorder))
        yield


def run(
    kernel: JITFunction,
    grid: tuple[int, int, int],
    arguments: dict[str, Any],
    target: Any,
    recorder: Recorder | None,
) -> None:
    """Interpret every program of a launch.

    Args:
        kernel: the @triton.jit function.
        grid: three sizes.
        arguments: every parameter by name, tensors on the CPU.
        target: Triton's `GPUTarget`, for the least block sizes of `tl.dot`.
        recorder: where to record, or None.
    """
    builder = upstream.interpreter_builder
    function = _rewritten(kernel.fn)
    constant = {param.name for param in kernel.params if param.is_constexpr}
    with _interpreting(target, recorder):
        values = {
            name: value if name in constant else upstream._implicit_cvt(value)
            for name, value in arguments.items()
        }
        builder.set_grid_dim(*grid)
        for x, y, z in np.ndindex(*grid):
            builder.set_grid_idx(x, y, z)
            if recorder is not None:
                recorder.grid, recorder.program = grid, (x, y, z)
            function(**values)
