"""One call from a model and class labels to samples.

    samples = fastdit.sample(model, [207, 360], steps=50, solver="dpm++", seed=0)

Draws what the published `sample.py` draws: start noise for B samples, both halves of a guided
batch starting from it, and noise for 2B rows at every step. A seed gives its samples.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastdit.flow import Guidance, Transport
from fastdit.flow import sampling as flow_sampling
from fastdit.model import DiT
from fastdit.sampler import DIFFUSION_SOLVERS, Preview, Sampler
from fastdit.sampler.conditions import Classes, given_conditions

SOLVERS = DIFFUSION_SOLVERS
Observer = Callable[[float, Tensor, Tensor], None]


def _allowed(name: str, got: object, allowed: str) -> ValueError:
    return ValueError(f"{name}: got {got!r}, allowed is {allowed}")


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
    classes: Classes,
    *,
    steps: int | None = None,
    cfg_scale: float = 4.0,
    solver: str | None = None,
    eta: float = 0.0,
    seed: int | None = None,
    guided_channels: int | None = None,
    clip_denoised: bool = False,
    progress: bool = False,
    transport: Transport | None = None,
    guidance_interval: tuple[float, float] | None = None,
    quality: str | None = None,
    spacing: str | None = None,
    chunk: int | None = None,
    graph: bool | None = None,
    native: bool | None = None,
    quantize: str | None = None,
    observe: Observer | None = None,
) -> Tensor:
    """Class-conditional samples.

    Args:
        model: a DiT in eval mode; the samples are made on its device.
        classes: B labels; `(B, condition_dim)` vectors for a model of these; for one without
            condition the number of samples.
        steps: denoising steps (default 250), spread over the 1000 of training.
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
        guidance_interval: the timesteps between which to guide; with a transport, the times in
            [0, 1], from noise to data.
        quality, spacing, chunk, graph, native, quantize: see `fastdit.Sampler`; without a
            transport. With `chunk` each chunk draws as a call of its own.
        observe: called after each step (each call of a flow's model) with the time that the model
            was given, its x, and the data that it predicts, both `(B, C, H, W)`.

    Returns:
        `(B, C, *size)` samples in the model's dtype.

    Raises:
        ValueError: a label the model does not have, an unknown solver, or guidance of a model
            that has no null class.

    Source: Peebles & Xie 2022; Song et al. 2021; Lu et al. 2022.
    """
    if transport is not None:
        return _flow(
            model,
            classes,
            transport,
            steps=250 if steps is None else steps,
            cfg_scale=cfg_scale,
            solver=solver or "heun",
            eta=eta,
            seed=seed,
            guided_channels=guided_channels,
            clip_denoised=clip_denoised,
            progress=progress,
            guidance_interval=(0.0, 1.0) if guidance_interval is None else guidance_interval,
            observe=observe,
            others={
                "quality": quality,
                "spacing": spacing,
                "chunk": chunk,
                "graph": graph,
                "native": native,
                "quantize": quantize,
            },
        )
    sampler = Sampler(
        model,
        quality=quality,
        solver=solver,
        steps=steps,
        spacing=spacing,
        eta=eta,
        cfg_scale=cfg_scale,
        guided_channels=guided_channels,
        guidance_interval=guidance_interval,
        clip_denoised=clip_denoised,
        chunk=chunk,
        graph=graph,
        native=native,
        quantize=quantize,
    )
    device = next(model.parameters()).device
    with _seeded(seed, device):
        if observe is None:
            return sampler(classes, progress=progress)
        return _observed(sampler, classes, progress, observe)


def _observed(sampler: Sampler, classes: Classes, progress: bool, observe: Observer) -> Tensor:
    """A run whose steps are told to `observe` with the x that the model saw."""
    _y, count = given_conditions(sampler.model, classes)
    x = sampler.start_noise(count)
    times = sampler.plan.times

    def tell(preview: Preview) -> None:
        nonlocal x
        observe(float(times[preview.step]), x[preview.samples], preview.x0)
        x = torch.cat([x[: preview.samples.start], preview.x, x[preview.samples.stop :]])

    return sampler(classes, noise=x, progress=progress, callback=tell)


def _flow(
    model: DiT,
    classes: Classes,
    transport: Transport,
    *,
    steps: int,
    cfg_scale: float,
    solver: str,
    eta: float,
    seed: int | None,
    guided_channels: int | None,
    clip_denoised: bool,
    progress: bool,
    guidance_interval: tuple[float, float],
    observe: Observer | None,
    others: dict[str, Any],
) -> Tensor:
    """Samples of a flow."""
    if clip_denoised:
        raise _allowed("clip_denoised", clip_denoised, "False with a transport")
    if eta:
        raise _allowed("eta", eta, f"0 with solver={solver!r}")
    for name, value in others.items():
        if value is not None:
            raise _allowed(name, value, "None with a transport; fastdit.Sampler takes both")
    if cfg_scale != 1 and not model.guidable:
        raise _allowed("cfg_scale", cfg_scale, "1 for a model without a null class")
    parameter = next(model.parameters())
    y, count = given_conditions(model, classes)
    channels = min(3, model.in_channels) if guided_channels is None else guided_channels
    guidance = Guidance(cfg_scale, guidance_interval, channels)
    with _seeded(seed, parameter.device):
        shape = (count, model.in_channels, *model.input_size)
        z = torch.randn(*shape, device=parameter.device).to(parameter.dtype)
        return flow_sampling.draw(
            transport,
            model,
            z,
            None if y is None else y.to(parameter.device),
            steps=steps,
            solver=solver,
            guidance=guidance if cfg_scale != 1 else None,
            progress=progress,
            observe=observe,
        )
