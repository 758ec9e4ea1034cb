"""`fastdit.Sampler`: from class labels to samples, as fast as the machine allows.

    sampler = fastdit.Sampler(model, solver="dpm++", steps=20, cfg_scale=4.0)
    images = sampler([207, 360], seed=0)

Before the first step everything that a run needs is on the device: the solver's table, the times,
the conditioning of every step (`fastdit.sampler.conditioning`). A step is then the model and one
update, without a host sync, and on a GPU the replay of one CUDA graph.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastdit import ops
from fastdit.diffusion import GaussianDiffusion
from fastdit.flow.solvers import Solver
from fastdit.flow.transport import Transport
from fastdit.model import DiT
from fastdit.ops import _checks
from fastdit.ops._checks import fail
from fastdit.plan import Plan
from fastdit.sampler import graphs, options
from fastdit.sampler.conditioning import Conditioning
from fastdit.sampler.conditions import Classes, Conditions, conditions
from fastdit.sampler.denoiser import denoiser, stand_in
from fastdit.sampler.graphs import Captures
from fastdit.sampler.noise import published_draw, sample_seeds
from fastdit.sampler.preview import Preview, preview_of, progress_bar
from fastdit.sampler.run import Recipe, Run

GIBIBYTE = 2**30


class Sampler:
    """Samples of a DiT by any solver.

    Args:
        model: in eval mode; samples are made on its device, in its dtype. Its parameters may change
            between calls, and move.
        quality: `"fast"`, `"balanced"` or `"reference"`: the solver, steps, spacing and guidance
            interval of `fastdit.sampler.presets`, where these are not given.
        solver: `"ddpm"` (ancestral, the default), `"ddim"` or `"dpm++"` (DPM-Solver++); with a
            transport `"heun"` (the default), `"euler"`, `"sde"`, `"sde_heun"`, or a
            `fastdit.flow.ODE` or `fastdit.flow.SDE` with options of its own.
        steps: of the solver (default 250). Each is one evaluation of the model, two with Heun.
        spacing: of the timesteps: `"uniform"` (the published, the default), `"logsnr"` or
            `"karras"`; see `fastdit.diffusion.spacing`.
        diffusion: the schedule to follow, from `fastdit.create_diffusion`; instead of `steps` and
            `spacing`.
        eta: DDIM's noise; 0 is deterministic.
        order: of DPM-Solver++, 1 or 2 (2M).
        cfg_scale: classifier-free guidance; 1 is none.
        guided_channels: how many of the output's first channels are guided; None guides at most 3,
            as published.
        guidance_interval: guide only where the timestep (a flow's time, 0 to 1) lies in
            `(low, high)`, ends included. The other steps run the model on B rows instead of 2B.
        clip_denoised: clamp each predicted x0 to [−1, 1]; for models of pixels.
        transport: of a model trained by flow matching; its guidance interval is in [0, 1], noise
            to data. It has no `spacing`, `diffusion`, `eta`, `order` or `clip_denoised`.
        chunk: samples at a time; a larger call is cut into equal chunks. None takes all at once.
        conditioning_budget: bytes for the conditioning rows computed ahead; 0 leaves them to the
            model in every step.
        graph: replay a CUDA graph of the step; None does where the model is on a GPU, without
            forward hooks and outside autocast, True is an error elsewhere.
        native: whether `fastdit.NativeForward` runs in the model's place: None where it fits (CPUs,
            float32), True or an error, False never.
        quantize: `"int8"` multiplies in 8 bits there; None does not.

    Raises:
        ValueError, TypeError: an argument that does not fit, which is named.
    """

    def __init__(
        self,
        model: DiT,
        *,
        quality: str | None = None,
        solver: str | Solver | None = None,
        steps: int | None = None,
        spacing: str | None = None,
        diffusion: GaussianDiffusion | None = None,
        transport: Transport | None = None,
        eta: float = 0.0,
        order: int = 2,
        cfg_scale: float = 4.0,
        guided_channels: int | None = None,
        guidance_interval: tuple[float, float] | None = None,
        clip_denoised: bool = False,
        chunk: int | None = None,
        conditioning_budget: int = GIBIBYTE,
        graph: bool | None = None,
        native: bool | None = None,
        quantize: str | None = None,
    ) -> None:
        options.checked_model(model)
        self.model = model
        self.guided_channels = options.guided_channels(model, cfg_scale, guided_channels)
        self.plan: Plan = options.plan_of(
            model,
            quality=quality,
            solver=solver,
            steps=steps,
            spacing=spacing,
            diffusion=diffusion,
            transport=transport,
            eta=eta,
            order=order,
            clip_denoised=clip_denoised,
            guidance=(cfg_scale, self.guided_channels),
            interval=guidance_interval,
        )
        self.clip = 1.0 if clip_denoised else None
        self.chunk = options.positive("chunk", chunk)
        self.conditioning_budget = options.budget(conditioning_budget)
        _checks.switch("graph", graph)
        _checks.switch("native", native)
        self.graph = graph
        self._forward = stand_in(model, native, quantize)
        self._required = bool(native) or quantize is not None
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._captures = Captures()

    def __call__(
        self,
        classes: Classes,
        *,
        seed: int | Sequence[int] | Tensor | None = None,
        noise: Tensor | None = None,
        progress: bool = False,
        callback: Callable[[Preview], Any] | None = None,
    ) -> Tensor:
        """Class-conditional samples, `(B, C, H, W)` in the model's dtype.

        Args:
            classes: B labels; `(B, condition_dim)` vectors for a model of these; for one without
                condition the number of samples.
            seed: an int, sample i then has the seed `seed + i`, or B ints, each sample's own. A
                sample depends on its label and its seed: not on the batch or the chunks, but for
                the rounding of matrix products of other sizes. None draws from torch's generator
                in the published order (`fastdit.sampler.noise`).
            noise: `(B, C, H, W)`, what the run starts from; None draws noise. A reverse solver
                starts from data, which must be given.
            progress: show a progress bar.
            callback: called after every step with a `Preview`.

        Raises:
            ValueError, TypeError: a label that the model does not have, or a seed or noise that
                does not fit.
        """
        _checks.function("callback", callback)
        finished = []
        chunks = self._chunks(options.count(classes))
        with progress_bar(progress, len(chunks) * len(self.plan)) as advanced:
            previews = callback is not None
            for part, step, run in self._advance(classes, seed, noise, previews):
                if callback is not None and self.plan.ends[step]:
                    callback(preview_of(run, step, part))
                if step == len(self.plan) - 1:
                    finished.append(run.x.clone())
                advanced()
        return torch.cat(finished)

    def iterate(
        self,
        classes: Classes,
        *,
        seed: int | Sequence[int] | Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Iterator[Preview]:
        """The same run as an iterator over its previews, chunk after chunk."""
        for part, step, run in self._advance(classes, seed, noise, True):
            if self.plan.ends[step]:
                yield preview_of(run, step, part)

    def start_noise(self, count: int, seeds: Tensor | None = None) -> Tensor:
        """`(count, C, H, W)`, what a run of so many samples starts from.

        Args:
            count: samples.
            seeds: `(count,)` int64 on the model's device, each sample's own; None draws from
                torch's generator as the published script does.
        """
        parameter = next(self.model.parameters())
        shape = (count, self.model.in_channels, *self.model.input_size)
        if seeds is None:
            return torch.randn(shape, device=parameter.device).to(parameter.dtype)
        nothing = parameter.new_zeros(shape)
        table, _times = self._on(parameter.device)
        with torch.no_grad():
            return ops.diffusion_step(nothing, nothing, table, len(self.plan), seed=seeds)[0]

    # ---- a call ------------------------------------------------------------------------------

    def _advance(
        self, classes: Any, seed: Any, noise: Tensor | None, previews: bool
    ) -> Iterator[tuple[slice, int, Run]]:
        """Every evaluation of every chunk, done: the chunk, the evaluation, its run."""
        parameter = next(self.model.parameters())
        if self.model.training:
            fail("model", "one in training mode", "one in eval mode: call model.eval()")
        device, dtype = parameter.device, parameter.dtype
        captured = self._captured(device)
        given = conditions(
            self.model,
            classes,
            guided=any(self.plan.guided),
            padded=captured,
            device=device,
        )
        count = len(given.places)
        seeds = None if seed is None else sample_seeds(seed, count).to(device)
        shape = (self.model.in_channels, *self.model.input_size)
        if noise is not None:
            options.checked_noise(noise, (count, *shape), device)
        if noise is None and self.plan.from_data:
            fail("noise", None, "the data that a reverse solver starts from")
        table, times = self._on(device)
        recipe = Recipe(
            denoiser(self.model, self._forward, self._required),
            self.plan,
            table,
            times,
            self.guided_channels,
            published_draw(any(self.plan.guided)) if seeds is None else None,
            self.clip,
        )
        with torch.no_grad():
            conditioning = self._conditioning(times, given)
        for part in self._chunks(count):
            own = None if seeds is None else seeds[part]
            with torch.no_grad():
                if noise is None:
                    x = self.start_noise(part.stop - part.start, own)
                else:
                    x = noise[part].to(dtype)
            others = (replace(given, places=given.places[part]), own, conditioning)
            with self._begun(captured, previews, recipe, x.contiguous(), *others) as run:
                for step in run:
                    yield part, step, run

    @contextlib.contextmanager
    def _begun(self, captured: bool, previews: bool, *chunk: Any) -> Iterator[Run]:
        """A chunk's run, before its first step."""
        if not captured:
            with torch.no_grad():
                run = Run(*chunk)
            yield run
            return
        with self._captures.run(None, *chunk) as captured_run:
            captured_run.keeps_seen = previews
            yield captured_run

    def _conditioning(self, times: Tensor, given: Conditions) -> Conditioning | None:
        """The rows of the call, or None where the model computes its own in each step."""
        if not self.conditioning_budget:
            return None
        reuse = self._captures.tables()
        model = self.model if self._forward is None else self._forward
        found = Conditioning(model, times, given, self.conditioning_budget, reuse)
        if not found.steps:
            return None
        found.fill(0)
        return found

    def _chunks(self, count: int) -> list[slice]:
        """As few as `chunk` allows, their sizes equal or one apart."""
        parts = -(-count // (self.chunk or count)) if count else 0
        edges = [count * i // parts for i in range(parts + 1)] if parts else []
        return [slice(*pair) for pair in itertools.pairwise(edges)]

    def _captured(self, device: torch.device) -> bool:
        """Whether steps are replayed from CUDA graphs."""
        why = graphs.unfit(self.model, device)
        if self.graph and why is not None:
            fail("graph", True, f"False or None: {why}")
        captured = why is None and self.graph is not False
        if captured:
            self._captures.check(graphs.parameter_storage(self.model))
        return captured

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The plan's whole table, and times."""
        if device not in self._tables:
            times = self.plan.times
            times = times.float() if times.is_floating_point() else times
            table = self.plan.whole_table().to(device, torch.float32)
            self._tables[device] = (table, times.to(device))
        return self._tables[device]
