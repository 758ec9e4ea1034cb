"""Which design a file's tensors belong to: by their names, their shapes, their positions' values.

Some choices leave no trace, and the file's configuration or the caller must tell them: what a
branch is added to, whether a scale has 1 added, whether the model takes any size. adaLN without
gates and adaLN-Zero without shifts have the same shapes; the first is taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastdit import positions
from fastdit.sizes import Size

State = Mapping[str, Tensor]


def infer_design(state: State, width: int, grid: Size | None) -> dict[str, Any]:
    """The options of the `Design` of a model with these tensors.

    Args:
        state: tensors by name.
        width: of the tokens.
        grid: of the patches; None where it is not known.
    """
    return {
        "conditioning": _conditioning(state, width),
        "modulation": "mlp" if "final_layer.adaLN_modulation.shift.0.weight" in state else "linear",
        "condition_fusion": _fusion(state, width),
        "positions": _positions(state, width, grid),
        "rope": "feat_rope.freqs_cos" in state,
        "norm": _norm(state),
        "qk_norm": _qk_norm(state),
        "mlp": "swiglu" if "blocks.0.mlp.w12.weight" in state else "gelu",
        "frequency_dim": _columns(state, "t_embedder.mlp.0.weight", 256),
        "condition_dim": _columns(state, "y_embedder.mlp.0.weight", 0),
    }


def _columns(state: State, name: str, default: int) -> int:
    return state[name].shape[-1] if name in state and state[name].dim() == 2 else default


def _conditioning(state: State, width: int) -> str:
    if "blocks.0.cross_attn.q.weight" in state:
        return "cross_attention"
    modulated = any("adaLN_modulation" in name for name in state)
    if not modulated and "final_layer.norm_final.weight" in state:
        return "in_context"
    parts = [name for name in state if name.startswith("blocks.0.adaLN_modulation.scale_")]
    if parts:  # an MLP for each part
        names = ("blocks.0.adaLN_modulation.gate_msa.0.weight", "shift_msa")
        gated = names[0] in state
        shifted = names[0].replace("gate_msa", names[1]) in state
        return "adaln" if not gated else "adaln_zero" if shifted else "adaln_zero_no_shift"
    rows = len(state.get("blocks.0.adaLN_modulation.1.bias", ())) // width
    return "adaln" if rows == 4 else "adaln_zero"


def _fusion(state: State, width: int) -> str:
    for layer in ("1", "shift.0"):
        if _columns(state, f"final_layer.adaLN_modulation.{layer}.weight", width) == 2 * width:
            return "concat"
    return "sum"


def _norm(state: State) -> str:
    name = "final_layer.norm_final"
    return "rms" if f"{name}.weight" in state and f"{name}.bias" not in state else "layer"


def _qk_norm(state: State) -> str | None:
    name = "blocks.0.attn.q_norm"
    if f"{name}.weight" not in state:
        return None
    return "layer" if f"{name}.bias" in state else "rms"


def _positions(state: State, width: int, grid: Size | None) -> str:
    """Computed positions are told from learned ones by their values; a 16-bit copy is off by less
    than 0.01, a learned one differs in its first digit."""
    if "pos_rows" in state:
        return "learned_2d"
    if "pos_embed" not in state:
        return "none"
    kinds = ["sincos_2d"] if width % 4 == 0 and (grid is None or len(grid) == 2) else []
    for kind in (*kinds, "sincos_1d"):
        if grid is None:
            return kind
        table = positions.initial_table(kind, grid, grid, "interpolate", width)
        if torch.allclose(state["pos_embed"].float().cpu(), table, rtol=0, atol=1e-2):
            return kind
    return "learned_1d"


def mlp_ratio(state: State, width: int) -> float:
    """A ratio with which a block builds the MLP that these tensors are of."""
    for name, tensor in state.items():
        if name.endswith(".mlp.fc1.weight"):
            return _ratio(len(tensor), width)
        if name.endswith(".mlp.w12.weight"):
            hidden = len(tensor) // 2
            if int(2 / 3 * 4 * width) == hidden:
                return 4.0
            whole = math.ceil(1.5 * hidden)
            return _ratio(whole if int(2 / 3 * whole) == hidden else whole + 1, width)
    return 4.0


def _ratio(hidden: int, width: int) -> float:
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)
