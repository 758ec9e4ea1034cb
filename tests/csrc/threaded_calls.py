"""Calls of the compiled library that several threads share, in one process.

    python threaded_calls.py <library> <group> ...

Run by test_threads.py under ThreadSanitizer, with a library whose threads it sees. Every call runs
as it is; then again with pieces that overlap, which is a race in all of them. A line on stderr
before each call tells which: the reports below it are its own.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from forward_models import inputs, small
from torch import Tensor

from fastdit import backends, native
from fastdit.native_forward import NativeForward

THREADS = 4  # thread_pool.cpp's
STORED = (torch.float32, torch.bfloat16)
Calls = Iterator[tuple[str, Callable[[], object]]]


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


def row_calls() -> Calls:
    op = torch.ops.fastdit_native
    for dtype in STORED:
        x, y, dout, dh = (random(3, 40, 100, dtype=dtype) for _ in range(4))
        weight, bias = random(100, dtype=dtype), random(100, dtype=dtype)
        mean, rstd = random(3, 40), random(3, 40).abs() + 1
        for modulation in (random(3, 300, dtype=dtype), random(3, 40, 300, dtype=dtype)):
            shift, scale, gate = modulation.chunk(3, -1)
            rest = (shift, scale, weight, bias)
            yield "adaln", lambda a=(x, *rest, 1e-6, "layer", True): op.adaln(*a)
            gated = (x, y, gate, *rest, 1e-6, "layer", True)
            yield "gated_adaln", lambda a=gated: op.gated_adaln(*a)
            yield "gated_residual", lambda a=(x, y, gate): op.gated_residual(*a)
            back = (dout, x, mean, rstd, *rest, "layer", True)
            yield "adaln_backward", lambda a=back: op.adaln_backward(*a)
            back = (dh, dout, x, mean, rstd, y, gate, *rest, "layer", True)
            yield "gated_adaln_backward", lambda a=back: op.gated_adaln_backward(*a)
            back = (dout, y, gate)
            yield "gated_residual_backward", lambda a=back: op.gated_residual_backward(*a)
        halves = (random(200, dtype=dtype), "silu", True)
        up = random(3, 40, 200, dtype=dtype)
        yield "glu", lambda a=(up, None, *halves): op.glu(*a)
        yield "glu_backward", lambda a=(x, up, None, *halves): op.glu_backward(*a)
        yield "bias_gelu", lambda a=(x, bias): op.bias_gelu(*a)
        yield "bias_gelu_backward", lambda a=(dout, x, bias): op.bias_gelu_backward(*a)


def patch_calls() -> Calls:
    op = torch.ops.fastdit_native
    for dtype in STORED:
        for size, width in ((128, 2), (16, 512), (2, 3000)):
            x, weight = random(1, 4, size, size, dtype=dtype), random(width, 4, 2, 2, dtype=dtype)
            tokens = size * size // 4
            bias, pos = random(width, dtype=dtype), random(1, tokens, width, dtype=dtype)
            yield "patch_embed", lambda a=(x, weight, bias, pos): op.patch_embed(*a)
            dtokens = random(1, tokens, width, dtype=dtype)
            back = (dtokens, x, weight, bias, pos, True, True, True, True)
            yield "patch_embed_backward", lambda a=back: op.patch_embed_backward(*a)
        tokens, image = random(2, 4096, 16, dtype=dtype), random(2, 4, 128, 128, dtype=dtype)
        yield "unpatchify", lambda a=(tokens, [2, 2], [64, 64], 4): op.unpatchify(*a)
        yield (
            "unpatchify_backward",
            lambda a=(image, [2, 2], [64, 64], 4): op.unpatchify_backward(*a),
        )


def step_calls() -> Calls:
    op = torch.ops.fastdit_native
    table, step = random(4, 9).abs(), torch.tensor([2, 0])
    for dtype in STORED:
        x, noise, previous = (random(2, 4, 32, 32, dtype=dtype) for _ in range(3))
        image, rows = (random(*shape, dtype=dtype) for shape in ((4, 8, 32, 32), (4, 256, 32)))
        guided = (previous, 0.9, True, 3)
        given = (x, image, table, step, noise, *guided, None, None)
        drawn = (x, rows, table, step, None, *guided, torch.tensor(7), [2, 2])
        for call in (given, drawn):
            into = (*call, torch.empty_like(x), torch.empty_like(x))
            yield "diffusion_step", lambda a=call: op.diffusion_step(*a)
            yield "diffusion_step_into", lambda a=into: op.diffusion_step_into(*a)


def forward_calls() -> Calls:
    """A batch whose samples share the threads in every layer, one each, more and a rest."""
    for quantize in (None, "int8"):
        run = NativeForward(small(input_size=(16, 24), depth=1), quantize)
        yield "forward_pack", run._pack
        for batch in (1, THREADS, 2 * THREADS + 1):
            x, t, y = inputs(run.model, batch)
            rows = random(batch, sum(run.model.rows_widths))
            yield "forward_conditioning", lambda run=run, a=(t, y): run.conditioning(*a)
            yield "forward", lambda run=run, a=(x, rows): run.parts(*a)
            yield "forward_labelled", lambda run=run, a=(x, t, y): run(*a)
        yield "forward_labelled", lambda run=run, a=(x, t, y): from_two_threads(lambda: run(*a))


def small_forward() -> tuple[str, Callable[[], object]]:
    """A sample a thread: in the layers no piece can overlap, since threads take what is left. It is
    small because each of its races is reported."""
    run = NativeForward(small(input_size=8, depth=1))
    x, rows = inputs(run.model, THREADS)[0], random(THREADS, sum(run.model.rows_widths))
    return "forward", lambda: run(x, None, None, conditioning=rows)


def direct_calls() -> Calls:
    """Past the dispatcher, from two threads at once: the interpreter's lock is let go meanwhile."""
    x, y, gate, shift, scale = random(3, 40, 100), random(3, 40, 100), *random(3, 3, 100)
    plain = (shift, scale, None, None, 1e-6, "layer", True)
    step = random(2, 4, 32, 32), random(2, 8, 32, 32), random(4, 9).abs(), 2
    for name, arguments in {
        "adaln": (x, *plain),
        "gated_adaln": (x, y, gate, *plain),
        "gated_residual": (x, y, gate),
        "bias_gelu": (x, gate[0]),
        "unpatchify": (random(2, 256, 16), 2, (16, 16), 4),
        "diffusion_step": (*step, None, None, None, True, 0, 7, None),
    }.items():
        call = backends.direct_calls[name]
        assert call(*arguments) is not None, name
        yield name, lambda c=call, a=arguments: from_two_threads(lambda: c(*a))


