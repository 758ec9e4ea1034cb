"""Small models of every design, for the tests that hold for all of them."""

from __future__ import annotations

import torch
from torch import Tensor

import fastdit

TINY = {"input_size": 4, "hidden_size": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
VARIANTS: dict[str, dict] = {
    "published": {},
    "adaln": {"conditioning": "adaln"},
    "adaln_zero_no_shift": {"conditioning": "adaln_zero_no_shift", "qk_norm": "layer"},
    "cross_attention": {"conditioning": "cross_attention"},
    "in_context": {"conditioning": "in_context"},
    "literal": fastdit.presets["literal"],
    "lightningdit": {**fastdit.presets["lightningdit"], "qk_norm": "rms", "learn_sigma": False},
    "cross_rms_rope": {"conditioning": "cross_attention", "norm": "rms", "rope": True},
    "context_everything": {
        "conditioning": "in_context",
        "rope": True,
        "qk_norm": "rms",
        "mlp": "swiglu",
        "positions": "none",
        "residual": "normed",
    },
    "part_mlps": {"modulation": "mlp", "condition_fusion": "concat", "positions": "learned_2d"},
    "sequence_positions": {"positions": "sincos_1d", "input_size": (4, 6), "frequency_dim": 32},
    "signal": {"input_size": (12,), "patch_size": 3, "rope": True, "conditioning": "adaln"},
    "learned_signal": {"input_size": (12,), "patch_size": (4,), "positions": "learned_1d"},
    "spectrogram": {"input_size": (8, 6), "patch_size": (4, 2), "in_channels": 1},
    "unconditional": {"num_classes": 0},
    "unconditional_context": {"num_classes": 0, "conditioning": "in_context"},
    "unconditional_cross": {"num_classes": 0, "conditioning": "cross_attention"},
    "vectors": {"num_classes": 0, "condition_dim": 7},
    "vectors_no_null": {"num_classes": 0, "condition_dim": 7, "class_dropout_prob": 0.0},
    "any_size": {"any_size": True, "rope": True, "base_size": (6, 4)},
    "learned_any_size": {"any_size": True, "positions": "learned_2d", "base_size": 8},
}


def tiny(seed: int = 0, **options) -> fastdit.DiT:
    """A small model in eval mode whose every parameter but fixed positions is random."""
    generator = torch.Generator().manual_seed(seed)
    model = fastdit.DiT(**{**TINY, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.2, generator=generator)
    return model


def inputs(
    model: fastdit.DiT, batch: int = 2, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x, t and y for a model."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, model.in_channels, *model.input_size, generator=generator)
    t = torch.randint(0, 1000, (batch,), generator=generator)
    if model.design.condition_dim:
        return x, t, torch.randn(batch, model.design.condition_dim, generator=generator)
    if not model.num_classes:
        return x, t, None
    return x, t, torch.randint(0, model.num_classes, (batch,), generator=generator)


@torch.no_grad()
def assert_same(model: fastdit.DiT, loaded: fastdit.DiT) -> None:
    """The same configuration, tensors and outputs."""
    assert loaded.config == model.config
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(theirs[name], tensor), name
    for name, parameter in model.named_parameters():
        assert loaded.get_parameter(name).requires_grad == parameter.requires_grad, name
    args = inputs(model)
    assert torch.equal(model(*args), loaded(*args))
