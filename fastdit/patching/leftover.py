"""Why a module that could be a site, a norm or an attention, is left as it is."""

from __future__ import annotations

from torch import nn

NOT_SITES = {
    "AdaLayerNormSingle": "computes modulations, once a step; normalises nothing",
    "AuraFlowPreFinalBlock": "modulates without a normalisation, once a step",
    "CogVideoXPatchEmbed": "embeds text and video together, once a step",
    "GLUMBConv": "its gates are channels of a convolution; glu takes the halves of a last axis",
}
"""Modules that look like sites by name."""


def _attention(module: nn.Module) -> bool:
    """diffusers' attention: projections, and a processor that does the work."""
    return "to_q" in module._modules or hasattr(module, "processor")


def why_left(module: nn.Module, inside: tuple[nn.Module, ...]) -> str | None:
    """The reason for the report; None for a module that is no site at all."""
    if (reason := NOT_SITES.get(type(module).__name__)) is not None:
        return reason
    if _attention(module):
        processor = getattr(module, "processor", None)
        if processor is None:
            return "attention with projections apart; the op takes them packed"
        return f"attention stays with its processor, {type(processor).__name__}"
    if "Norm" not in type(module).__name__ or isinstance(module, nn.Identity):
        return None
    if any(map(_attention, inside)):
        return "belongs to the attention's processor"
    if isinstance(module, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm):
        return "one kernel already; nothing around it was replaced that could take it in"
    return UNEXPLAINED


UNEXPLAINED = "no rule knows this normalisation"
