"""One step of each sampler: the model's output through `fastdit.ops.diffusion_step`.

DDPM, DDIM, its reverse and DPM-Solver++ differ only in their tables (`fastdit.diffusion.tables`).
A step is the model, the draw of noise and one op, on any device without a host sync.

All steps take the same arguments:

- `model`: called as `model(x, t, **model_kwargs)` with the original timesteps `(B,)`, returns
  `(B, C, ...)` or, where it learns the variance, `(B, 2C, ...)`; or a tuple of that and anything.
- `x`: `(B, C, ...)`, the samples at the index `t`, int64 `(B,)`, one for each sample.
- `clip_denoised`: clamp the predicted x0 to [−1, 1].
- `denoised_fn`: a function of the predicted x0 that changes it, before it is clamped.
- `cond_fn`: called as `cond_fn(x, t, **model_kwargs)` like the model, gives the gradient of
  log p(condition | x) (Dhariwal & Nichol 2021).
- `noise`: like `x`, or a function of `x` that draws it (or None to add none); None draws
  `torch.randn_like(x)`, at the moment and in the order of the published code.

They return a dict of `sample`, the samples one step on, and `pred_xstart`, the predicted x0, both
like `x`. A wrong argument is a `ValueError` or `TypeError` that names it.

As published, a subclass's `p_mean_variance` is what its `p_sample` and the other steps go by.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdit import ops
from fastdit.diffusion import tables
from fastdit.diffusion.calls import (
    Call,
    DenoisedFn,
    Model,
    Noise,
    Sample,
    checked_output,
    draw,
    no_noise,
)
from fastdit.diffusion.kinds import ModelMeanType, ModelVarType
from fastdit.diffusion.process import ForwardProcess, Row
from fastdit.ops import _checks


class ReverseSteps(ForwardProcess):
    """The reverse process p(x_{t−1} | x_t) of a model.

    Args:
        betas, use_timesteps: the schedule, see `ForwardProcess`.
        model_mean_type: whether the model predicts ε or x0.
        model_var_type: whether it learns the variance, or which one is fixed.
    """

    def __init__(
        self,
        betas: Any,
        use_timesteps: Any = None,
        *,
        model_mean_type: ModelMeanType = ModelMeanType.EPSILON,
        model_var_type: ModelVarType = ModelVarType.LEARNED_RANGE,
    ) -> None:
        super().__init__(betas, use_timesteps)
        self.model_mean_type = ModelMeanType(model_mean_type)
        self.model_var_type = ModelVarType(model_var_type)
        self.learns_variance = self.model_var_type is ModelVarType.LEARNED_RANGE

    def p_mean_variance(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        model_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The distribution p(x_{t−1} | x_t).

        Returns:
            A dict of `mean`, `pred_xstart` (like `x`), `variance`, `log_variance` (shaped like `x`,
            float32 or better) and `extra`: what the model returned beside its output, or None.
        """
        output, extra = self._model_output(model, x, t, model_kwargs)
        output, prediction = self._denoised(output, x, t, denoised_fn)
        moments = self._moments(output, prediction, x, t, clip_denoised, self._rows(x, t))
        return moments | {"extra": extra}

    def p_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        cond_fn: Model | None = None,
        model_kwargs: dict[str, Any] | None = None,
        *,
        noise: Noise = None,
    ) -> Sample:
        """One step of ancestral sampling (DDPM); arguments and result at the top of this module.

        `cond_fn` shifts the mean by variance·gradient.
        """
        if overridden(self, "p_mean_variance"):
            call = Call(model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs)
            return self._drawn(call, noise)
        output, _ = self._model_output(model, x, t, model_kwargs)
        output, prediction = self._denoised(output, x, t, denoised_fn)
        sample, x0 = ops.diffusion_step(
            x,
            output,
            self._ddpm_table(prediction, x),
            t,
            noise=draw(noise, x),
            clip=1.0 if clip_denoised else None,
            learned_range=self.learns_variance,
        )
        if cond_fn is not None:
            gradient = self._condition_gradient(cond_fn, x, t, model_kwargs)
            variance, _ = self._variance(output, x, self._rows(x, t))
            sample = (sample + variance * gradient).to(x.dtype)
        return {"sample": sample, "pred_xstart": x0}

    def ddim_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        cond_fn: Model | None = None,
        model_kwargs: dict[str, Any] | None = None,
        eta: float = 0.0,
        *,
        noise: Noise = None,
    ) -> Sample:
        """One step of DDIM; arguments and result at the top of this module.

        Args:
            eta: 0 is deterministic, 1 has DDPM's variance. Noise is drawn, as published, even at 0.
        """
        table = self._table(tables.ddim, x, float(eta))
        call = Call(model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs)
        return self._solve(table, call, noise=noise, noisy=eta != 0)

    def ddim_reverse_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        cond_fn: Model | None = None,
        model_kwargs: dict[str, Any] | None = None,
        eta: float = 0.0,
    ) -> Sample:
        """One step of DDIM's ODE towards noise, from t to t + 1; no noise is drawn.

        Raises:
            ValueError: eta is not 0.
        """
        if eta != 0:
            _checks.fail("eta", repr(eta), "0: only the deterministic path can be reversed")
        call = Call(model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs)
        return self._solve(self._table(tables.ddim_reverse, x), call, noise=no_noise)

    def dpm_solver_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        cond_fn: Model | None = None,
        model_kwargs: dict[str, Any] | None = None,
        order: int = 2,
        *,
        x0_previous: Tensor | None = None,
    ) -> Sample:
        """One step of DPM-Solver++(1) or (2M) (Lu et al. 2022b); no noise is drawn.

        Args:
            order: 1 or 2.
            x0_previous: like `x`, the `pred_xstart` of the step before, which is used with
                order 2. Without it the step is of order 1.
        """
        if order not in (1, 2):
            _checks.fail("order", repr(order), "1 or 2")
        if x0_previous is None or order == 1:
            order, x0_previous = 1, None
        table = self._table(tables.dpm_solver, x, order)
        call = Call(model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs)
        return self._solve(table, call, noise=no_noise, x0_previous=x0_previous)

    # ---- what the steps share ---------------------------------------------------------------

    def _drawn(self, call: Call, noise: Noise) -> Sample:
        """A DDPM step from a `p_mean_variance` that is not fastdit's, as published."""
        x, t = call.x, call.t
        moments = self._moments_of(call)
        mean, drawn = moments["mean"], draw(noise, x)
        if call.cond_fn is not None:
            gradient = self._condition_gradient(call.cond_fn, x, t, call.model_kwargs)
            mean = mean + moments["variance"] * gradient
        if drawn is not None:
            noisy = (t != 0).reshape(-1, *[1] * (x.dim() - 1))
            mean = mean + noisy * (0.5 * moments["log_variance"]).exp() * drawn
        return {"sample": mean.to(x.dtype), "pred_xstart": moments["pred_xstart"]}

    def _moments_of(self, call: Call) -> dict[str, Any]:
        """`p_mean_variance`, whosoever it is."""
        return self.p_mean_variance(
            call.model,
            call.x,
            call.t,
            clip_denoised=call.clip_denoised,
            denoised_fn=call.denoised_fn,
            model_kwargs=call.model_kwargs,
        )

    def _solve(
        self,
        table: Callable[[ModelMeanType], Tensor],
        call: Call,
        *,
        noise: Noise,
        noisy: bool = True,
        x0_previous: Tensor | None = None,
    ) -> Sample:
        """One step of a solver that sees the model only through x0, and adds noise of a fixed σ.

        `cond_fn` turns the score: ε −= √(1 − ᾱ)·gradient (Dhariwal & Nichol 2021, algorithm 2),
        which is x0 += (1 − ᾱ)/√ᾱ·gradient. As published, x0 is not clamped after that.
        """
        model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs = call
        clip = 1.0 if clip_denoised else None
        if overridden(self, "p_mean_variance"):
            output, prediction = self._moments_of(call)["pred_xstart"], ModelMeanType.START_X
            clip = None
        else:
            output, _ = self._model_output(model, x, t, model_kwargs)
            output, prediction = self._denoised(output, x, t, denoised_fn)
        if cond_fn is not None:
            _, x0 = ops.diffusion_step(x, output, table(prediction), t, clip=clip)
            row, gradient = self._rows(x, t), self._condition_gradient(cond_fn, x, t, model_kwargs)
            weight = row["sqrt_recipm1_alphas_cumprod"] * row["sqrt_one_minus_alphas_cumprod"]
            output, prediction = (x0 + weight * gradient).to(x.dtype), ModelMeanType.START_X
            clip = None
        drawn = draw(noise, x)
        sample, x0 = ops.diffusion_step(
            x,
            output,
            table(prediction),
            t,
            noise=drawn if noisy else None,
            x0_previous=x0_previous,
            clip=clip,
        )
        return {"sample": sample, "pred_xstart": x0}

    def _model_output(
        self, model: Model, x: Tensor, t: Tensor, model_kwargs: dict[str, Any] | None
    ) -> tuple[Tensor, Any]:
        """The model's output, its shape checked, and whatever else it returned."""
        self._check_timesteps(x, t)
        output = model(x, self._original_timesteps(t), **(model_kwargs or {}))
        return checked_output(output, x, self.learns_variance)

    def _denoised(
        self, output: Tensor, x: Tensor, t: Tensor, denoised_fn: DenoisedFn | None
    ) -> tuple[Tensor, ModelMeanType]:
        """`output` and what it predicts: after `denoised_fn` it is x0."""
        if denoised_fn is None:
            return output, self.model_mean_type
        table = self._ddpm_table(self.model_mean_type, x)
        _, x0 = ops.diffusion_step(x, output, table, t)
        x0 = denoised_fn(x0)
        _checks.like("denoised_fn's result", x0, x)
        variance = output[:, x.shape[1] :]
        return torch.cat([x0.to(output.dtype), variance], 1), ModelMeanType.START_X

    def _moments(
        self,
        output: Tensor,
        prediction: ModelMeanType,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool,
        row: Row,
    ) -> dict[str, Tensor]:
        clip = 1.0 if clip_denoised else None
        mean, x0 = ops.diffusion_step(x, output, self._ddpm_table(prediction, x), t, clip=clip)
        variance, log_variance = self._variance(output, x, row)
        return {"mean": mean, "variance": variance, "log_variance": log_variance, "pred_xstart": x0}

    def _variance(self, output: Tensor, x: Tensor, row: Row) -> tuple[Tensor, Tensor]:
        """The variance and its log, shaped like `x`. FIXED_SMALL's log is clipped at t = 0."""
        if self.learns_variance:
            f = (output[:, x.shape[1] :] + 1) / 2
            log = f * row["log_betas"] + (1 - f) * row["posterior_log_variance_clipped"]
            return log.exp(), log
        if self.model_var_type is ModelVarType.FIXED_LARGE:
            variance, log = row["large_variance"], row["log_large_variance"]
        else:
            variance, log = row["posterior_variance"], row["posterior_log_variance_clipped"]
        return variance.expand(x.shape), log.expand(x.shape)

    def _condition_gradient(
        self, cond_fn: Model, x: Tensor, t: Tensor, model_kwargs: dict[str, Any] | None
    ) -> Tensor:
        gradient = cond_fn(x, self._original_timesteps(t), **(model_kwargs or {}))
        _checks.like("cond_fn's result", gradient, x)
        return gradient

    def _table(self, make: Callable, x: Tensor, *options: Any) -> Callable[[ModelMeanType], Tensor]:
        """The table of a solver on `x`'s device, for either prediction."""

        def of(prediction: ModelMeanType) -> Tensor:
            key = (make.__name__, prediction, *options)
            return self._on_device(key, x.device, lambda: make(self, prediction, *options))

        return of

    def _ddpm_table(self, prediction: ModelMeanType, x: Tensor) -> Tensor:
        return self._table(tables.ddpm, x, self.model_var_type)(prediction)


METHODS = {
    "_original_timesteps": ForwardProcess._original_timesteps,
    **{k: v for k, v in vars(ReverseSteps).items() if callable(v) and k != "__init__"},
}
"""What a step is made of."""


def overridden(steps: ReverseSteps, name: str) -> bool:
    """Whether a method is not fastdit's, but a subclass's, or set on the object."""
    return getattr(getattr(steps, name), "__func__", None) is not METHODS[name]
