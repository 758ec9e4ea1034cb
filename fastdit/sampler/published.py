"""The published loops (`fastdit.diffusion.loops`) as runs of the engine.

What a loop was asked for becomes a `Run` of a plan, as `fastdit.Sampler`'s calls do: `model` is
whatever is called as `model(x, t, **model_kwargs)`; that of a plain DiT has its conditioning
computed ahead and, on a GPU, is replayed from a CUDA graph. The engine's update knows no functions
of x0 or x, and no method that somebody has overridden: with `denoised_fn`, `cond_fn` or such a
method the steps are the diffusion's own, in the same loop.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from fastdit.diffusion import GaussianDiffusion
from fastdit.diffusion.calls import checked_output
from fastdit.diffusion.steps import METHODS, overridden
from fastdit.ops import _checks
from fastdit.ops._checks import fail
from fastdit.plan import Plan
from fastdit.sampler import graphs
from fastdit.sampler.ahead import Ahead, NotPlain, PlainDiT, plain
from fastdit.sampler.conditions import unconditional
from fastdit.sampler.denoiser import Denoiser
from fastdit.sampler.diffusion import diffusion_plan
from fastdit.sampler.graphs import Captures
from fastdit.sampler.noise import Draw
from fastdit.sampler.run import Loop, Recipe, Run

_STEPS = {"ddpm": "p_sample", "ddim": "ddim_sample", "dpm++": "dpm_solver_sample"}
_captures: weakref.WeakKeyDictionary[Any, Captures] = weakref.WeakKeyDictionary()
"""Of each diffusion."""


@dataclass(frozen=True)
class Published:
    """What a published loop was asked for.

    Attributes:
        diffusion: whose loop it is.
        solver: `"ddpm"`, `"ddim"` or `"dpm++"`.
        model, x: the model, and `(B, C, ...)` what to start from.
        clip_denoised, denoised_fn, cond_fn, model_kwargs, noise_fn: as published.
        graph: see `fastdit.diffusion.loops`.
        options: of the solver, by name.
    """

    diffusion: GaussianDiffusion
    solver: str
    model: Any
    x: Tensor
    clip_denoised: bool = True
    denoised_fn: Callable[[Tensor], Tensor] | None = None
    cond_fn: Callable[..., Tensor] | None = None
    model_kwargs: dict[str, Any] | None = None
    noise_fn: Draw | None = None
    graph: bool | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not callable(self.model):
            got = type(self.model).__name__
            raise TypeError(f"model: got {got}, allowed is one called as model(x, t, **kwargs)")
        for name in ("denoised_fn", "cond_fn", "noise_fn"):
            _checks.function(name, getattr(self, name))
        _checks.instance("model_kwargs", self.model_kwargs, Mapping, "a dict")
        _checks.switch("graph", self.graph)

    @contextlib.contextmanager
    def begun(self) -> Iterator[Loop]:
        """The loop, before its first step."""
        with torch.no_grad():
            begun = self._begun()
        with begun as loop:
            yield loop

    def _begun(self) -> contextlib.AbstractContextManager[Loop]:
        found, why = None, self._overridden()
        if why is None:
            try:
                found = plain(self.model, self.x, self.model_kwargs)
            except NotPlain as not_plain:
                why = str(not_plain)
        stepwise = self._hook() or self._overridden()
        why = stepwise or why or self._why_eager(found)
        if self.graph and why is not None:
            fail("graph", True, f"None or False: {why}")
        if stepwise is not None:
            return contextlib.nullcontext(Stepwise(self, found))
        if why is None and self.graph is not False:
            return self._captured(found)
        return contextlib.nullcontext(self._eager(found))

    def _hook(self) -> str | None:
        """A function that the engine's update has no place for, or None."""
        hooks = {"denoised_fn": self.denoised_fn, "cond_fn": self.cond_fn}
        given = [name for name, function in hooks.items() if function is not None]
        return f"{given[0]} is called in every step" if given else None

    def _overridden(self) -> str | None:
        """A method of a step that is not fastdit's, or None."""
        others = [name for name in METHODS if overridden(self.diffusion, name)]
        return f"{type(self.diffusion).__name__}.{others[0]} is not fastdit's" if others else None

    def _why_eager(self, found: PlainDiT) -> str | None:
        """Why the steps of a plain DiT are not replayed from a graph, or None."""
        if self.noise_fn is not None:
            return "noise_fn is called in every step"
        if not self.x.is_contiguous():
            return "the noise is not contiguous"
        if not all(isinstance(value, Real) for value in found.options.values()):
            return "an option of the model is no number"
        return graphs.unfit(found.model, self.x.device)

    # ---- runs of the engine ------------------------------------------------------------------

    def _eager(self, found: PlainDiT | None) -> Run:
        """Of a plain DiT, or of anything else that is called like a model."""
        plan = self._plan()
        if found is None:
            model, kwargs = self.model, self.model_kwargs or {}
            given = unconditional(len(self.x), self.x.device)
            return Run(self._recipe(plan, lambda x, t, _y: model(x, t, **kwargs)), self.x, given)
        ahead = found.ahead(self.x, plan.times.to(self.x.device))
        recipe = self._recipe(plan, ahead.denoise)
        return Run(recipe, self.x, ahead.conditions, None, ahead.conditioning)

    def _captured(self, found: PlainDiT) -> contextlib.AbstractContextManager[Run]:
        """Of a plain DiT; its graphs are kept for other loops of the diffusion while it lives."""
        captures = _captures.setdefault(self.diffusion, Captures())
        captures.check(graphs.parameter_storage(found.model))
        plan = self._plan()
        times, reuse = plan.times.to(self.x.device), captures.tables()
        ahead = found.ahead(self.x, times, padded=True, reuse=reuse)
        solver = (self.solver, *self.options.items(), self.clip_denoised)
        model = weakref.ref(found.model, lambda _gone: captures.clear())
        own = (model, found.method, *found.options.items(), solver)
        recipe = self._recipe(plan, ahead.denoise)
        return captures.run(own, recipe, self.x, ahead.conditions, None, ahead.conditioning)

    def _plan(self) -> Plan:
        return diffusion_plan(self.diffusion, self.solver, **self.options)

    def checked(self, call: Denoiser) -> Denoiser:
        """The same call, the shape of its result checked."""
        learns = self.diffusion.learns_variance

        def denoise(x: Tensor, t: Tensor | None, y: Tensor | None, **rows: Tensor) -> Tensor:
            return checked_output(call(x, t, y, **rows), x, learns)[0]

        return denoise

    def _recipe(self, plan: Plan, call: Denoiser) -> Recipe:
        return Recipe(
            self.checked(call),
            plan,
            table=plan.whole_table().to(self.x.device, torch.float32),
            times=plan.times.to(self.x.device),
            guided_channels=0,  # whoever wants guidance has it in the model, as published
            draw=torch.randn_like if self.noise_fn is None else self.noise_fn,
            clip=1.0 if self.clip_denoised else None,
        )


