"""Sampling from noise to x0: one loop for every sampler.

A loop starts at t = T − 1 with `torch.randn(shape)`, ends after t = 0 and has, besides those of a
single step (`fastdit.diffusion.steps`), the arguments

- `shape`: of the samples, `(B, C, ...)`.
- `noise`: the samples to start from; None draws them.
- `device`: where to sample; None takes the start noise's device, or the model's.
- `progress`: show a tqdm bar.
- `noise_fn`: called once a step with x, gives the step's noise; None is `torch.randn_like`.

`*_loop` returns the last samples. `*_loop_progressive` yields each step's dict; what its consumer
puts under `sample` is what the next step starts from, as inpainting needs. Steps run without
gradients. The conditioning of a plain DiT is computed before the first step
(`fastdit.sampler.ahead`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ParamSpec

import torch
from torch import Tensor

from fastdit.diffusion.steps import DenoisedFn, Model, ReverseSteps, Sample
from fastdit.ops import _checks

NoiseFn = Callable[[Tensor], Tensor | None]


def _model_device(model: Model) -> torch.device:
    """The device of a module's parameters, or of the module whose bound method `model` is."""
    module = getattr(model, "__self__", model)
    if isinstance(module, torch.nn.Module):
        for parameter in module.parameters():
            return parameter.device
    raise ValueError("device: got None, allowed is a device: the model has no parameters on one")


def _start(model: Model, shape: Sequence[int], noise: Any, device: Any) -> Tensor:
    """The noise given, checked, or drawn."""
    if not isinstance(shape, tuple | list) or len(shape) < 2:
        _checks.fail("shape", repr(shape), "a tuple or list (B, C, ...)")
    if noise is None:
        return torch.randn(*shape, device=_model_device(model) if device is None else device)
    _checks.tensor("noise", noise, (len(shape),), str(tuple(shape)))
    wanted = noise.device if device is None else torch.device(device)
    elsewhere = wanted.type != noise.device.type or wanted.index not in (None, noise.device.index)
    if noise.shape != torch.Size(shape) or elsewhere:
        _checks.fail("noise", _checks.described(noise), f"{tuple(shape)} on {wanted}")
    return noise


Arguments = ParamSpec("Arguments")


def _last_of(progressive: Callable[Arguments, Iterator[Sample]]) -> Callable[Arguments, Tensor]:
    """The same run with the same arguments, returning its last samples only."""

    @functools.wraps(progressive)
    def loop(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Tensor:
        for out in progressive(*args, **kwargs):
            sample = out["sample"]
        return sample

    whole = progressive.__name__.removesuffix("_progressive")
    loop.__name__, loop.__qualname__ = whole, f"SamplingLoops.{whole}"
    loop.__doc__ = f"The last samples of `{progressive.__name__}`, same arguments."
    loop.__annotations__ = progressive.__annotations__ | {"return": "Tensor"}
    signature = inspect.signature(progressive).replace(return_annotation="Tensor")
    vars(loop)["__signature__"] = signature
    return loop


class SamplingLoops(ReverseSteps):
    """Whole sampling runs of the steps of `ReverseSteps`."""

    def p_sample_loop_progressive(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        cond_fn: Model | None = None,
        model_kwargs: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        *,
        noise_fn: NoiseFn | None = None,
    ) -> Iterator[Sample]:
        """DDPM, yielding each step's `p_sample`; arguments at the top of this module."""
        start = _start(model, shape, noise, device)
        model = self._ahead(model, start, model_kwargs)

        def step(x: Tensor, t: Tensor, _x0: Tensor | None) -> Sample:
            given = (clip_denoised, denoised_fn, cond_fn, model_kwargs)
            return self.p_sample(model, x, t, *given, noise=noise_fn)

        return self._loop(step, start, progress)

    p_sample_loop = _last_of(p_sample_loop_progressive)

    def ddim_sample_loop_progressive(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        cond_fn: Model | None = None,
        model_kwargs: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
        *,
        noise_fn: NoiseFn | None = None,
    ) -> Iterator[Sample]:
        """DDIM, yielding each step's `ddim_sample`; arguments at the top of this module."""
        start = _start(model, shape, noise, device)
        model = self._ahead(model, start, model_kwargs)

        def step(x: Tensor, t: Tensor, _x0: Tensor | None) -> Sample:
            given = (clip_denoised, denoised_fn, cond_fn, model_kwargs, eta)
            return self.ddim_sample(model, x, t, *given, noise=noise_fn)

        return self._loop(step, start, progress)

    ddim_sample_loop = _last_of(ddim_sample_loop_progressive)

    def dpm_solver_sample_loop_progressive(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        cond_fn: Model | None = None,
        model_kwargs: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        order: int = 2,
    ) -> Iterator[Sample]:
        """DPM-Solver++(1) or (2M), yielding each step's `dpm_solver_sample`; arguments at the top
        of this module.

        The first and the last step are of order 1, and the last one gives x0, as with diffusers'
        `final_sigmas_type="zero"`. The steps are those of the respacing: 20 are often enough.
        """
        start = _start(model, shape, noise, device)
        model = self._ahead(model, start, model_kwargs)

        def step(x: Tensor, t: Tensor, x0: Tensor | None) -> Sample:
            given = (clip_denoised, denoised_fn, cond_fn, model_kwargs, order)
            return self.dpm_solver_sample(model, x, t, *given, x0_previous=x0)

        return self._loop(step, start, progress)

    dpm_solver_sample_loop = _last_of(dpm_solver_sample_loop_progressive)

    def _ahead(self, model: Model, x: Tensor, model_kwargs: dict[str, Any] | None) -> Model:
        """The model, its conditioning computed before the first step where that is possible."""
        from fastdit.sampler.ahead import ahead  # which needs the diffusions

        return ahead(model, x, torch.tensor(self.timestep_map[::-1]), model_kwargs)

    def _loop(
        self, step: Callable[[Tensor, Tensor, Tensor | None], Sample], x: Tensor, progress: bool
    ) -> Iterator[Sample]:
        """`step(x, t, x0 of the step before)` for t = T − 1 to 0. All t are on the device at the
        start: no step copies anything there."""
        x0 = None
        for t in self._descending(x, progress):
            with torch.no_grad():
                out = step(x, t, x0)
            yield out
            x, x0 = out["sample"], out["pred_xstart"]

    def _descending(self, x: Tensor, progress: bool) -> Any:
        """The batch's timesteps `(B,)` from the last to the first, behind a bar if asked."""
        every = torch.arange(self.num_timesteps - 1, -1, -1, device=x.device)
        timesteps = every[:, None].repeat(1, x.shape[0]).unbind(0)
        if not progress:
            return timesteps
        from tqdm.auto import tqdm

        return tqdm(timesteps)
