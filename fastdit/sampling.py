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
from fastdit.flow import Guidance, Transport
from fastdit.flow import sampling as flow_sampling
from fastdit.model import DiT

SOLVERS = ("ddpm", "ddim", "dpm++")
Observer = Callable[[float, Tensor, Tensor], None]


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
    solver: str | None = None,
    eta: float = 0.0,
    seed: int | None = None,
    guided_channels: int | None = None,
    clip_denoised: bool = False,
    progress: bool = False,
    transport: Transport | None = None,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    observe: Observer | None = None,
) -> Tensor:
    """Class-conditional samples.

    Args:
        model: a DiT in eval mode; the samples are made on its device.
        classes: B labels; `(B, condition_dim)` vectors for a model of these; for one without
            condition the number of samples.
        steps: denoising steps, spread evenly over the 1000 of training.
        cfg_scale: classifier-free guidance; 1 is none and runs the model on B rows instead of 2B.
        solver: `"ddpm"` (ancestral, the default), `"ddim"` or `"dpm++"` (DPM-Solver++(2M),
            deterministic); with a transport `"heun"` (the default), `"euler"`, `"dopri5"` or
            `"sde"`, see `fastdit.flow.sampling`.
        eta: DDIM's noise; 0 is deterministic. Only with `solver="ddim"`.
        seed: of all draws; None continues torch's generator.
        guided_channels: as in `DiT.forward_with_cfg`; None guides at most 3 of the latent's
            channels, as published.
        clip_denoised: clamp each predicted x0 to [-1, 1]; for models of pixels.
        progress: show a progress bar.
        transport: of a model trained by flow matching, what it was trained with.
        guidance_interval: with a transport, the times in [0, 1], from noise to data, between
            which to guide.
        observe: called after each step (each call of a flow's model) with the time that the model
            was given, its x, and the data that it predicts, both `(B, C, H, W)`.

    Returns:
        `(B, C, *size)` samples in the model's dtype.

    Raises:
        ValueError: a label the model does not have, an unknown solver, or guidance of a model
            that has no null class.

    Source: Peebles & Xie 2022; Song et al. 2021; Lu et al. 2022.
    """
    if solver is None:
        solver = "ddpm" if transport is None else "heun"
    if transport is not None and clip_denoised:
        raise _allowed("clip_denoised", clip_denoised, "False with a transport")
    if transport is None and tuple(guidance_interval) != (0, 1):
        raise _allowed("guidance_interval", guidance_interval, "(0, 1) without a transport")
    if transport is None and solver not in SOLVERS:
        raise _allowed("solver", solver, ", ".join(map(repr, SOLVERS)))
    if eta and solver != "ddim":
        raise _allowed("eta", eta, f"0 with solver={solver!r}")
    parameter = next(model.parameters())
    count, y = _condition(model, classes, parameter.device)
    guided = cfg_scale != 1
    if guided and not model.guidable:
        raise _allowed("cfg_scale", cfg_scale, "1 for a model without a null class")

    channels = min(3, model.in_channels) if guided_channels is None else guided_channels
    shape = (count, model.in_channels, *model.input_size)
    if transport is not None:
        guidance = Guidance(cfg_scale, guidance_interval, channels)
        with _seeded(seed, parameter.device):
            z = torch.randn(*shape, device=parameter.device).to(parameter.dtype)
            return flow_sampling.draw(
                transport,
                model,
                z,
                y,
                steps=steps,
                solver=solver,
                guidance=guidance if guided else None,
                progress=progress,
                observe=observe,
            )

    call: Callable[..., Tensor] = model
    kwargs: dict[str, Any] = {"y": y}
    if guided:
        kwargs = {"y": torch.cat([y, model.null_condition(count)]), "cfg_scale": cfg_scale}
        kwargs["guided_channels"] = channels
        call = model.forward_with_cfg
    diffusion = create_diffusion(str(steps), learn_sigma=model.learn_sigma)
    loop: Callable[..., Iterator[dict[str, Tensor]]] = {
        "ddpm": diffusion.p_sample_loop_progressive,
        "ddim": diffusion.ddim_sample_loop_progressive,
        "dpm++": diffusion.dpm_solver_sample_loop_progressive,
    }[solver]
    options: dict[str, Any] = {"eta": eta} if solver == "ddim" else {}
    with _seeded(seed, parameter.device):
        z = torch.randn(*shape, device=parameter.device).to(parameter.dtype)
        x = torch.cat([z, z]) if guided else z
        run = loop(
            call,
            x.shape,
            x,
            clip_denoised=clip_denoised,
            model_kwargs=kwargs,
            device=parameter.device,
            progress=progress,
            **options,
        )
        for t, out in zip(reversed(diffusion.timestep_map), run, strict=True):
            if observe is not None:
                observe(float(t), x[:count], out["pred_xstart"][:count])
            x = out["sample"]
    return x[:count]
