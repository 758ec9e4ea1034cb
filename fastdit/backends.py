"""Which implementation of an op runs, and why.

Every op has a `reference` implementation, plain eager PyTorch. Kernels register themselves here as
the `native` implementation of an op on one kind of device. Under `auto`, the default, a call runs
the first registered kernel that supports it and is not known to be slower there, otherwise the
reference. An explicit choice is kept to: `native` raises `BackendError` with the reason where no
kernel supports the call, and asks for no speed.

The choice is one setting for the whole process, like `torch.backends`' flags, because the
backward pass runs on threads of autograd's own that would not see a thread-local one.
"""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

BACKENDS = ("auto", "reference", "native")
OPS = (
    "adaln",
    "gated_residual",
    "gated_adaln",
    "attention",
    "bias_gelu",
    "glu",
    "patch_embed",
    "unpatchify",
    "diffusion_step",
)


class BackendError(RuntimeError):
    """The backend asked for cannot run this call; the message says why."""


def _always(*_args: Any) -> None:
    return None


@dataclass(frozen=True)
class Kernel:
    """A native implementation of `op` (or of `<op>_backward`) on one device type.

    `run` takes the arguments of `torch.ops.fastdit.<op>` in the schema's order; `unsupported`
    takes the same and returns why it cannot run them, or None if it can; `slower` takes the same
    and returns why `auto` should pass it over for a faster implementation, or None. A `run` that
    `checks_arguments` raises for wrong ones before it touches them. Where it has a `direct` call,
    `auto` asks `slower` of differentiated ones of fewer elements than `differentiated_from` alone.
    Where it `takes_out`, `run` also takes `out=`, a tensor or None for each public result, and
    returns these or new ones.
    """

    op: str
    device: str
    name: str
    run: Callable[..., Any]
    unsupported: Callable[..., str | None] = _always
    slower: Callable[..., str | None] = _always
    checks_arguments: bool = False
    direct: Callable[..., Any] | None = None
    differentiated_from: int = 0
    takes_out: bool = False

    def rejected(self, *args: Any) -> str | None:
        """Why the backend asked for now does not run these arguments here, or None."""
        why = self.unsupported(*args)
        if why is None and _setting.requested == "auto":
            why = self.slower(*args)
        return why


PROVIDERS = {"cpu": ("fastdit.native",), "cuda": ("fastdit.native", "fastdit.kernels.registry")}
"""Modules that register the kernels of a device type, imported at the first call on it."""


def _no_direct_call(*_args: Any) -> None:
    return None


direct_calls: dict[str, Callable[..., Any]] = dict.fromkeys(OPS, _no_direct_call)
"""Every op's direct call on CPUs: that of its first kernel, which takes unchecked arguments and,
behind them or not, the public function's `out`. It returns None where the ordinary call has to
decide, or NotImplemented where only autograd has to see it. Where there is none, a function that
does only the first."""
differentiated_from: dict[str, int] = dict.fromkeys(OPS, 0)
"""The elements from which that kernel runs any differentiated call, under the backend asked for."""


class _Setting:
    requested = "auto"


_setting = _Setting()
_kernels: dict[tuple[str, str], list[Kernel]] = {}
_missing: list[str] = []
_loaded: set[str] = set()
_loading = threading.RLock()


def _load(device: str) -> bool:
    """Import the providers of `device`'s kernels, once; other threads wait, it may take a while."""
    if device not in _loaded:
        with _loading:
            if device not in _loaded:
                for module in PROVIDERS.get(device, ()):
                    importlib.import_module(module).register_all()
                _loaded.add(device)
    return True


# What torch.compiler.assume_constant_result does, without its import of Dynamo (0.6 s): run this
# while tracing instead of tracing it.
_load._dynamo_marked_constant = True  # type: ignore[attr-defined]


def kernels_for(op: str, device: str) -> list[Kernel]:
    """The kernels of `op` on one device type, the fastest first."""
    _load(device)
    return _kernels.setdefault((op, device), [])


def note_missing(reason: str) -> None:
    """A provider could not register its kernels: the reason, for the messages that name none."""
    _missing.append(reason)


def _none_registered() -> str:
    return "; ".join(["no kernel is registered for this device", *_missing])


def register(kernel: Kernel) -> None:
    """Add `kernel` behind those registered for its op and device: the fastest goes first."""
    _kernels.setdefault((kernel.op, kernel.device), []).append(kernel)
    _choose_direct_calls()


def unregister(kernel: Kernel) -> None:
    """Take `kernel` out again."""
    _kernels[kernel.op, kernel.device].remove(kernel)
    _choose_direct_calls()


@contextlib.contextmanager
def replaced(op: str, device: str, kernels: list[Kernel]) -> Iterator[None]:
    """Inside the block, have these kernels of an op in place of those registered: for tests."""
    before = kernels_for(op, device)
    _kernels[op, device] = kernels
    _choose_direct_calls()
    try:
        yield
    finally:
        _kernels[op, device] = before
        _choose_direct_calls()