class Stepwise(Loop):
    """The diffusion's own steps: `p_sample`, `ddim_sample` or `dpm_solver_sample`."""

    def __init__(self, asked: Published, found: PlainDiT | None) -> None:
        self.asked, self.x, self.at = asked, asked.x, 0
        self.x0: Tensor | None = None
        self.timesteps = asked.diffusion.descending(asked.x)
        self.out: dict[str, Tensor] = {}
        self.ahead: Ahead | None = None
        if found is not None:
            times = torch.tensor(asked.diffusion.timestep_map[::-1], device=asked.x.device)
            self.ahead = found.ahead(asked.x, times)

    def __len__(self) -> int:
        return len(self.timesteps)

    def advance(self, step: int) -> None:
        asked, self.at = self.asked, step
        options = dict(asked.options)
        if asked.noise_fn is not None:
            options["noise"] = asked.noise_fn
        if asked.solver == "dpm++":
            options["x0_previous"] = self.x0
        self.out = getattr(asked.diffusion, _STEPS[asked.solver])(
            self.asked.model if self.ahead is None else self._model,
            self.x,
            self.timesteps[step],
            clip_denoised=asked.clip_denoised,
            denoised_fn=asked.denoised_fn,
            cond_fn=asked.cond_fn,
            model_kwargs=asked.model_kwargs,
            **options,
        )
        self.resume(self.out)

    def result(self) -> dict[str, Tensor]:
        return self.out

    def resume(self, result: dict[str, Tensor]) -> None:
        self.x, self.x0 = result["sample"], result.get("pred_xstart")

    def _model(self, x: Tensor, t: Tensor, **_kwargs: Any) -> Tensor:
        ahead = self.ahead
        if ahead.conditioning is None:
            return ahead.denoise(x, t, ahead.conditions.select(ahead.conditions.places))
        rows = ahead.conditioning.rows(self.at, ahead.conditions.places)
        return ahead.denoise(x, None, None, conditioning=rows)
