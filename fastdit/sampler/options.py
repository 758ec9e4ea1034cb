"""A sampler's options, checked, and the plan that follows from them."""

from __future__ import annotations

import math
from collections.abc import Sized
from numbers import Real
from typing import Any

import torch

from fastdit.diffusion import SPACINGS, GaussianDiffusion, create_diffusion
from fastdit.flow.solvers import Solver
from fastdit.flow.transport import Transport
from fastdit.model import DiT
from fastdit.ops._checks import fail, instance, tensor
from fastdit.plan import Plan
from fastdit.sampler.diffusion import diffusion_plan
from fastdit.sampler.flow import flow_plan
from fastdit.sampler.presets import preset

STEPS = 250
"""Of a run whose steps are not given, as published."""

TRAINED = 1000
"""Timesteps of a published diffusion."""


def plan_of(
    model: DiT,
    *,
    quality: str | None,
    solver: str | Solver | None,
    steps: int | None,
    spacing: str | None,
    diffusion: GaussianDiffusion | None,
    transport: Transport | None,
    eta: float,
    order: int,
    clip_denoised: bool,
    guidance: tuple[float, int],
    interval: Any,
) -> Plan:
    """The plan of `Sampler`'s arguments; `guidance` is its scale and the channels it guides."""
    instance("diffusion", diffusion, GaussianDiffusion, "a fastdit.create_diffusion")
    instance("transport", transport, Transport, "a fastdit.create_transport")
    if not isinstance(eta, Real) or isinstance(eta, bool):
        fail("eta", repr(eta), "a number")
    if quality is not None:
        for name, value in (("diffusion", diffusion), ("transport", transport)):
            if value is not None:
                fail(name, "one", "None beside quality, which is of the model's own diffusion")
        chosen = preset(quality)
        solver = chosen["solver"] if solver is None else solver
        steps = chosen["steps"] if steps is None else steps
        spacing = chosen.get("spacing") if spacing is None else spacing
        interval = chosen.get("guidance_interval") if interval is None else interval
    if transport is not None:
        _no_diffusion(spacing=spacing, diffusion=diffusion, eta=eta, clip_denoised=clip_denoised)
        _no_diffusion(order=order if order != 2 else None)
        plan = flow_plan(transport, solver, STEPS if steps is None else steps)
    else:
        schedule = _schedule(model, diffusion, steps, spacing)
        plan = diffusion_plan(schedule, solver or "ddpm", eta, order)
    scale, channels = guidance
    interval = _interval(interval)
    if scale == 1 or not channels:
        return plan
    if transport is not None and interval is not None:
        if not 0 <= interval[0] <= interval[1] <= 1:
            fail("guidance_interval", interval, "times in [0, 1] with a transport")
        interval = interval[0] * transport.time_scale, interval[1] * transport.time_scale
    return plan.with_guidance(scale, interval)


def _no_diffusion(**options: Any) -> None:
    """A flow has none of these: each is None, 0 or False."""
    for name, value in options.items():
        if value:
            fail(name, repr(value), "none with a transport")


def _schedule(
    model: DiT, diffusion: GaussianDiffusion | None, steps: int | None, spacing: str | None
) -> GaussianDiffusion:
    if diffusion is not None:
        for name, value in (("steps", steps), ("spacing", spacing)):
            if value is not None:
                fail(name, repr(value), "None beside a diffusion, which has its own")
        if diffusion.learns_variance != model.learn_sigma:
            allowed = f"one whose learn_sigma is the model's, {model.learn_sigma}"
            fail("diffusion", f"one with learn_sigma {diffusion.learns_variance}", allowed)
        return diffusion
    spacing = "uniform" if spacing is None else spacing
    if spacing not in SPACINGS:
        fail("spacing", repr(spacing), ", ".join(map(repr, SPACINGS)))
    steps = positive("steps", STEPS if steps is None else steps)
    if steps > TRAINED:
        fail("steps", steps, f"at most {TRAINED}, of which a diffusion has been trained on")
    prefix = "" if spacing == "uniform" else spacing
    return create_diffusion(f"{prefix}{steps}", learn_sigma=model.learn_sigma)


def checked_model(model: Any) -> None:
    """A DiT, whether or not something is wrapped around it that lets its attributes through."""
    if not hasattr(model, "guidable"):
        raise TypeError(
            f"model: got {type(model).__name__}, allowed is a fastdit.DiT; "
            "fastdit.load_model reads one from a checkpoint"
        )


def guided_channels(model: DiT, cfg_scale: float, channels: int | None) -> int:
    if not isinstance(cfg_scale, Real) or type(cfg_scale) is bool or not math.isfinite(cfg_scale):
        fail("cfg_scale", repr(cfg_scale), "a finite number")
    if cfg_scale != 1 and not model.guidable:
        fail("cfg_scale", cfg_scale, "1 for a model without a null class")
    if channels is None:
        return min(3, model.in_channels)
    if type(channels) is not int or not 0 <= channels <= model.out_channels:
        fail("guided_channels", channels, f"an int from 0 to {model.out_channels}")
    return channels


def _interval(interval: Any) -> tuple[float, float] | None:
    if interval is None:
        return None
    try:
        low, high = (float(time) for time in interval)
    except (TypeError, ValueError):
        low = high = math.nan
    if not low <= high:
        fail("guidance_interval", repr(interval), "two times, the lower first")
    return low, high


def count(classes: Any) -> int:
    """How many samples a call asks for."""
    if not isinstance(classes, int | Sized):
        fail("classes", repr(classes), "a list of labels, vectors, or a number of samples")
    return classes if isinstance(classes, int) else len(classes)


def checked_noise(noise: Any, shape: tuple[int, ...], device: torch.device) -> None:
    tensor("noise", noise, (len(shape),), f"(B, *{shape[1:]})")
    if noise.shape != shape or noise.device != device:
        got = f"{tuple(noise.shape)} on {noise.device}"
        fail("noise", got, f"({shape[0]}, *{shape[1:]}) on {device}")


def positive(name: str, value: Any) -> Any:
    if value is not None and (type(value) is not int or value < 1):
        fail(name, repr(value), "an int >= 1")
    return value


def budget(value: Any) -> int:
    if type(value) is not int or value < 0:
        fail("conditioning_budget", repr(value), "an int >= 0, in bytes")
    return value
