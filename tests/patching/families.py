"""Tiny random-weight models of diffusers, and a call of each."""

from __future__ import annotations

import functools

import compare
import torch


def _randn(*shape, seed=0, like=None):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _call(model, **kwargs):
    """One call of a model, inputs in its dtype."""
    dtype = min((p.dtype for p in model.parameters()), key=lambda dtype: dtype.itemsize)
    cast = {
        name: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for name, v in kwargs.items()
    }
    return model(**cast, return_dict=False)[0]


def _dit(cls="DiTTransformer2DModel", **changes):
    config = {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8,
        "num_layers": 2, "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 1000,
    }  # fmt: skip
    inputs = {
        "hidden_states": _randn(2, 4, 8, 8),
        "timestep": torch.tensor([10, 700]),
        "class_labels": torch.tensor([1, 5]),
    }
    return config, inputs


def _pixart(**changes):
    config = {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8,
        "num_layers": 2, "sample_size": 8, "patch_size": 2, "cross_attention_dim": 32,
        "caption_channels": 24, "use_additional_conditions": False,
    }  # fmt: skip
    inputs = {
        "hidden_states": _randn(2, 4, 8, 8),
        "timestep": torch.tensor([10, 700]),
        "encoder_hidden_states": _randn(2, 5, 24),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    return config, inputs


def _pixart_alpha():
    config, inputs = _pixart()
    conditions = {
        "resolution": torch.tensor([[8.0, 8.0]] * 2),
        "aspect_ratio": torch.tensor([[1.0]] * 2),
    }
    config["use_additional_conditions"] = True
    config["attention_head_dim"] = 24  # its size embedding takes a third of the width
    config["cross_attention_dim"] = 48
    return config, inputs | {"added_cond_kwargs": conditions}


def _latte():
    config = {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8,
        "num_layers": 1, "sample_size": 8, "patch_size": 2, "cross_attention_dim": 32,
        "caption_channels": 24, "video_length": 2, "norm_type": "ada_norm_single",
        "activation_fn": "gelu-approximate", "attention_bias": True,
        "norm_elementwise_affine": False,
    }  # fmt: skip
    inputs = {
        "hidden_states": _randn(2, 4, 2, 8, 8),
        "timestep": torch.tensor([10, 700]),
        "encoder_hidden_states": _randn(2, 5, 24),
    }
    return config, inputs


def _sd3(**changes):
    config = {
        "sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 2,
        "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 24,
        "caption_projection_dim": 32, "pooled_projection_dim": 20, "out_channels": 4,
        "pos_embed_max_size": 8, **changes,
    }  # fmt: skip
    inputs = {
        "hidden_states": _randn(2, 4, 8, 8),
        "encoder_hidden_states": _randn(2, 5, 24),
        "pooled_projections": _randn(2, 20),
        "timestep": torch.tensor([10, 700]),
    }
    return config, inputs


def _flux():
    config = {
        "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": 24, "pooled_projection_dim": 20,
        "axes_dims_rope": (4, 6, 6),
    }  # fmt: skip
    inputs = {
        "hidden_states": _randn(2, 6, 4),
        "encoder_hidden_states": _randn(2, 5, 24),
        "pooled_projections": _randn(2, 20),
        "timestep": torch.tensor([0.1, 0.7]),
        "img_ids": _randn(6, 3).abs(),
        "txt_ids": torch.zeros(5, 3),
    }
    return config, inputs


def _hunyuan():
    config = {
        "sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 4,
        "attention_head_dim": 8, "num_attention_heads": 2, "cross_attention_dim": 16,
        "cross_attention_dim_t5": 16, "pooled_projection_dim": 4, "hidden_size": 16,
        "text_len": 4, "text_len_t5": 4, "activation_fn": "gelu-approximate",
    }  # fmt: skip
    inputs = {
        "hidden_states": _randn(2, 4, 8, 8),
        "timestep": torch.tensor([10.0, 700.0]),
        "encoder_hidden_states": _randn(2, 4, 16),
        "text_embedding_mask": torch.ones(2, 4),
        "encoder_hidden_states_t5": _randn(2, 4, 16),
        "text_embedding_mask_t5": torch.ones(2, 4),
        "image_meta_size": torch.ones(2, 6),
        "style": torch.zeros(2, dtype=torch.long),
        "image_rotary_emb": [torch.ones(16, 8), torch.zeros(16, 8)],
    }
    return config, inputs


def _sana():
    config = {
        "patch_size": 1, "in_channels": 4, "out_channels": 4, "num_layers": 2,
        "attention_head_dim": 8, "num_attention_heads": 2, "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 8,
        "sample_size": 4,
    }  # fmt: skip
    inputs = {
        "hidden_states": _randn(2, 4, 4, 4),
        "timestep": torch.tensor([10, 700]),
        "encoder_hidden_states": _randn(2, 5, 8),
    }
    return config, inputs


def _cogvideox():
    config = {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4,
        "time_embed_dim": 12, "text_embed_dim": 24, "num_layers": 2, "sample_width": 8,
        "sample_height": 8, "sample_frames": 5, "patch_size": 2,
        "temporal_compression_ratio": 4, "max_text_seq_length": 6,
    }  # fmt: skip
    inputs = {
        "hidden_states": _randn(2, 2, 4, 8, 8),
        "encoder_hidden_states": _randn(2, 6, 24),
        "timestep": torch.tensor([10, 700]),
    }
    return config, inputs


def _wan(per_token=False):
    config = {
        "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12,
        "in_channels": 4, "out_channels": 4, "text_dim": 16, "freq_dim": 32, "ffn_dim": 32,
        "num_layers": 2, "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 32,
    }  # fmt: skip
    inputs = {
        "hidden_states": _randn(2, 4, 2, 4, 4),
        "timestep": torch.randint(0, 1000, (2, 8)) if per_token else torch.tensor([10, 700]),
        "encoder_hidden_states": _randn(2, 5, 16),
    }
    return config, inputs


def _lumina2():
    config = {
        "sample_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 24, "num_layers": 2,
        "num_refiner_layers": 1, "num_attention_heads": 3, "num_kv_heads": 1, "multiple_of": 2,
        "scaling_factor": 1.0, "axes_dim_rope": (4, 2, 2), "axes_lens": (128, 128, 128),
        "cap_feat_dim": 8,
    }  # fmt: skip
    inputs = {
        "hidden_states": _randn(2, 4, 8, 8),
        "timestep": torch.tensor([0.1, 0.7]),
        "encoder_hidden_states": _randn(2, 5, 8),
        "encoder_attention_mask": torch.ones(2, 5, dtype=torch.bool),
    }
    return config, inputs


def _flux2():
    config = {
        "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": 24, "timestep_guidance_channels": 32,
        "axes_dims_rope": (4, 4, 4, 4),
    }  # fmt: skip
    inputs = {
        "hidden_states": _randn(2, 6, 4),
        "encoder_hidden_states": _randn(2, 5, 24),
        "timestep": torch.tensor([0.1, 0.7]),
        "guidance": torch.tensor([1.0, 4.0]),
        "img_ids": _randn(6, 4).abs(),
        "txt_ids": torch.zeros(5, 4),
    }
    return config, inputs


def _lumina_next():
    config = {
        "sample_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 24, "num_layers": 2,
        "num_attention_heads": 3, "num_kv_heads": 1, "multiple_of": 2, "cross_attention_dim": 24,
        "norm_eps": 1e-5, "scaling_factor": 1.0,
    }  # fmt: skip
    angles = _randn(4, 4, 4)
    inputs = {
        "hidden_states": _randn(2, 4, 8, 8),
        "timestep": torch.tensor([0.1, 0.7]),
        "encoder_hidden_states": _randn(2, 5, 24),
        "encoder_mask": torch.ones(2, 5),
        "image_rotary_emb": torch.polar(torch.ones_like(angles), angles),
        "cross_attention_kwargs": {},
    }
    return config, inputs


def _ace_step():
    config = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "in_channels": 12,
        "audio_acoustic_hidden_dim": 4, "patch_size": 2, "sliding_window": 4,
    }  # fmt: skip
    inputs = {
        "hidden_states": _randn(2, 8, 4),
        "timestep": torch.tensor([0.1, 0.7]),
        "timestep_r": torch.tensor([0.1, 0.7]),
        "encoder_hidden_states": _randn(2, 5, 32),
        "context_latents": _randn(2, 8, 8),
    }
    return config, inputs


