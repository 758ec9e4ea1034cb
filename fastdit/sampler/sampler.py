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
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdit import ops
from fastdit.diffusion import SPACINGS, GaussianDiffusion, create_diffusion
from fastdit.flow import Transport
from fastdit.model import DiT
from fastdit.ops._checks import fail
from fastdit.reference import TABLE_COLUMNS
from fastdit.sampler.conditioning import Conditioning
from fastdit.sampler.denoiser import denoiser
from fastdit.sampler.flow import flow_plan
from fastdit.sampler.graphs import CapturedRun, Captures, parameter_storage
from fastdit.sampler.noise import sample_seeds
from fastdit.sampler.plan import DIFFUSION_SOLVERS, Plan, diffusion_plan
from fastdit.sampler.run import Recipe, Run

GIBIBYTE = 2**30


@dataclass(frozen=True)
class Preview:
    """A chunk after a step.

    Attributes:
        step: the step done, 0 to `steps` − 1.
        steps: how many there are.
        samples: which samples of the call these are.
        x: `(b, C, H, W)`, the samples as noisy as they still are.
        x0: like `x`, what the model now predicts them to become.
    """

    step: int
    steps: int
    samples: slice
    x: Tensor
    x0: Tensor


class Sampler:
    """Samples of a DiT by any solver.

    Args:
        model: in eval mode; samples are made on its device, in its dtype. Its parameters may change
            between calls, and move.
        solver: `"ddpm"` (ancestral, the default), `"ddim"` or `"dpm++"` (DPM-Solver++); with a
            transport see `fastdit.sampler.flow`.
        steps: evaluations of the model (default 250).
        spacing: of the timesteps: `"uniform"` (the published, the default), `"logsnr"` or
            `"karras"`; see `fastdit.diffusion.spacing`.
        diffusion: the schedule to follow, from `fastdit.create_diffusion`; instead of `steps` and
            `spacing`.
        eta: DDIM's noise; 0 is deterministic.
        order: of DPM-Solver++, 1 or 2 (2M).
        cfg_scale: classifier-free guidance; 1 is none.
        guided_channels: how many of the output's first channels are guided; None guides at most 3,
            as published.
        guidance_interval: guide only where the timestep lies in `(low, high)`, ends included. The
            other steps run the model on B rows instead of 2B.
        clip_denoised: clamp each predicted x0 to [−1, 1]; for models of pixels.
        transport: of a model trained by flow matching; its guidance interval is in [0, 1], noise
            to data. It has no `spacing`, `diffusion`, `eta`, `order` or `clip_denoised`.
        chunk: samples at a time; a larger call is cut into equal chunks. None takes all at once.
        conditioning_budget: bytes for the conditioning rows computed ahead; 0 leaves them to the
            model in every step.
        graph: replay a CUDA graph of the step; None does where the model is on a GPU.
        native: see `fastdit.sampler.denoiser`.
        quantize: see there.

    Raises:
        ValueError: an argument that does not fit, which is named.
    """

    def __init__(
        self,
        model: DiT,
        *,
        solver: str | None = None,
        steps: int | None = None,
        spacing: str | None = None,
        diffusion: GaussianDiffusion | None = None,
        eta: float = 0.0,
        order: int = 2,
        cfg_scale: float = 4.0,
        guided_channels: int | None = None,
        guidance_interval: tuple[float, float] | None = None,
        clip_denoised: bool = False,
        transport: Transport | None = None,
        chunk: int | None = None,
        conditioning_budget: int = GIBIBYTE,
        graph: bool | None = None,
        native: bool | None = None,
        quantize: str | None = None,
    ) -> None:
        self.model = model
        self.guided_channels = _guided_channels(model, cfg_scale, guided_channels)
        self.cfg_scale = cfg_scale
        interval = _interval(guidance_interval)
        if transport is None:
            diffusion = _schedule(model, diffusion, steps, spacing)
            plan = diffusion_plan(diffusion, solver or DIFFUSION_SOLVERS[0], eta, order)
        else:
            _no_diffusion(spacing=spacing, diffusion=diffusion, eta=eta or None, clip=clip_denoised)
            plan = flow_plan(transport, solver, steps)
            interval = interval and tuple(t * transport.time_scale for t in interval)
        if cfg_scale != 1 and self.guided_channels:
            plan = plan.with_guidance(cfg_scale, interval)
        self.plan: Plan = plan
        self.clip = 1.0 if clip_denoised else None
        self.chunk = _positive("chunk", chunk)
        self.conditioning_budget = _budget(conditioning_budget)
        self.graph, self.native, self.quantize = graph, native, quantize
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._captures = Captures()

    def __call__(
        self,
        classes: Sequence[int] | Tensor,
        *,
        seed: int | Sequence[int] | Tensor | None = None,
        noise: Tensor | None = None,
        progress: bool = False,
        callback: Callable[[Preview], Any] | None = None,
    ) -> Tensor:
        """Class-conditional samples, `(B, C, H, W)` in the model's dtype.

        Args:
            classes: B labels.
            seed: an int, sample i then has the seed `seed + i`, or B ints, each sample's own. A
                sample depends on its label and its seed: not on the batch or the chunks, but for
                the rounding of matrix products of other sizes. None draws from torch's generator
                in the published order (`fastdit.sampler.noise`).
            noise: `(B, C, H, W)`, the start noise; None draws it.
            progress: show a progress bar.
            callback: called after every step with a `Preview`.

        Raises:
            ValueError, TypeError: a label that the model does not have, or a seed or noise that
                does not fit.
        """
        finished = []
        chunks = self._chunks(len(classes))
        with _bar(progress, len(chunks) * len(self.plan)) as advanced:
            for part, step, run, x in self._advance(classes, seed, noise, callback is not None):
                if callback is not None and self.plan.ends[step]:
                    callback(self._preview(part, step, run, x))
                if step == len(self.plan) - 1:
                    finished.append(run.x.clone())
                advanced()
        return torch.cat(finished)

    def iterate(
        self,
        classes: Sequence[int] | Tensor,
        *,
        seed: int | Sequence[int] | Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Iterator[Preview]:
        """The same run as an iterator over its previews, chunk after chunk."""
        for part, step, run, x in self._advance(classes, seed, noise, True):
            if self.plan.ends[step]:
                yield self._preview(part, step, run, x)

    # ---- a call ------------------------------------------------------------------------------

    def _advance(
        self, classes: Any, seed: Any, noise: Tensor | None, previews: bool
    ) -> Iterator[tuple[slice, int, Run, Tensor | None]]:
        """Every step of every chunk, done: the chunk, the step, its run, and x before it where a
        preview needs that."""
        parameter = next(self.model.parameters())
        if self.model.training:
            fail("model", "one in training mode", "one in eval mode: call model.eval()")
        device, dtype = parameter.device, parameter.dtype
        captured = self._captured(device)
        labels, places = self._labels(classes, device, captured)
        seeds = None if seed is None else sample_seeds(seed, len(places)).to(device)
        shape = (self.model.in_channels, *self.model.input_size)
        if noise is not None and (noise.shape != (len(places), *shape) or noise.device != device):
            fail("noise", f"{tuple(noise.shape)} on {noise.device}", f"(B, *{shape}) on {device}")
        table, times = self._on(device)
        recipe = Recipe(
            denoiser(self.model, self.native, self.quantize),
            self.plan,
            table,
            times,
            self.clip,
            self.guided_channels,
            seeds is not None,
        )
        with torch.no_grad():
            conditioning = self._conditioning(times, labels)
        for part in self._chunks(len(places)):
            own = None if seeds is None else seeds[part]
            with torch.no_grad():
                x = self._start(recipe, own, (part.stop - part.start, *shape), dtype, device)
                x = x if noise is None else noise[part].to(dtype)
                given = (x.contiguous(), labels, places[part], own)
                run, mover = self._begin(recipe, given, conditioning, captured)
            for step in range(len(self.plan)):
                with torch.no_grad():
                    before = run.x.clone() if previews and self.plan.data is not None else None
                    run.hold(conditioning, step)
                    mover.advance(step)
                yield part, step, run, before

    def _begin(
        self, recipe: Recipe, given: tuple, conditioning: Conditioning | None, captured: bool
    ) -> tuple[Run, Run | CapturedRun]:
        """A chunk's run, and what moves it."""
        x, labels, places, seeds = given
        if not captured:
            run = Run(recipe, *given, captured=False)
            return run, run
        rows = None if conditioning is None else conditioning.table.data_ptr()
        key = (x.shape, x.dtype, labels.shape, recipe.seeded, rows)
        own = (x.clone(), labels.clone(), places.clone(), None if seeds is None else seeds.clone())
        captured_run, new = self._captures.get(key, lambda: Run(recipe, *own, captured=True))
        if not new:
            captured_run.run.start(*given)
        return captured_run.run, captured_run

    def _conditioning(self, times: Tensor, labels: Tensor) -> Conditioning | None:
        """The rows of the call, or None where the model computes its own in each step."""
        if not self.conditioning_budget:
            return None
        reuse = self._captures.tables()
        found = Conditioning(self.model, times, labels, self.conditioning_budget, reuse)
        if not found.steps:
            return None
        found.fill(0)
        return found

    def _start(
        self,
        recipe: Recipe,
        seeds: Tensor | None,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
    ) -> Tensor:
        """The noise to start from: from the seeds, or as the published script draws it."""
        if seeds is None:
            return torch.randn(shape, device=device).to(dtype)
        nothing = torch.zeros(shape, dtype=dtype, device=device)
        return ops.diffusion_step(nothing, nothing, recipe.table, len(self.plan), seed=seeds)[0]

    def _preview(self, part: slice, step: int, run: Run, before: Tensor | None) -> Preview:
        x0 = run.q.clone() if before is None else run.q * self.plan.data[step, 1]
        if before is not None:
            x0 = x0 + before * self.plan.data[step, 0]
        ends = self.plan.ends
        return Preview(sum(ends[:step]), sum(ends), part, run.x.clone(), x0)

    def _chunks(self, count: int) -> list[slice]:
        """As few as `chunk` allows, their sizes equal or one apart."""
        parts = -(-count // (self.chunk or count)) if count else 0
        edges = [count * i // parts for i in range(parts + 1)] if parts else []
        return [slice(*pair) for pair in itertools.pairwise(edges)]

    def _captured(self, device: torch.device) -> bool:
        """Whether steps are replayed from CUDA graphs."""
        if self.graph and device.type != "cuda":
            fail("graph", True, f"False or None for a model on {device}")
        captured = device.type == "cuda" if self.graph is None else self.graph
        if captured:
            self._captures.check(parameter_storage(self.model))
        return captured

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The plan's table, with a row behind it that draws start noise, and times."""
        if device not in self._tables:
            draw = np.zeros((1, len(TABLE_COLUMNS)))
            draw[0, TABLE_COLUMNS.index("sigma")] = 1
            table = torch.from_numpy(np.concatenate([self.plan.table, draw]))
            times = torch.from_numpy(self.plan.times)
            times = times.float() if times.is_floating_point() else times
            self._tables[device] = (table.to(device, torch.float32), times.to(device))
        return self._tables[device]

    def _labels(self, classes: Any, device: torch.device, captured: bool) -> tuple[Tensor, Tensor]:
        """The distinct labels, the null class behind them, and which of them each sample has.

        For a graph they are filled up to a power of two, so that a call with other labels finds
        the graph of an earlier one.
        """
        given = torch.as_tensor(classes, dtype=torch.int64).cpu()
        if given.dim() != 1 or given.numel() == 0:
            fail("classes", tuple(given.shape), "a non-empty list of labels")
        if given.min() < 0 or given.max() >= self.model.num_classes:
            fail("classes", given.tolist(), f"0 to {self.model.num_classes - 1}")
        distinct, places = given.unique(return_inverse=True)
        nulls = int(any(self.plan.guided))
        if captured:
            nulls = (1 << (len(distinct) + nulls - 1).bit_length()) - len(distinct)
        null = self.model.num_classes if any(self.plan.guided) else int(distinct[0])
        distinct = torch.cat([distinct, torch.full((nulls,), null)])
        return distinct.to(device), places.to(device)


@contextlib.contextmanager
def _bar(progress: bool, total: int) -> Iterator[Callable[[], Any]]:
    """A function to call after each evaluation of the model: it moves the bar, if there is one."""
    if not progress:
        yield lambda: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total) as bar:
        yield bar.update


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
    steps = _positive("steps", 250 if steps is None else steps)
    prefix = "" if spacing == "uniform" else spacing
    return create_diffusion(f"{prefix}{steps}", learn_sigma=model.learn_sigma)


def _no_diffusion(**options: Any) -> None:
    """A flow has none of these: each is None or False."""
    for name, value in options.items():
        if value:
            fail("clip_denoised" if name == "clip" else name, repr(value), "none with a transport")


def _guided_channels(model: DiT, cfg_scale: float, channels: int | None) -> int:
    if cfg_scale != 1 and model.y_embedder.dropout_prob == 0:
        fail("cfg_scale", cfg_scale, "1 for a model without a null class")
    if channels is None:
        return min(3, model.in_channels)
    if not isinstance(channels, int) or not 0 <= channels <= model.out_channels:
        fail("guided_channels", channels, f"an int from 0 to {model.out_channels}")
    return channels


def _interval(interval: Any) -> tuple[float, float] | None:
    if interval is None:
        return None
    if len(interval) != 2 or not interval[0] <= interval[1]:
        fail("guidance_interval", interval, "two times, the lower first")
    return float(interval[0]), float(interval[1])


def _positive(name: str, value: Any) -> Any:
    if value is not None and (type(value) is not int or value < 1):
        fail(name, repr(value), "an int >= 1")
    return value


def _budget(value: Any) -> int:
    if type(value) is not int or value < 0:
        fail("conditioning_budget", repr(value), "an int >= 0, in bytes")
    return value
