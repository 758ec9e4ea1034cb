"""Sampling from noise to x0: one loop for every sampler.

A loop starts at t = T − 1 with `torch.randn(shape)`, ends after t = 0 and has, besides those of a
single step (`fastdit.diffusion.steps`), the arguments

- `shape`: of the samples, `(B, C, ...)`.
- `noise`: the samples to start from; None draws them.
- `device`: where to sample; None takes the start noise's device, or the model's.
- `progress`: show a tqdm bar.
- `noise_fn`: called once a step with x, gives the step's noise; None is `torch.randn_like`.
- `graph`: replay a CUDA graph of the step. None does where it can be: for a `fastdit.DiT` in eval
  mode without forward hooks, or its `forward_with_cfg`, on a GPU, outside autocast and without
  `noise_fn`. True is an error elsewhere, which says why; False never does.

`*_loop` returns the last samples. `*_loop_progressive` yields each step's dict; what its consumer
puts under `sample` is what the next step starts from, as inpainting needs. Steps run without
gradients.

The loops are runs of `fastdit.Sampler`'s engine (`fastdit.sampler.published`), which computes the
conditioning of such a DiT before the first step. Its update has no place for functions: with
`denoised_fn` or `cond_fn`, or a method of a step that a subclass or somebody else has overridden,
the steps are `p_sample`, `ddim_sample` and `dpm_solver_sample` themselves. The numbers are the
same.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec

import torch
from torch import Tensor

from fastdit.diffusion.calls import DenoisedFn, Model, Sample
from fastdit.diffusion.steps import ReverseSteps
from fastdit.ops import _checks

if TYPE_CHECKING:
    from fastdit.sampler.published import Published

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


def behind_a_bar(steps: Iterable[Any], progress: bool) -> Iterable[Any]:
    """The steps as they are taken, a bar moving before them if asked."""
    if not progress:
        return steps
    from tqdm.auto import tqdm

    return tqdm(steps)


def _yielded(asked: Published, progress: bool) -> Generator[Sample]:
    """Each step's dict; it goes on from what its consumer has made of it."""
    with asked.begun() as run:
        for _step in behind_a_bar(run, progress):
            out = run.result()
            yield out
            run.resume(out)


class Steps(Iterator[Sample]):
    """A loop's steps, each taken when it is asked for; or the last samples at once."""

    def __init__(self, asked: Published, progress: bool) -> None:
        self._asked, self._progress = asked, progress
        self._each = _yielded(asked, progress)

    def __next__(self) -> Sample:
        return next(self._each)

    def close(self) -> None:
        """Take no further step."""
        self._each.close()

    def last(self) -> Tensor:
        """Take all steps; the samples after them."""
        with self._asked.begun() as run:
            for _step in behind_a_bar(run, self._progress):
                pass
            return run.result()["sample"]


Arguments = ParamSpec("Arguments")


def _last_of(progressive: Callable[Arguments, Steps]) -> Callable[Arguments, Tensor]:
    """The same run with the same arguments, returning its last samples only."""

    @functools.wraps(progressive)
    def loop(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Tensor:
        return progressive(*args, **kwargs).last()

    whole = progressive.__name__.removesuffix("_progressive")
    loop.__name__, loop.__qualname__ = whole, f"SamplingLoops.{whole}"
    loop.__doc__ = f"The last samples of `{progressive.__name__}`, same arguments."
    loop.__annotations__ = progressive.__annotations__ | {"return": "Tensor"}
    signature = inspect.signature(progressive).replace(return_annotation="Tensor")
    vars(loop)["__signature__"] = signature
    return loop


class SamplingLoops(ReverseSteps):
    """Whole sampling runs of the steps of `ReverseSteps`."""

    def _steps(self, progress: bool, *asked: Any) -> Steps:
        from fastdit.sampler.published import Published  # the engine needs the diffusions

        return Steps(Published(self, *asked), progress)

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
        graph: bool | None = None,
    ) -> Steps:
        """DDPM, yielding each step's `p_sample`; arguments at the top of this module."""
        start = _start(model, shape, noise, device)
        hooks = (clip_denoised, denoised_fn, cond_fn, model_kwargs, noise_fn)
        return self._steps(progress, "ddpm", model, start, *hooks, graph)

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
        graph: bool | None = None,
    ) -> Steps:
        """DDIM, yielding each step's `ddim_sample`; arguments at the top of this module."""
        start = _start(model, shape, noise, device)
        hooks = (clip_denoised, denoised_fn, cond_fn, model_kwargs, noise_fn)
        return self._steps(progress, "ddim", model, start, *hooks, graph, {"eta": eta})

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
        *,
        graph: bool | None = None,
    ) -> Steps:
        """DPM-Solver++(1) or (2M), yielding each step's `dpm_solver_sample`; arguments at the top
        of this module.

        The first and the last step are of order 1, and the last one gives x0, as with diffusers'
        `final_sigmas_type="zero"`. The steps are those of the respacing: 20 are often enough.
        """
        start = _start(model, shape, noise, device)
        hooks = (clip_denoised, denoised_fn, cond_fn, model_kwargs, None)
        return self._steps(progress, "dpm++", model, start, *hooks, graph, {"order": order})

    dpm_solver_sample_loop = _last_of(dpm_solver_sample_loop_progressive)

    def descending(self, x: Tensor) -> Sequence[Tensor]:
        """The batch's timesteps `(B,)` from the last to the first, all of them on the device: no
        step copies anything there."""
        every = torch.arange(self.num_timesteps - 1, -1, -1, device=x.device)
        return every[:, None].repeat(1, x.shape[0]).unbind(0)
