"""One call from a model and class labels to samples.

    samples = fastdit.sample(model, [207, 360], steps=50, solver="dpm++", seed=0)

Draws what the published `sample.py` draws: start noise for B samples, both halves of a guided
batch starting from it, and noise for 2B rows at every step. A seed gives its samples.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdit.diffusion import create_diffusion
from fastdit.model import DiT

SOLVERS = ("ddpm", "ddim", "dpm++")


def _allowed(name: str, got: object, allowed: str) -> ValueError:
    return ValueError(f"{name}: got {got!r}, allowed is {allowed}")


def _condition(model: DiT, classes: Any, device: torch.device) -> tuple[int, Tensor | None]:
    """How many samples, and their y."""
    if model.y_embedder is None:
        if not isinstance(classes, int) or classes < 1:
            raise _allowed("classes", classes, "a number of samples, of a model without condition")
        return classes, None
    if model.design.condition_dim:
        vectors, width = torch.as_tensor(classes), model.design.condition_dim
        if vectors.dim() != 2 or vectors.shape[1] != width or len(vectors) == 0:
            raise _allowed("classes", tuple(vectors.shape), f"(B, {width}) vectors")
        return len(vectors), vectors.to(device)
    labels = torch.as_tensor(classes, dtype=torch.int64)
    if labels.dim() != 1 or labels.numel() == 0:
        raise _allowed("classes", tuple(labels.shape), "a non-empty list of labels")
    if labels.min() < 0 or labels.max() >= model.num_classes:
        raise _allowed("classes", labels.tolist(), f"0 to {model.num_classes - 1}")
    return len(labels), labels.to(device)


@contextlib.contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Draws inside the block come from `seed`; the caller's generators are left as they were."""
    if seed is None:
        yield
        return
    devices = [device] if device.type != "cpu" else []
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def sample(
    model: DiT,
    classes: Sequence[int] | Tensor | int,
    *,
    steps: int = 250,
    cfg_scale: float = 4.0,
    solver: str = "ddpm",
    eta: float = 0.0,
    seed: int | None = None,
    guided_channels: int | None = None,
    clip_denoised: bool = False,
    progress: bool = False,
) -> Tensor:
    """Class-conditional samples.

    Args:
        model: a DiT in eval mode; the samples are made on its device.
        classes: B labels; `(B, condition_dim)` vectors for a model of these; for one without
            condition the number of samples.
        steps: denoising steps, spread evenly over the 1000 of training.
        cfg_scale: classifier-free guidance; 1 is none and runs the model on B rows instead of 2B.
        solver: `"ddpm"` (ancestral), `"ddim"` or `"dpm++"` (DPM-Solver++(2M), deterministic).
        eta: DDIM's noise; 0 is deterministic. Only with `solver="ddim"`.
        seed: of all draws; None continues torch's generator.
        guided_channels: as in `DiT.forward_with_cfg`; None guides at most 3 of the latent's
            channels, as published.
        clip_denoised: clamp each predicted x0 to [-1, 1]; for models of pixels.
        progress: show a progress bar.

    Returns:
        `(B, C, *size)` samples in the model's dtype.

    Raises:
        ValueError: a label the model does not have, an unknown solver, or guidance of a model
            that has no null class.

    Source: Peebles & Xie 2022; Song et al. 2021; Lu et al. 2022.
    """
    if solver not in SOLVERS:
        raise _allowed("solver", solver, ", ".join(map(repr, SOLVERS)))
    if eta and solver != "ddim":
        raise _allowed("eta", eta, f"0 with solver={solver!r}")
    parameter = next(model.parameters())
    count, y = _condition(model, classes, parameter.device)
    guided = cfg_scale != 1
    if guided and not model.guidable:
        raise _allowed("cfg_scale", cfg_scale, "1 for a model without a null class")

    call: Callable[..., Tensor] = model
    kwargs: dict[str, Any] = {"y": y}
    if guided:
        channels = min(3, model.in_channels) if guided_channels is None else guided_channels
        kwargs = {"y": torch.cat([y, model.null_condition(count)]), "cfg_scale": cfg_scale}
        kwargs["guided_channels"] = channels
        call = model.forward_with_cfg
    diffusion = create_diffusion(str(steps), learn_sigma=model.learn_sigma)
    loop: Callable[..., Tensor] = {
        "ddpm": diffusion.p_sample_loop,
        "ddim": diffusion.ddim_sample_loop,
        "dpm++": diffusion.dpm_solver_sample_loop,
    }[solver]
    options: dict[str, Any] = {"eta": eta} if solver == "ddim" else {}
    with _seeded(seed, parameter.device):
        shape = (count, model.in_channels, *model.input_size)
        z = torch.randn(*shape, device=parameter.device).to(parameter.dtype)
        z = torch.cat([z, z]) if guided else z
        out = loop(
            call,
            z.shape,
            z,
            clip_denoised=clip_denoised,
            model_kwargs=kwargs,
            device=parameter.device,
            progress=progress,
            **options,
        )
    return out[:count]
