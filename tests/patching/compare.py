"""A patched model beside the original: outputs, every gradient, in units in the last place."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights that keep activations near 1 and leave no gate at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            fan_in = p[0].numel() if p.dim() > 1 else 4
            p.copy_(torch.randn(p.shape, generator=generator) * fan_in**-0.5)
    return model


def outputs(model: nn.Module, call) -> list[Tensor]:
    """The tensors of one call."""
    return [t for t in tree_leaves(call(model)) if isinstance(t, Tensor)]


def run(model: nn.Module, call) -> dict[str, Tensor]:
    """Outputs, and the gradient of every parameter, of one call. `call` takes the model."""
    model.zero_grad()
    torch.manual_seed(0)
    outs = outputs(model, call)
    sum(t.float().square().mean() for t in outs).backward()
    found = {f"output {i}": t.detach() for i, t in enumerate(outs)}
    return found | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def ulps(a: Tensor, b: Tensor, least: float = 0.0) -> float:
    """The largest difference in units in the last place of b's largest entry, or of `least`."""
    scale = torch.finfo(b.dtype).eps * b.abs().max().double().clamp_min(least)
    return float((a.double() - b.double()).abs().max() / scale.clamp_min(1e-30))


def worst(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[float, float]:
    """The largest difference in ulp: of the outputs, and of the gradients. A gradient that is
    zero but for rounding, such as a key bias's, counts in ulp of a hundredth of the largest."""
    assert ours.keys() == theirs.keys()
    outs = [name for name in theirs if name.startswith("output ")]
    grads = {name: g for name, g in theirs.items() if name not in outs}
    least = max((float(g.abs().max()) for g in grads.values()), default=0.0) / 100
    out = max(ulps(ours[name], theirs[name]) for name in outs)
    grad = max((ulps(ours[name], g, least) for name, g in grads.items()), default=0.0)
    return out, grad


def error(model: nn.Module, call, exact: list[Tensor]) -> float:
    """The relative error of a call's outputs against those of float64, root mean square."""
    pairs = zip(outputs(model, call), exact, strict=True)
    return max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)


def distance(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """How far outputs and gradients are from float64's, each relative to its size."""
    names = [name for name, e in exact.items() if e.norm() > 1e-6 * max_norm(exact)]
    ratios = [float((found[n].double() - exact[n]).norm() / exact[n].norm()) for n in names]
    return sum(r * r for r in ratios) ** 0.5


def max_norm(tensors: dict[str, Tensor]) -> float:
    return max(float(t.norm()) for t in tensors.values())


def in_float64(model: nn.Module, call) -> list[Tensor]:
    """Outputs of a float64 copy."""
    return outputs(copy.deepcopy(model).double(), call)


def state(model: nn.Module) -> tuple:
    """What patching must not change: names, parameters by identity, classes, hooks."""
    return (
        [(name, id(p)) for name, p in model.named_parameters()],
        [(name, id(m), type(m), len(m._forward_hooks)) for name, m in model.named_modules()],
        list(model.state_dict()),
    )
