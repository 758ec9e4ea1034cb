"""Other people's models at a width near 1152 (Lumina2: 384), two blocks or a few more, with random
weights: the tiny ones of tests/patching, made wide."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.utils._pytree import tree_map_only

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "patching"))
import compare
import families
import research
import speech

Call = Callable[[nn.Module], Any]

WIDE = {
    "DiT": {"num_attention_heads": 16, "attention_head_dim": 72, "sample_size": 32},
    "PixArt-alpha": {
        "num_attention_heads": 16, "attention_head_dim": 72, "sample_size": 32,
        "cross_attention_dim": 1152,
    },
    "PixArt-Sigma": {
        "num_attention_heads": 16, "attention_head_dim": 72, "sample_size": 32,
        "cross_attention_dim": 1152,
    },
    "Latte": {
        "num_attention_heads": 16, "attention_head_dim": 72, "sample_size": 32,
        "cross_attention_dim": 1152,
    },
    "SD3": {
        "num_attention_heads": 18, "attention_head_dim": 64, "sample_size": 32,
        "caption_projection_dim": 1152, "pos_embed_max_size": 32,
    },
    "SD3.5": {
        "num_attention_heads": 18, "attention_head_dim": 64, "sample_size": 32,
        "caption_projection_dim": 1152, "pos_embed_max_size": 32,
    },
    "Flux": {
        "num_attention_heads": 9, "attention_head_dim": 128, "axes_dims_rope": (16, 56, 56),
    },
    "Flux 2": {
        "num_attention_heads": 9, "attention_head_dim": 128, "axes_dims_rope": (32, 32, 32, 32),
    },
    "HunyuanDiT": {
        "num_attention_heads": 16, "attention_head_dim": 88, "hidden_size": 1408,
        "sample_size": 32,
    },
    "Sana": {
        "num_attention_heads": 36, "attention_head_dim": 32, "num_cross_attention_heads": 9,
        "cross_attention_head_dim": 128, "cross_attention_dim": 1152, "sample_size": 16,
    },
    "CogVideoX": {
        "num_attention_heads": 18, "attention_head_dim": 64, "sample_width": 16,
        "sample_height": 16, "sample_frames": 13,
    },
    "Wan": {"num_attention_heads": 9, "attention_head_dim": 128, "ffn_dim": 4608},
    "Wan 2.2": {"num_attention_heads": 9, "attention_head_dim": 128, "ffn_dim": 4608},
    "Lumina2": {
        "hidden_size": 384, "num_attention_heads": 4, "num_kv_heads": 2,
        "axes_dim_rope": (32, 32, 32), "multiple_of": 256,
    },
    "Lumina-Next": {
        "hidden_size": 1152, "num_attention_heads": 16, "num_kv_heads": 4, "multiple_of": 256,
        "cross_attention_dim": 1152, "sample_size": 32,
    },
    "ACE-Step": {
        "hidden_size": 1152, "intermediate_size": 3072, "num_attention_heads": 9,
        "num_key_value_heads": 3, "head_dim": 128, "sliding_window": 128,
    },
    "AuraFlow": {
        "num_attention_heads": 9, "attention_head_dim": 128, "caption_projection_dim": 1152,
        "sample_size": 32, "pos_embed_max_size": 256,
    },
}  # fmt: skip
"""What makes a tiny model of tests/patching/families.py wide."""
INPUTS: dict[str, dict[str, tuple[int, ...]]] = {
    "Latte": {"hidden_states": (2, 4, 2, 32, 32)},
    "Flux": {"hidden_states": (2, 256, 4), "img_ids": (256, 3)},
    "Flux 2": {"hidden_states": (2, 256, 4), "img_ids": (256, 4)},
    "Sana": {"hidden_states": (2, 4, 16, 16)},
    "CogVideoX": {"hidden_states": (2, 4, 4, 16, 16)},
    "Wan": {"hidden_states": (2, 4, 4, 16, 16)},
    "Wan 2.2": {"hidden_states": (2, 4, 4, 16, 16), "timestep": (2, 256)},
    "Lumina-Next": {
        "hidden_states": (2, 4, 32, 32), "encoder_hidden_states": (2, 5, 1152),
        "image_rotary_emb": (16, 16, 36),
    },
    "ACE-Step": {
        "hidden_states": (2, 512, 4), "context_latents": (2, 512, 8),
        "encoder_hidden_states": (2, 5, 1152),
    },
}  # fmt: skip
"""Shapes of the inputs that make 256 tokens, or near; an image of 32 x 32 for all others."""
SPEECH = {"F5-TTS, DiT": "DiTBlock", "F5-TTS, MMDiT": "MMDiTBlock"}
NAMES = (*research.FAMILIES, *SPEECH, *(f"diffusers {name}" for name in families.FAMILIES))


def make(name: str, device: str) -> tuple[nn.Module, Call]:
    """A family's model, and a call of it with one sample, on a device, real or not."""
    make_one = _diffusers if name.startswith("diffusers ") else _research
    model, inputs = (_speech if name in SPEECH else make_one)(name, device)
    if device == "cpu":
        compare.randomise(model)
        _equalise(model)
    inputs = tree_map_only(Tensor, lambda t: (t[:1] if len(t) == 2 else t).to(device), inputs)
    if isinstance(inputs, dict):
        return model.eval(), lambda m: families._call(m, **inputs)
    return model.eval(), lambda m: m(*inputs)


def _research(name: str, device: str) -> tuple[nn.Module, Any]:
    with torch.device(device):
        model = research.FAMILIES[name](
            input_size=32, hidden_size=1152, num_heads=16, num_classes=10
        )
    return model, research.inputs(model)


def _speech(name: str, device: str) -> tuple[nn.Module, Any]:
    with torch.device(device):
        model = speech.Speech(SPEECH[name], width=1152, heads=16)
    return model, [torch.randn(2, *shape) for shape in ((256, 1152), (5, 1152), (1152,))]


def _diffusers(name: str, device: str) -> tuple[nn.Module, Any]:
    import diffusers

    name = name.removeprefix("diffusers ")
    class_name, settings = families.FAMILIES[name]
    config, inputs = settings()
    for key, shape in INPUTS.get(name, {"hidden_states": (2, 4, 32, 32)}).items():
        inputs[key] = torch.rand(shape)
    if name == "HunyuanDiT":
        inputs["image_rotary_emb"] = [torch.ones(256, 88), torch.zeros(256, 88)]
    if name == "Lumina-Next":
        angles = inputs["image_rotary_emb"]
        inputs["image_rotary_emb"] = torch.polar(torch.ones_like(angles), angles)
    with torch.device(device):
        model = getattr(diffusers, class_name)(**{**config, **WIDE[name]})
    return model, inputs


def _equalise(model: nn.Module) -> None:
    """DiT's embedders as every converted checkpoint has them: equal in all blocks."""
    blocks = getattr(model, "transformer_blocks", [])
    if blocks and getattr(getattr(blocks[0], "norm1", None), "emb", None) is not None:
        for block in blocks[1:]:
            block.norm1.emb.load_state_dict(blocks[0].norm1.emb.state_dict(), assign=False)


@contextlib.contextmanager
def known_lengths() -> Iterator[None]:
    """Lumina2 reads the length of each text out of a mask, which has no value where it is fake."""
    with mock.patch.object(FakeTensor, "tolist", lambda lengths: [5] * len(lengths)):
        yield
