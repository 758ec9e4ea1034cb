"""`fastdit.patch`: find the sites, prove and install their replacements, report, undo."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from torch import nn

from fastdit.patching import native, probe
from fastdit.patching.leftover import why_left
from fastdit.patching.published_model import MODEL
from fastdit.patching.rules import Rule, child, install, is_ours, own_forward
from fastdit.patching.table import rules_for

LEVELS = ("exact", "fast")


@dataclass(frozen=True)
class Site:
    """One module that was replaced, or was not.

    Attributes:
        name: its name in the model.
        module: its class.
        rule: what it was recognised as; None where nothing recognises it.
        ops: what runs in its place; None where it was skipped.
        reason: why it was skipped; None where it was replaced.
    """

    name: str
    module: str
    rule: str | None = None
    ops: str | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Report:
    """What `fastdit.patch` did; print it for a table.

    Attributes:
        level: "exact" or "fast".
        replaced: sites that run fastdit's ops now.
        skipped: sites that were left alone, each with its reason.
    """

    level: str
    replaced: tuple[Site, ...]
    skipped: tuple[Site, ...]

    def __rich_console__(self, _console: Console, _options: ConsoleOptions) -> RenderResult:
        table = Table(title=f"fastdit.patch, level {self.level!r}", title_justify="left")
        for column in ("", "sites", "module", "is a", "runs / left alone because"):
            table.add_column(column, justify="right" if not column else "left")
        for sites, mark in ((self.replaced, "replaced"), (self.skipped, "skipped")):
            for group in _grouped(sites):
                first = group[0]
                names = _names([site.name for site in group])
                what = first.rule or ""
                table.add_row(
                    f"{len(group)} {mark}", names, first.module, what, first.ops or first.reason
                )
        yield table

    def __str__(self) -> str:
        console = Console(width=140, color_system=None)
        with console.capture() as captured:
            console.print(self)
        return captured.get()

    __repr__ = __str__


def _grouped(sites: tuple[Site, ...]) -> list[list[Site]]:
    """Sites that differ in nothing but numbers in their names."""
    groups: dict[tuple[Any, ...], list[Site]] = {}
    for site in sites:
        pattern = re.sub(r"\d+", "*", site.name)
        key = (pattern, site.module, site.rule, site.ops, site.reason)
        groups.setdefault(key, []).append(site)
    return list(groups.values())


def _names(names: list[str]) -> str:
    return names[0] or "(model)" if len(names) == 1 else re.sub(r"\d+", "*", names[0])


@dataclass(frozen=True)
class _Installed:
    name: str
    module: nn.Module
    forward: Any
    previous: Any


@dataclass
class Handle:
    """What `fastdit.patch` gives back: `report()` and `undo()`."""

    level: str
    sites: tuple[Site, ...] = ()
    _installed: list[_Installed] = field(default_factory=list, repr=False)

    def report(self) -> Report:
        """Every site replaced, and every site skipped with the reason. Print it for a table."""
        replaced = tuple(site for site in self.sites if site.reason is None)
        skipped = tuple(site for site in self.sites if site.reason is not None)
        return Report(self.level, replaced, skipped)

    def undo(self) -> None:
        """Put every forward back, bit for bit the model that was. Once undone, does nothing.

        Raises:
            RuntimeError: something else has been put over a replacement since; nothing is changed.
        """
        for entry in self._installed:
            if own_forward(entry.module) is not entry.forward:
                raise RuntimeError(
                    f"undo: {entry.name or 'the model'} has another forward than the one that was "
                    "installed; first take off what was put on it since (a hook of accelerate or "
                    "diffusers, a later patch)"
                )
        while self._installed:
            entry = self._installed.pop()
            _restore(entry.module, entry.previous)


def _restore(module: nn.Module, previous: Any) -> None:
    if previous is None:
        del module.forward
    else:
        module.forward = previous


class _Search:
    """One walk over a model: every site, and what replaces it."""

    def __init__(self, level: str, verify: bool) -> None:
        self.rules = rules_for(level)
        self.verify = verify
        self.proofs: dict[Any, str | None] = {}
        self.sites: list[Site] = []
        self.chosen: list[tuple[str, nn.Module, Rule]] = []
        self.seen: set[int] = set()

    def visit(self, name: str, module: nn.Module, inside: tuple[nn.Module, ...] = ()) -> None:
        if id(module) in self.seen:
            return
        self.seen.add(id(module))
        if own_code(module):
            reason = "runs the ops already"
            self.sites.append(Site(name, type(module).__name__, "fastdit's own", None, reason))
            return
        self.replace(name, module, inside)
        for child_name, below in module.named_children():
            path = f"{name}.{child_name}" if name else child_name
            self.visit(path, below, (*inside, module))

    def replace(self, name: str, module: nn.Module, inside: tuple[nn.Module, ...]) -> None:
        """Decide about one module; the children that its replacement covers are decided too."""
        kind = type(module).__name__
        recognised = [rule for rule in self.rules if rule.recognises(module)]
        for rule in recognised:
            reason = self.refusal(rule, module)
            ops = rule.ops if reason is None else None
            self.sites.append(Site(name, kind, rule.name, ops, reason))
            if reason is None:
                self.chosen.append((name, module, rule))
                below = [child(module, path) for path in rule.covers]
                self.seen.update(id(m) for c in below if c is not None for m in c.modules())
                break
        if not recognised and (reason := why_left(module, inside)) is not None:
            self.sites.append(Site(name, kind, None, None, reason))

    def refusal(self, rule: Rule, module: nn.Module) -> str | None:
        """Why a recognised module is not replaced."""
        forward = own_forward(module)
        if forward is not None and not is_ours(forward):
            return "it has a forward of its own, put there by a hook; patch before adding hooks"
        try:
            reason = rule.refuses(module)
        except AttributeError as error:  # another project's class by the same name
            return f"it is another {type(module).__name__} than that rule's: {error}"
        if reason is not None or not self.verify:
            return reason
        key = probe.kind(rule, module)
        if key not in self.proofs:
            self.proofs[key] = probe.disproof(rule, module)
        return self.proofs[key]


def own_code(module: nn.Module) -> bool:
    """Whether the module is one of fastdit's."""
    return type(module).__module__.partition(".")[0] == "fastdit"