def _choose_direct_calls() -> None:
    """After a change of kernels or of the backend asked for: a call itself then asks nothing."""
    for op in OPS:
        kernels = _kernels.get((op, "cpu")) if _setting.requested != "reference" else None
        first = kernels[0] if kernels else None
        direct_calls[op] = (first and first.direct) or _no_direct_call
        automatic = _setting.requested == "auto"
        differentiated_from[op] = first.differentiated_from if first and automatic else 0


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every op inside the block with one backend.

    Args:
        name: `"auto"` (the fastest that supports the call), `"reference"` (eager PyTorch) or
            `"native"` (fastdit's kernels, or a `BackendError` saying why not).

    Raises:
        ValueError: `name` is none of these.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend: got {name!r}, allowed are {', '.join(map(repr, BACKENDS))}")
    previous, _setting.requested = _setting.requested, name
    _choose_direct_calls()
    try:
        yield
    finally:
        _setting.requested = previous
        _choose_direct_calls()


def current_backend() -> str:
    """The backend asked for now: `"auto"` outside any `fastdit.backend` block."""
    return _setting.requested


def select(op: str, device: str, args: tuple[Any, ...]) -> Kernel | None:
    """The kernel that runs this call, or None for the reference.

    Raises:
        BackendError: `native` is asked for and no kernel supports the call.
    """
    if _setting.requested == "reference":
        return None
    kernels = kernels_for(op, device)
    for kernel in kernels:
        if kernel.rejected(*args) is None:
            return kernel
    if _setting.requested == "native":
        reasons = [f"{kernel.name}: {kernel.unsupported(*args)}" for kernel in kernels]
        raise BackendError(
            f"backend 'native' cannot run {op} on {device}: "
            + ("; ".join(reasons) or _none_registered())
            + ". Use fastdit.backend('auto') or fastdit.backend('reference')."
        )
    return None


@dataclass(frozen=True)
class Choice:
    """What would run for one op on one device type, and why the others would not."""

    op: str
    device: str
    runs: str
    reason: str
    rejected: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.op} on {self.device}: {self.runs} ({self.reason})"]
        return "\n".join(lines + [f"  not {name}: {why}" for name, why in self.rejected])


class Explanation(tuple[Choice, ...]):
    """The `Choice`s of an `explain` call; printed, one op a line."""

    def __str__(self) -> str:
        return "\n".join(map(str, self))

    __repr__ = __str__


def devices() -> tuple[str, ...]:
    """The device types that this machine can run ops on."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return ("cpu",) if accelerator is None else ("cpu", accelerator.type)


def checked_device(device: torch.device | str) -> torch.device:
    """The device of this name, if this machine can compute on it; meta too.

    Raises:
        ValueError: it cannot, or no device has this name.
    """
    allowed = (*devices(), "meta")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        found = None
    if found is None or found.type not in allowed:
        raise ValueError(f"device: got {str(device)!r}, allowed is {', '.join(allowed)}")
    return found


def explain(op: str | None = None, *args: Any, **kwargs: Any) -> Explanation:
    """Tell what would run, without running it.

    Args:
        op: the name of an op; None for all of them.
        *args, **kwargs: the arguments of one call of `fastdit.ops.<op>`. Without them the answer
            is for any call on each of this machine's devices.

    Returns:
        An `Explanation`; print it, or read its `Choice`s.

    Raises:
        ValueError: there is no such op, or its arguments are wrong.

    Example:
        >>> print(fastdit.explain("adaln", x, shift, scale))
        adaln on cpu: reference (no kernel is registered for this device)
    """
    if op is not None and op not in OPS:
        raise ValueError(f"op: got {op!r}, allowed are {', '.join(OPS)}")
    if op is None and (args or kwargs):
        raise ValueError("op: got None with arguments, allowed is the name of the op they are for")
    if op is not None and (args or kwargs):
        from fastdit.ops import _library

        device, schema_args = _library.OPS[op].bind(*args, **kwargs)
        return Explanation([_choice(op, device, schema_args)])
    names = OPS if op is None else (op,)
    return Explanation(_choice(name, device, None) for device in devices() for name in names)


def _choice(op: str, device: str, args: tuple[Any, ...] | None) -> Choice:
    """`args` None asks what is registered; otherwise what supports these arguments."""
    kernels = kernels_for(op, device)
    verdicts = [(k.name, k.rejected(*args) if args is not None else None) for k in kernels]
    rejected = tuple((name, why) for name, why in verdicts if why is not None)
    fit = [name for name, why in verdicts if why is None]
    if current_backend() == "reference":
        return Choice(op, device, "reference", "asked for by fastdit.backend")
    if fit:
        return Choice(op, device, fit[0], "the fastest kernel that supports the call", rejected)
    reason = "no kernel takes this call" if kernels else _none_registered()
    if current_backend() == "native":
        return Choice(op, device, "an error", f"backend 'native' was asked for; {reason}", rejected)
    return Choice(op, device, "reference", reason, rejected)
