"""How an op becomes one: schema, fake kernel, autograd and the choice of implementation.

A public op checks its arguments and hands them, in the schema's order, to an `Op`. Where no kernel
is chosen the `Op` calls the eager reference itself: autograd differentiates it, and
`torch.compile` fuses it, like any PyTorch code. Where a kernel is chosen the call goes through
`torch.ops.fastdit.<name>`: one opaque node with a fake kernel and a registered backward, which is
another op, `<name>_backward`.

`torch.ops.fastdit.<name>` can also be called directly, on any device and under any backend.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastdit import backends
from fastdit.ops import _results

Function = TypeVar("Function", bound=Callable[..., Any])

_LIB = torch.library.Library("fastdit", "DEF")
OPS: dict[str, Op] = {}
_PLAIN = (Tensor, torch.nn.Parameter)
DEFINITIONS: dict[str, Definition] = {}
"""Every op with a schema, backward ops included. A compiled kernel with the same schema has the
same fake."""


def _without_autocast(run: Callable[..., Any], device: str, args: tuple[Any, ...]) -> Any:
    if device != "meta" and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return run(*args)
    return run(*args)


def differentiates(args: tuple[Any, ...]) -> bool:
    """Whether autograd has to see a call with these arguments."""
    return torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)


def _transformed() -> bool:
    """Whether vmap, jvp or another transform of torch.func runs: kernels know nothing of these, the
    reference, made of PyTorch's own ops, does."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
    )


