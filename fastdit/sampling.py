"""One call from a model and class labels to samples.

    samples = fastdit.sample(model, [207, 360], steps=50, solver="dpm++", seed=0)

Draws what the published `sample.py` draws: start noise for B samples, both halves of a guided
batch starting from it, and noise for 2B rows at every step that has noise. A seed gives its
samples.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastdit import flow
from fastdit.flow import ODE, SDE, Guidance, Transport
from fastdit.model import DiT
from fastdit.ops import _checks
from fastdit.ops._checks import fail
from fastdit.sampler import DIFFUSION_SOLVERS, FLOW_SOLVERS, Sampler, options
from fastdit.sampler.conditions import Classes, given_conditions
from fastdit.sampler.noise import whole

SOLVERS = (*DIFFUSION_SOLVERS, *FLOW_SOLVERS, "dopri5")
Observer = Callable[[float, Tensor, Tensor], None]


@contextlib.contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Draws inside the block come from `seed`; the caller's generators are left as they were."""
    if seed is None:
        yield
        return
    devices = [device] if device.type != "cpu" else []
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        torch.manual_seed(int(seed))
        yield


def sample(
    model: DiT,
    classes: Classes,
    *,
    steps: int | None = None,
    cfg_scale: float = 4.0,
    solver: str | ODE | SDE | None = None,
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
            deterministic); with a transport `"heun"` (the default), `"euler"`, `"sde"`,
            `"sde_heun"`, a `fastdit.flow.ODE` or `SDE`, or the adaptive `"dopri5"`, which takes the
            steps that its tolerances want.
        eta: DDIM's noise; 0 is deterministic. Only with `solver="ddim"`.
        seed: of all draws; None continues torch's generator.
        guided_channels: as in `DiT.forward_with_cfg`; None guides at most 3 of the latent's
            channels, as published.
        clip_denoised: clamp each predicted x0 to [-1, 1]; for models of pixels.
        progress: show a progress bar.
        transport: of a model trained by flow matching, what it was trained with.
        guidance_interval: the timesteps between which to guide; with a transport, the times in
            [0, 1], from noise to data.
        quality, spacing, chunk, graph, native, quantize: see `fastdit.Sampler`; none of them with
            `"dopri5"`. With `chunk` each chunk draws as a call of its own.
        observe: called after each step with the time that the model was given last, its x, and the
            data that it predicted, both `(B, C, H, W)`; of each chunk.

    Returns:
        `(B, C, *size)` samples in the model's dtype.

    Raises:
        ValueError, TypeError: no DiT, a label that it does not have, an unknown solver, guidance of
            a model that has no null class, or another argument that does not fit, which is named.

    Source: Peebles & Xie 2022; Song et al. 2021; Lu et al. 2022; Ma et al. 2024.
    """
    options.checked_model(model)
    if seed is not None and not whole(seed):
        fail("seed", repr(seed), "None or an int; a Sampler takes a seed for each sample")
    _checks.function("observe", observe)
    _checks.instance("transport", transport, Transport, "a fastdit.create_transport")
    device = next(model.parameters()).device
    if transport is not None and solver == "dopri5":
        given = {"steps": steps, "eta": eta, "clip_denoised": clip_denoised}
        given |= {"quality": quality, "spacing": spacing, "chunk": chunk, "graph": graph}
        given |= {"native": native, "quantize": quantize, "observe": observe}
        for name, value in given.items():
            if value:
                fail(name, repr(value), "none with solver='dopri5'")
        with _seeded(seed, device):
            return _adaptive(
                model, classes, transport, cfg_scale, guided_channels, guidance_interval
            )
    sampler = Sampler(
        model,
        quality=quality,
        solver=solver,
        steps=steps,
        spacing=spacing,
        transport=transport,
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
    told = None if observe is None else lambda p: observe(p.time, p.seen, p.x0)
    with _seeded(seed, device):
        return sampler(classes, progress=progress, callback=told)


def _adaptive(
    model: DiT,
    classes: Classes,
    transport: Transport,
    cfg_scale: float,
    guided_channels: int | None,
    interval: tuple[float, float] | None,
) -> Tensor:
    """Samples of a flow by torchdiffeq's dopri5."""
    guided = options.guided_channels(model, cfg_scale, guided_channels)
    parameter = next(model.parameters())
    y, count = given_conditions(model, classes)
    z = torch.randn((count, model.in_channels, *model.input_size), device=parameter.device)
    guidance = Guidance(cfg_scale, (0.0, 1.0) if interval is None else interval, guided)
    draw = flow.Sampler(transport).sample_ode(num_steps=2, guidance=guidance)
    kwargs = {} if y is None else {"y": y.to(parameter.device)}
    return draw(z.to(parameter.dtype), model, **kwargs)[-1]
