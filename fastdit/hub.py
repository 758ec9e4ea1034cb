"""fastdit's layers the way Hugging Face `kernels` loads layers.

    from kernels import Mode, kernelize, use_kernel_mapping

    fastdit.hub.extend(model)
    with use_kernel_mapping(fastdit.hub.mapping()):
        model = kernelize(model, mode=Mode.TRAINING | Mode.TORCH_COMPILE, device="cuda")

`kernels` replaces `forward` of a layer by that of a class without state, looked up by a name and a
device. The names here are those of the classes replaced, diffusers' or the published code's, and
the forwards are those of `fastdit.patch`. What it does besides, finding modules by structure,
proving each replacement, reporting and undoing, `kernels` does not; `extend` keeps the proof.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastdit.checkpoint_files import atomic_write
from fastdit.patching import diffusers_basic, probe, published
from fastdit.patching.rules import Rule
from fastdit.patching.table import RULES

DEVICES = ("cpu", "cuda")


def _block(self: nn.Module, x: Tensor, c: Tensor) -> Tensor:
    return published.block(self, x, c)


def _layer(name: str, forward: Callable[..., Any]) -> type[nn.Module]:
    """A class without state that kernels accepts."""
    members = {
        "__doc__": f"{name} on fastdit's ops.",
        "__module__": __name__,
        "can_torch_compile": True,
        "has_backward": True,
        "forward": forward,
    }
    return type(name, (nn.Module,), members)


_LAYERS: dict[str, tuple[tuple[Rule, ...], Callable[..., Any]]] = {
    "DiTBlock": ((published.BLOCK,), _block),
    "SiTBlock": ((published.BLOCK,), _block),
    "LightningDiTBlock": ((published.BLOCK,), published.block),
    "FinalLayer": ((published.FINAL_LAYER,), published.final_layer),
    "Mlp": ((published.MLP,), published.mlp),
    "BasicTransformerBlock": (diffusers_basic.RULES, diffusers_basic.block),
    **{
        name: ((rule,), rule.forward)
        for rule in RULES
        for name in getattr(rule.recognises, "names", ())
        if rule.level == "exact"
    },
}
RULES_OF = {name: rules for name, (rules, _) in _LAYERS.items()}
LAYERS: dict[str, type[nn.Module]] = {
    name: _layer(name, forward) for name, (_, forward) in _LAYERS.items()
}
"""Every layer by the name of the class that it replaces."""


class Repository:
    """The layer `layer_name` of the installed fastdit, as an entry of a kernel mapping."""

    def __init__(self, layer_name: str) -> None:
        if layer_name not in LAYERS:
            raise ValueError(f"layer_name: got {layer_name!r}, allowed are {', '.join(LAYERS)}")
        self.layer_name = layer_name

    def load(self) -> type[nn.Module]:
        """The class without state."""
        return LAYERS[self.layer_name]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Repository) and other.layer_name == self.layer_name

    def __hash__(self) -> int:
        return hash((Repository, self.layer_name))

    def __str__(self) -> str:
        return f"fastdit, layer {self.layer_name}"


def mapping() -> dict[str, dict[str, Repository]]:
    """Every layer for every device type, for `kernels.use_kernel_mapping`."""
    return {name: {device: Repository(name) for device in DEVICES} for name in LAYERS}


def extend(model: nn.Module) -> set[str]:
    """Let `kernels.kernelize` find the classes of `model` that a layer here replaces.

    A module is replaced only where the replacement is proved to compute the same, as
    `fastdit.patch` does it.

    Returns:
        The names of the classes.
    """
    from kernels import replace_kernel_forward_from_hub

    found = {type(m) for m in model.modules() if type(m).__name__ in LAYERS}
    for cls in found:
        condition = _condition(RULES_OF[cls.__name__])
        replace_kernel_forward_from_hub(cls, cls.__name__, condition=condition)
    return {cls.__name__ for cls in found}


def _condition(rules: tuple[Rule, ...]) -> Callable[[nn.Module], bool]:
    proofs: dict[Any, bool] = {}

    def replaceable(module: nn.Module) -> bool:
        rule = next((rule for rule in rules if rule.recognises(module)), None)
        if rule is None or rule.refuses(module) is not None:
            return False
        key = probe.kind(rule, module)
        if key not in proofs:
            proofs[key] = probe.disproof(rule, module) is None
        return proofs[key]

    return replaceable


def write_repository(folder: str | Path) -> Path:
    """Write a kernel repository that `kernels.LocalLayerRepository` and the Hub's loader read.

    It holds the layers of the fastdit that is installed where it is loaded, for CPUs and CUDA.

    Returns:
        The folder.
    """
    for device in DEVICES:
        build = Path(folder) / "build" / f"torch-{device}"
        build.mkdir(parents=True, exist_ok=True)
        metadata = {
            "id": f"fastdit_{device}",
            "name": "fastdit",
            "version": 1,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": device},
        }
        text = json.dumps(metadata, indent=2) + "\n"
        for name, content in (("metadata.json", text), ("__init__.py", _SOURCE)):
            atomic_write(build / name, lambda path, content=content: path.write_text(content))
    return Path(folder)


_SOURCE = '''"""fastdit's layers without state; needs `pip install fastdit`."""

from types import SimpleNamespace

from fastdit.hub import LAYERS

layers = SimpleNamespace(**LAYERS)
'''