GROUPS = {
    "rows": row_calls,
    "patches": patch_calls,
    "step": step_calls,
    "forward": forward_calls,
    "direct": direct_calls,
}


def from_two_threads(call: Callable[[], object]) -> None:
    both = [threading.Thread(target=call) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()


def kernels() -> set[str]:
    """The ops of the library that have a kernel on CPUs."""
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("fastdit_native::")]
    found = [n for n in names if torch._C._dispatch_has_kernel_for_dispatch_key(n, "CPU")]
    return {name.removeprefix("fastdit_native::") for name in found}


def say(*words: str) -> None:
    os.write(2, ("-- " + " ".join(words) + "\n").encode())


def load(library: str) -> ctypes.CDLL:
    """Lazily, since a library for fewer instruction sets has functions that are not there."""
    process = ctypes.CDLL(None)
    process.dlopen.restype, process.dlerror.restype = ctypes.c_void_p, ctypes.c_char_p
    handle = process.dlopen(library.encode(), os.RTLD_LAZY)
    if not handle:
        raise OSError(process.dlerror().decode())
    return ctypes.CDLL(library, handle=handle)


def main(library: str, *groups: str) -> None:
    loaded = load(library)
    native._State.loaded = Path(library), None
    torch.get_num_threads = lambda: THREADS
    torch.manual_seed(0)
    if "direct" in groups:
        backends.kernels_for("adaln", "cpu")
    with torch.no_grad():
        calls = [call for group in groups for call in GROUPS[group]()]
        broken = [call for call in calls if not call[0].startswith("forward")]
        if "forward" in groups:
            broken.append(small_forward())
        for how, each in (("as it is", calls), ("overlapping", broken)):
            loaded.overlap(each is broken)
            for name, call in each:
                say(how, name)
                call()
    say("kernels", *sorted(kernels()))
    say("isa", torch.ops.fastdit_native.cpu_isa())


if __name__ == "__main__":
    main(*sys.argv[1:])