def patch(
    model: nn.Module, level: str = "exact", *, verify: bool = True, quantize: str | None = None
) -> Handle:
    """Make somebody else's model run on fastdit's ops, in place.

    Parameters, state dict, module names, classes and hooks stay what they are. Works before or
    after `.to()`, `torch.compile`, DDP, `fully_shard` and a checkpoint's loading, in training and
    inference, under autocast.

    Args:
        model: of the published code or a fork (DiT, SiT, REPA, fast-DiT, LightningDiT), of F5-TTS,
            or of diffusers (DiT, PixArt, Latte, SD3, Flux, Flux 2, HunyuanDiT, Sana, CogVideoX,
            Wan, Lumina-Next, Lumina 2, AuraFlow, ACE-Step), anywhere inside a larger module.
        level: `"exact"` replaces blocks and layers one for one, and differs from the original by
            a few units in the last place (docs/patching.md); `"fast"` also replaces whole models'
            forwards: branches fused across blocks, conditioning computed once.
        verify: run one module of each kind beside its replacement, on a few tokens with random
            weights on the CPU, and skip the kind if they differ. Costs a fraction of a second.
        quantize: `"int8"` multiplies in 8 bits in the blocks of every model that level `"fast"`
            runs as one compiled call, on CPUs in inference (docs/native_forward.md has its error);
            None multiplies in float32.

    Returns:
        A `Handle`: `report()` tells every site replaced or skipped and why, `undo()` restores.
        Patching a patched model again replaces nothing twice.

    Raises:
        TypeError: `model` is no module, or a ScriptModule, whose forward cannot be replaced.
        ValueError: an unknown level; a DataParallel, whose replicas would call the original's
            parameters; `quantize` where no model is taken by the compiled forward. Nothing is
            changed then.

    Example:
        >>> handle = fastdit.patch(pipe.transformer)
        >>> print(handle.report())
        >>> handle.undo()
    """
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"model: got {type(model).__name__}, allowed is an nn.Module in Python")
    if level not in LEVELS:
        raise ValueError(f"level: got {level!r}, allowed are 'exact' and 'fast'")
    if any(isinstance(module, nn.DataParallel) for module in model.modules()):
        raise ValueError("model: got a DataParallel, allowed is DistributedDataParallel")
    search = _Search(level, verify)
    search.visit("", model)
    handle = Handle(level, tuple(search.sites))
    for name, module, rule in search.chosen:
        previous = own_forward(module)
        if previous is None or previous.func is not rule.forward:
            handle._installed.append(_Installed(name, module, install(module, rule), previous))
    if quantize is not None:
        wholes = {name: module for name, module, rule in search.chosen if rule is MODEL}
        _quantize(handle, wholes, quantize)
    return handle


def _quantize(handle: Handle, models: dict[str, nn.Module], how: str) -> None:
    """Ask for 8 bits in the whole models that were replaced, and say so in the report."""
    try:
        if not models:
            raise ValueError(
                f"quantize: got {how!r}, allowed is None where no whole model is replaced; level "
                "'fast' does that, of class-conditional DiTs"
            )
        for model in models.values():
            native.quantize(model, how)
    except ValueError:
        handle.undo()
        raise
    handle.sites = tuple(
        replace(site, ops=f"{site.ops}; on CPUs one call in {how}")
        if site.name in models and site.rule == MODEL.name
        else site
        for site in handle.sites
    )


def unpatch(model: nn.Module) -> None:
    """Take every replacement out of a model whose handle is gone: a copy, a loaded pickle."""
    for module in model.modules():
        if is_ours(own_forward(module)):
            del module.forward


@contextlib.contextmanager
def patched(
    model: nn.Module, level: str = "exact", *, verify: bool = True, quantize: str | None = None
) -> Iterator[Handle]:
    """`patch` inside the block, `undo` at its end.

    Example:
        >>> with fastdit.patched(model, level="fast") as handle:
        ...     samples = sample(model)
    """
    handle = patch(model, level, verify=verify, quantize=quantize)
    try:
        yield handle
    finally:
        handle.undo()
