"""What a replacement is, and when one steps aside for a call.

A rule recognises modules by their children and attributes, never by where they were imported from,
and brings a forward for them. It is installed as `module.forward`, an attribute of the instance,
which is what accelerate, diffusers' hooks and Hugging Face `kernels` do too. Why not a new class:
`isinstance`, wrap policies and registries keyed by class keep working, `fully_shard` may change
the class before or after, and undoing is deleting one attribute. The attribute is a
`functools.partial` of a module-level function and of the module, so that `copy.deepcopy` and
`pickle` bind the copy's forward to the copy.

A replacement does the work of some children, the norms above all, without calling them. Where
somebody watches such a child, by a hook or by a forward of its own, that call runs the original.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules import module as _module

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of one call of a module: positional and by name."""

_GLOBAL_HOOKS = (
    _module._global_forward_hooks,
    _module._global_forward_pre_hooks,
    _module._global_backward_hooks,
    _module._global_backward_pre_hooks,
)


@dataclass(frozen=True)
class Rule:
    """How one kind of module is recognised and replaced.

    Attributes:
        name: what it is, for the report.
        ops: what it runs instead, for the report.
        forward: made by `replacement`; takes the module, then its arguments.
        recognises: whether a module has the structure.
        refuses: why a recognised module is left alone, or None.
        probe: calls that exercise the module, for `fastdit.patching.probe`.
        level: the least level that installs it.
        shortens: children, lists of equal blocks, of which two are enough for the proof.
    """

    name: str
    ops: str
    forward: Callable[..., Any]
    recognises: Callable[[nn.Module], bool]
    probe: Callable[[nn.Module], Iterable[Call]]
    refuses: Callable[[nn.Module], str | None] = lambda module: None
    level: str = "exact"
    shortens: tuple[str, ...] = ()

    @property
    def covers(self) -> tuple[str, ...]:
        """Children whose work the replacement does itself."""
        return self.forward.covers


def is_ours(forward: Any) -> bool:
    """Whether a module's `forward` attribute was installed by a rule."""
    return isinstance(forward, functools.partial) and hasattr(forward.func, "covers")


def own_forward(module: nn.Module) -> Any:
    """The forward that the instance has beside its class's; None for most."""
    return module.__dict__.get("forward")


def watched(module: nn.Module) -> bool:
    """Whether a call of the module is seen or changed by anything but its class: a hook, a forward
    of its own, `module.compile()`."""
    forward = own_forward(module)
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl is not None
        or (forward is not None and not is_ours(forward))
    )


def any_watched(modules: Iterable[nn.Module | None]) -> bool:
    """Whether any of the modules is watched, or every module is, by global hooks."""
    return any(_GLOBAL_HOOKS) or any(m is not None and watched(m) for m in modules)


def child(module: nn.Module, path: str) -> nn.Module | None:
    """The child at a dotted path, None where there is none."""
    found: Any = module
    for name in path.split("."):
        found = found._modules.get(name) if isinstance(found, nn.Module) else None
    return found


def replacement(*covers: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function of (module, *args) one that a rule can install.

    It returns `NotImplemented` for a call that it does not cover; the original then runs, as it
    does while one of the children `covers` is watched.
    """

    def decorate(forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def replaced(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if not any_watched([child(self, path) for path in covers]):
                result = forward(self, *args, **kwargs)
                if result is not NotImplemented:
                    return result
            return type(self).forward(self, *args, **kwargs)

        replaced.covers = covers  # type: ignore[attr-defined]
        return replaced

    return decorate


def install(module: nn.Module, rule: Rule) -> Any:
    """Replace the module's forward; its signature and docstring stay visible. Returns it."""
    bound = functools.partial(rule.forward, module)
    functools.update_wrapper(bound, types.MethodType(type(module).forward, module))
    module.forward = bound
    return bound