def _unobserved() -> bool:
    """Whether neither a trace nor a mode nor a transform wants to see an op."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._is_tracing()
        or _transformed()
    )


def _ordinary(args: tuple[Any, ...]) -> bool:
    """Whether the dispatcher would only run the kernel: plain tensors of one device, and nothing
    that wants to see the op."""
    if not _unobserved():
        return False
    device = args[0].device
    for value in args:
        if isinstance(value, Tensor) and (type(value) not in _PLAIN or value.device != device):
            return False
    return True


def _graphed(kernel: backends.Kernel, args: tuple[Any, ...]) -> bool:
    """Whether torch.compile should have the kernel's own op in its graph, in place of fastdit's,
    which is a function in Python and takes 20 µs more a call. Not where autograd has to see the
    call, nor in an exported program, which is to run on machines with other kernels."""
    return (
        isinstance(kernel.run, torch._ops.OpOverload)
        and torch.compiler.is_dynamo_compiling()
        and not torch.compiler.is_exporting()
        and not differentiates(args)
    )


class Definition:
    """`torch.ops.fastdit.<name>`: the chosen kernel, else `reference`, never autocast.

    The first argument of the schema is a tensor: its device is the op's. Called, it is the op, past
    the dispatcher where that would only cost time (20 µs).
    """

    def __init__(
        self, schema: str, reference: Callable[..., Any], fake: Callable[..., Any]
    ) -> None:
        self.name = schema.partition("(")[0]
        self.reference, self.fake = reference, fake
        tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
        _LIB.define(schema, tags=tags)
        _LIB.impl(self.name, self.run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastdit::{self.name}", fake, lib=_LIB)
        self.overload = getattr(torch.ops.fastdit, self.name).default
        DEFINITIONS[self.name] = self

    def run(self, *args: Any) -> Any:
        """What is behind the op."""
        device = args[0].device.type
        chosen = backends.select(self.name, device, args)
        return _without_autocast(chosen.run if chosen else self.reference, device, args)

    def __call__(self, *args: Any) -> Any:
        at_once = _ordinary(args) and not differentiates(args)
        return self.run(*args) if at_once else self.overload(*args)

    def behind(self, ctx: Any, *args: Any) -> Any:
        """The op, called by a backward with the first gradient and what its forward saved.

        A node of `_node` has seen to everything but this gradient, and a kernel took its forward.
        Where the backward has but one, it is asked nothing again: 4 of 54 µs of a small pass.
        """
        device = getattr(ctx, "device_type", None)
        gradient = args[0]
        if (
            device is not None
            and type(gradient) is Tensor
            and gradient.device.type == device
            and not torch.is_grad_enabled()
            and _unobserved()
            and backends.current_backend() != "reference"
        ):
            kernels = backends.kernels_for(self.name, device)
            if len(kernels) == 1:
                return _without_autocast(kernels[0].run, device, args)
        return self(*args)


def define(schema: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> Definition:
    """Define `torch.ops.fastdit.<name>`, a backward op: it has no gradient of its own."""
    definition = Definition(schema, reference, fake)

    def refuse(_ctx: Any, *_gradients: Any) -> Any:
        raise RuntimeError(
            f"{definition.name} cannot be differentiated; second derivatives need "
            "fastdit.backend('reference')"
        )

    torch.library.register_autograd(f"fastdit::{definition.name}", refuse, lib=_LIB)
    return definition


def gradient_like(inputs: tuple[Tensor | None, ...], x: Tensor) -> tuple[Tensor, ...]:
    """Fake gradients: contiguous like each input, empty where it is absent."""
    return tuple(
        x.new_empty(0) if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device)
        for t in inputs
    )


def present(
    gradients: tuple[Tensor, ...], inputs: tuple[Tensor | None, ...]
) -> list[Tensor | None]:
    """The gradients of the inputs that are there, None for the others."""
    return [g if t is not None else None for g, t in zip(gradients, inputs, strict=True)]


def _node(
    name: str, setup_context: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """An op for calls that only autograd needs to see, of a kernel's `run`, a device and arguments.

    register_autograd's way through the dispatcher costs 70 µs more, forward and backward, and an
    `autograd.Function` with a `setup_context` of its own 25: it binds a signature at each call.
    """

    def forward(ctx: Any, run: Callable[..., Any], device: str, *args: Any) -> Any:
        results = _without_autocast(run, device, args)
        setup_context(ctx, args, results)
        ctx.device_type = device
        return results

    def gradients(ctx: Any, *incoming: Any) -> Any:
        return None, None, *backward(ctx, *incoming)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(gradients)}
    return type(name, (torch.autograd.Function,), methods).apply


class Op:
    """A differentiable op: its public function's checks, its schema op and its reference.

    The schema op may return more than the reference does: what its backward wants saved, such as
    the rows' statistics. `saving` is then the reference with these further outputs, and `returns`
    how many of them the public function returns.

    `out` are the names of the results that the public function takes as `out=`, each like the first
    argument, and `replaceable` those of the arguments that one of them may be. Where they have
    another shape, `shape` gives it from the schema's arguments.
    """

    def __init__(
        self,
        schema: str,
        *,
        reference: Callable[..., Any],
        fake: Callable[..., Any],
        setup_context: Callable[..., None],
        backward: Callable[..., Any],
        saving: Callable[..., Any] | None = None,
        returns: int | None = None,
        out: tuple[str, ...] = (),
        replaceable: tuple[str, ...] = (),
        shape: Callable[..., tuple[int, ...]] | None = None,
    ) -> None:
        self.name = schema.partition("(")[0]
        self.reference = reference
        self.returns = returns
        self.out, self.replaceable, self.shape = out, replaceable, shape
        definition = Definition(schema, saving or reference, fake)
        self.overload = definition.overload
        torch.library.register_autograd(
            f"fastdit::{self.name}", backward, setup_context=setup_context, lib=_LIB
        )
        self._apply = _node(self.name, setup_context, backward)
        OPS[self.name] = self

    def public(self, checks: Callable[..., tuple[Any, ...]]) -> Callable[[Function], Function]:
        """Decorate the public function with the checks that turn its call into schema arguments.

        They have the public function's names of arguments, in the schema's order where it calls
        `checked`.
        """
        self.checks = checks
        self.names = tuple(inspect.signature(checks).parameters)

        def decorate(function: Function) -> Function:
            self.signature = inspect.signature(function)
            return function

        return decorate

    def bind(self, *args: Any, **kwargs: Any) -> tuple[str, tuple[Any, ...]]:
        """The device type and the checked schema arguments of a call of the public function."""
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        schema_args = self.checks(**{name: bound.arguments[name] for name in self.names})
        return schema_args[0].device.type, schema_args

    def checked(self, *args: Any, known: bool = False, out: Any = None) -> Any:
        """The public function's work, of schema arguments that nobody checked yet.

        `known` tells that a direct call did: all is in order, and only autograd has to see it. A
        kernel that checks its arguments itself runs at once: the checks in Python cost more than a
        small one (diffusion_step at 1×4×32×32: 3.5 of 15 µs). Where it refuses, they tell what is
        wrong.
        """
        if out is not None:
            return self.into(out, args)
        if known:
            kernel = backends.kernels_for(self.name, "cpu")[0]
            few = args[0].numel() < backends.differentiated_from[self.name]
            if few and kernel.slower(*args) is not None:
                return self.reference(*args)
            return self._returned(self._apply(kernel.run, "cpu", *args))
        if torch.compiler.is_compiling() or not isinstance(args[0], Tensor) or not _ordinary(args):
            return self(*self.checks(*args))
        device = args[0].device.type
        kernel = backends.select(self.name, device, args)
        if kernel is None:
            return self.reference(*self.checks(*args))
        if kernel.checks_arguments:
            try:
                return self._run(kernel, device, args)
            except RuntimeError:
                pass
        return self(*self.checks(*args))

    def into(self, out: Any, args: tuple[Any, ...], wanted: int | None = None) -> Any:
        """The public function's work into the tensors `out`, of arguments that nobody checked yet;
        the first `wanted` of its results, None for all."""
        schema_args = self.checks(*args)
        shape = self.shape and self.shape(*schema_args)
        outs = _results.given(out, self.out, wanted, schema_args[0], shape)
        every = (*schema_args, *outs)
        if differentiates(every):
            _results.refuse_gradients(self.name)
        if _ordinary(every) and not args[0].is_meta:
            inputs = dict(zip(self.names, args, strict=True))
            _results.check_apart(self.out, outs, inputs, self.replaceable)
            device = args[0].device.type
            kernel = backends.select(self.name, device, schema_args)
            if kernel is not None and kernel.takes_out and args[0].numel():
                _results.note_written(outs)
                run = functools.partial(kernel.run, out=outs if len(outs) > 1 else outs[0])
                results = self._returned(_without_autocast(run, device, schema_args))
                _results.copy_into(outs, results)
                return outs if len(outs) > 1 else out
        _results.copy_into(outs, self(*schema_args))
        return outs if len(outs) > 1 else out

    def _run(self, kernel: backends.Kernel, device: str, args: tuple[Any, ...]) -> Any:
        """Of a call that only autograd may need to see."""
        if differentiates(args):
            return self._returned(self._apply(kernel.run, device, *args))
        return self._returned(_without_autocast(kernel.run, device, args))

    def _returned(self, results: Any) -> Any:
        """Of the schema op's results, those that the public function returns."""
        if self.returns is None:
            return results
        return results[0] if self.returns == 1 else results[: self.returns]

    def __call__(self, *args: Any) -> Any:
        device = args[0].device.type
        chosen = backends.select(self.name, device, args)
        if chosen is None:
            return self.reference(*args)
        if _ordinary(args):
            return self._run(chosen, device, args)
        if (
            backends.current_backend() == "auto"
            and not torch.compiler.is_compiling()
            and _transformed()
        ):
            return self.reference(*args)
        if _graphed(chosen, args):
            return self._returned(chosen.run(*args))
        return self._returned(self.overload(*args))
