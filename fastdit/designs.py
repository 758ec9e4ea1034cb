"""What a DiT may be besides the published one: every choice, its values, and named sets of them.

The paper compares four ways for the condition to reach the blocks, and published code of only one.
Its descendants change positions, normalisation and MLP. Each is a field of `Design`; the defaults
are the published model, and any combination works or is refused by name when it is built.

    model = fastdit.DiT_models["DiT-B/2"](conditioning="cross_attention", rope=True)
    model = fastdit.DiT_models["DiT-B/2"](**fastdit.presets["literal"])
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

Value = TypeVar("Value")

MODULATIONS = {
    "adaln_zero": ("shift", "scale", "gate"),
    "adaln": ("shift", "scale"),
    "adaln_zero_no_shift": ("scale", "gate"),
    "cross_attention": (),
    "in_context": (),
}
"""What the condition regresses for each branch of a block, in the weights' order; () where it comes
as tokens instead."""

VALUES: dict[str, tuple[Any, ...]] = {
    "conditioning": tuple(MODULATIONS),
    "positions": ("sincos_2d", "sincos_1d", "learned_2d", "learned_1d", "none"),
    "rope": (False, True),
    "position_scaling": ("interpolate", "extrapolate"),
    "any_size": (False, True),
    "norm": ("layer", "rms"),
    "qk_norm": (None, "layer", "rms"),
    "mlp": ("gelu", "swiglu"),
    "residual": ("x", "normed"),
    "scale_plus_one": (True, False),
    "condition_fusion": ("sum", "concat"),
    "modulation": ("linear", "mlp"),
}
"""The values of every field that has few."""


class Named(dict[str, Value]):
    """A dict whose `KeyError` tells the keys that there are.

    Args:
        name: what users call the dict.
        items: its contents.
    """

    def __init__(self, name: str, items: Mapping[str, Value]) -> None:
        super().__init__(items)
        self.name = name

    def __missing__(self, key: str) -> Value:
        raise KeyError(f"{self.name}: got {key!r}, allowed is {', '.join(map(repr, self))}")


@dataclass(frozen=True)
class Design:
    """One choice of each kind; the defaults are the published DiT.

    Attributes:
        conditioning: how timestep and label reach the blocks. `"adaln_zero"`: shift, scale and
            gate of every branch. `"adaln"`: without the gates. `"adaln_zero_no_shift"`: without
            the shifts (LightningDiT's `wo_shift`). `"cross_attention"`: a second attention, over
            the sequence [t, y]. `"in_context"`: t and y are tokens behind the image's, dropped at
            the end. The last two have standard Transformer blocks, with affine normalisation.
        positions: added to the tokens. `"sincos_2d"` and `"learned_2d"` code row and column,
            `"sincos_1d"` and `"learned_1d"` the place in the sequence; `"none"` adds nothing.
        rope: rotate queries and keys by their position, on top of `positions`.
        position_scaling: where the grid is not the one of `base_size`: `"interpolate"` squeezes
            its positions into that one's range, `"extrapolate"` counts on.
        base_size: the input size whose grid positions refer to; None is the model's `input_size`.
        any_size: take inputs of every size that the patch divides, not just `input_size`.
        norm: `"layer"`, or `"rms"`, which has a weight.
        qk_norm: normalise the self-attention's queries and keys: `"layer"`, `"rms"` or None.
        mlp: `"gelu"` (tanh) or `"swiglu"` with two thirds of the hidden width.
        residual: what a branch is added to: the stream `"x"`, or what the branch read, `"normed"`.
        scale_plus_one: multiply by 1 + scale; False multiplies by a scale that starts at 1.
        condition_fusion: timestep and label are added, `"sum"`, or joined, `"concat"`.
        modulation: one `"linear"` layer for all parts, or a two-layer `"mlp"` for each.
        frequency_dim: channels of the timestep's sinusoid, even.
        condition_dim: y is a vector of that many numbers instead of a label; 0 is a label.

    Raises:
        ValueError: a value that is not allowed, or not in this combination.
    """

    conditioning: str = "adaln_zero"
    positions: str = "sincos_2d"
    rope: bool = False
    position_scaling: str = "interpolate"
    base_size: int | tuple[int, ...] | None = None
    any_size: bool = False
    norm: str = "layer"
    qk_norm: str | None = None
    mlp: str = "gelu"
    residual: str = "x"
    scale_plus_one: bool = True
    condition_fusion: str = "sum"
    modulation: str = "linear"
    frequency_dim: int = 256
    condition_dim: int = 0

    def __post_init__(self) -> None:
        for name, allowed in VALUES.items():
            got = getattr(self, name)
            if not any(type(got) is type(value) and got == value for value in allowed):
                raise ValueError(f"{name}: got {got!r}, allowed is {', '.join(map(repr, allowed))}")
        for name, least in (("frequency_dim", 2), ("condition_dim", 0)):
            got = getattr(self, name)
            if not isinstance(got, int) or got < least or (name == "frequency_dim" and got % 2):
                kind = "an even int >= 2" if name == "frequency_dim" else "an int >= 0"
                raise ValueError(f"{name}: got {got!r}, allowed is {kind}")
        for name in ("scale_plus_one", "condition_fusion", "modulation"):
            if not self.modulated and getattr(self, name) != getattr(PUBLISHED, name):
                raise ValueError(
                    f"{name}: got {getattr(self, name)!r} with conditioning="
                    f"{self.conditioning!r}, allowed is {getattr(PUBLISHED, name)!r} where nothing "
                    "is modulated"
                )
        if self.positions.startswith("learned") and self.position_scaling == "extrapolate":
            raise ValueError(
                f"position_scaling: got 'extrapolate' with positions={self.positions!r}, allowed "
                "is 'interpolate': learned positions end where training did"
            )

    @property
    def parts(self) -> tuple[str, ...]:
        """Of one branch's modulation, in order."""
        return MODULATIONS[self.conditioning]

    @property
    def modulated(self) -> bool:
        """Whether the condition modulates the normalisations; else it is a sequence of tokens."""
        return bool(self.parts)

    @property
    def affine(self) -> bool:
        """Whether normalisations have parameters of their own."""
        return self.norm == "rms" or not self.modulated

    def options(self) -> dict[str, Any]:
        """The fields that differ from the published model's."""
        found = dataclasses.asdict(self)
        return {k: v for k, v in found.items() if v != getattr(PUBLISHED, k)}


PUBLISHED = Design()
NAMES = tuple(field.name for field in dataclasses.fields(Design))


def design_of(options: Mapping[str, Any]) -> Design:
    """The design with these options.

    Raises:
        TypeError: there is no such option.
        ValueError: a value that is not allowed.
    """
    for name in options:
        if name not in NAMES:
            raise TypeError(f"{name}: not an argument of DiT; allowed are {', '.join(NAMES)}")
    return Design(**options)


presets: dict[str, dict[str, Any]] = Named(
    "presets",
    {
        "published": {},
        "literal": {
            "conditioning": "adaln",
            "positions": "learned_1d",
            "residual": "normed",
            "scale_plus_one": False,
            "condition_fusion": "concat",
            "modulation": "mlp",
            "frequency_dim": 128,
        },
        "lightningdit": {"rope": True, "norm": "rms", "mlp": "swiglu"},
    },
)
"""Options by name: the published model; the literal reading of the document that this project
started from (docs/designs.md); what LightningDiT's released models use."""