def _auraflow():
    config = {
        "sample_size": 8, "patch_size": 2, "in_channels": 4, "num_mmdit_layers": 1,
        "num_single_dit_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
        "joint_attention_dim": 24, "caption_projection_dim": 32, "out_channels": 4,
        "pos_embed_max_size": 64,
    }  # fmt: skip
    inputs = {
        "hidden_states": _randn(2, 4, 8, 8),
        "encoder_hidden_states": _randn(2, 5, 24),
        "timestep": torch.tensor([0.1, 0.7]),
    }
    return config, inputs


FAMILIES = {
    "DiT": ("DiTTransformer2DModel", _dit),
    "PixArt-alpha": ("PixArtTransformer2DModel", _pixart_alpha),
    "PixArt-Sigma": ("PixArtTransformer2DModel", _pixart),
    "Latte": ("LatteTransformer3DModel", _latte),
    "SD3": ("SD3Transformer2DModel", _sd3),
    "SD3.5": (
        "SD3Transformer2DModel",
        functools.partial(_sd3, dual_attention_layers=(0,), qk_norm="rms_norm"),
    ),
    "Flux": ("FluxTransformer2DModel", _flux),
    "Flux 2": ("Flux2Transformer2DModel", _flux2),
    "HunyuanDiT": ("HunyuanDiT2DModel", _hunyuan),
    "Sana": ("SanaTransformer2DModel", _sana),
    "CogVideoX": ("CogVideoXTransformer3DModel", _cogvideox),
    "Wan": ("WanTransformer3DModel", _wan),
    "Wan 2.2": ("WanTransformer3DModel", functools.partial(_wan, per_token=True)),
    "Lumina2": ("Lumina2Transformer2DModel", _lumina2),
    "Lumina-Next": ("LuminaNextDiT2DModel", _lumina_next),
    "ACE-Step": ("AceStepTransformer1DModel", _ace_step),
    "AuraFlow": ("AuraFlowTransformer2DModel", _auraflow),
}
"""Name of the class and a function of its configuration and inputs."""


def make(name):
    """A family's tiny model with random weights, and its call."""
    import diffusers

    class_name, settings = FAMILIES[name]
    config, inputs = settings()
    torch.manual_seed(0)
    model = compare.randomise(getattr(diffusers, class_name)(**config)).eval()
    return model, functools.partial(_call, **inputs)
