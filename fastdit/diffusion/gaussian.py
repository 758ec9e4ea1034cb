"""The diffusion object: the forward process, the samplers and the training losses in one.

The variational bound has a term for each t: L_t = KL(q(x_{t−1} | x_t, x_0) ‖ p(x_{t−1} | x_t)),
for t = 0 the decoder's negative log-likelihood, and the prior KL(q(x_T | x_0) ‖ N(0, 1)), here all
in bits per dimension (Ho et al. 2020, equation 5; Nichol & Dhariwal 2021).

Losses are computed in float32 or better, whatever the dtype of the samples and the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdit.diffusion.calls import Model
from fastdit.diffusion.kinds import LossType, ModelMeanType, ModelVarType
from fastdit.diffusion.loops import SamplingLoops, behind_a_bar
from fastdit.diffusion.losses import discretized_gaussian_log_likelihood, mean_flat, normal_kl
from fastdit.diffusion.process import Row

_LN2 = math.log(2.0)


def _exact(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class GaussianDiffusion(SamplingLoops):
    """Training and sampling of a diffusion model with Gaussian noise.

    `fastdit.create_diffusion` makes one by the published names.

    Args:
        betas: `(T0,)`, the original schedule, each in (0, 1).
        use_timesteps: which of its steps are kept; None keeps all.
        model_mean_type: whether the model predicts ε or x0.
        model_var_type: whether it learns the variance, or which one is fixed.
        loss_type: what `training_losses` returns as `loss`.

    Raises:
        ValueError: betas outside (0, 1), or timesteps that are not there.

    The steps' arguments are described in `fastdit.diffusion.steps`, the loops' in
    `fastdit.diffusion.loops`, the tables that are attributes in
    `fastdit.diffusion.schedules.NoiseLevels`.
    """

    def __init__(
        self,
        betas: Any,
        use_timesteps: Any = None,
        *,
        model_mean_type: ModelMeanType = ModelMeanType.EPSILON,
        model_var_type: ModelVarType = ModelVarType.LEARNED_RANGE,
        loss_type: LossType = LossType.MSE,
    ) -> None:
        super().__init__(
            betas, use_timesteps, model_mean_type=model_mean_type, model_var_type=model_var_type
        )
        self.loss_type = LossType(loss_type)

    def training_losses(
        self,
        model: Model,
        x_start: Tensor,
        t: Tensor,
        model_kwargs: dict[str, Any] | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The losses of a batch, one number a sample; average `loss` over the batch to train.

        MSE: `mse` is the mean squared error of the prediction. Where the variance is learned, `vb`
        is the bound's term at t, which trains only the variance: ε enters it without gradient.
        `loss` is their sum, `vb` unscaled, as published; RESCALED_MSE scales it by T/1000. KL: the
        bound's term alone is the loss; RESCALED_KL scales it by T, an estimate of the whole bound.

        Args:
            model: see `fastdit.diffusion.steps`.
            x_start: `(B, C, ...)`, clean samples.
            t: int64 `(B,)`, an index for each sample.
            model_kwargs: what else the model is called with.
            noise: like `x_start`; None draws `torch.randn_like(x_start)`.

        Returns:
            A dict of `(B,)` tensors, float32 or better: `loss`; with the MSE losses `mse` and,
            where the variance is learned, `vb`.
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        self._check_timesteps(x_start, t)
        row = self._rows(x_start, t)
        x_t = self._noised(row, x_start, noise)
        output, _ = self._model_output(model, x_t, t, model_kwargs)
        x_start, x_t, output = _exact(x_start), _exact(x_t), _exact(output)
        if self.loss_type.is_vb():
            bound, _ = self._bound_term(output, x_start, x_t, t, row, clip_denoised=False)
            whole = self.loss_type is LossType.RESCALED_KL
            return {"loss": bound * self.num_timesteps if whole else bound}

        channels = x_start.shape[1]
        target = _exact(noise) if self.model_mean_type is ModelMeanType.EPSILON else x_start
        mse = mean_flat((target - output[:, :channels]).square())
        if not self.learns_variance:
            return {"mse": mse, "loss": mse}
        frozen = torch.cat([output[:, :channels].detach(), output[:, channels:]], 1)
        vb, _ = self._bound_term(frozen, x_start, x_t, t, row, clip_denoised=False)
        if self.loss_type is LossType.RESCALED_MSE:
            vb = vb * (self.num_timesteps / 1000.0)
        return {"vb": vb, "mse": mse, "loss": mse + vb}

    def calc_bpd_loop(
        self,
        model: Model,
        x_start: Tensor,
        clip_denoised: bool = True,
        model_kwargs: dict[str, Any] | None = None,
        *,
        noise_fn: Callable[[Tensor], Tensor] | None = None,
        progress: bool = False,
    ) -> dict[str, Tensor]:
        """The whole variational bound of samples, in bits per dimension.

        Args:
            model: see `fastdit.diffusion.steps`.
            x_start: `(B, C, ...)`; for the decoder's term to be a likelihood, 8-bit images in
                [−1, 1].
            clip_denoised: clamp the predicted x0 to [−1, 1].
            model_kwargs: what else the model is called with.
            noise_fn: called once a step with `x_start`; None is `torch.randn_like`.
            progress: show a tqdm bar.

        Returns:
            A dict of float32 (or better) tensors: `total_bpd` `(B,)`, `prior_bpd` `(B,)`, and
            `vb`, `xstart_mse`, `mse` `(B, T)`, the bound's term and the squared errors of x0 and ε
            at each step, t = T − 1 first.
        """
        draw = torch.randn_like if noise_fn is None else noise_fn
        terms: dict[str, list[Tensor]] = {"vb": [], "xstart_mse": [], "mse": []}
        for t in behind_a_bar(self.descending(x_start), progress):
            noise = draw(x_start)
            with torch.no_grad():
                row = self._rows(x_start, t)
                x_t = self._noised(row, x_start, noise)
                output, _ = self._model_output(model, x_t, t, model_kwargs)
                output, x_t = _exact(output), _exact(x_t)
                vb, x0 = self._bound_term(output, _exact(x_start), x_t, t, row, clip_denoised)
                epsilon = row["sqrt_recip_alphas_cumprod"] * x_t - x0
                epsilon = epsilon / row["sqrt_recipm1_alphas_cumprod"]
            terms["vb"].append(vb)
            terms["xstart_mse"].append(mean_flat((x0 - x_start).square()))
            terms["mse"].append(mean_flat((epsilon - noise).square()))
        stacked = {name: torch.stack(values, 1) for name, values in terms.items()}
        prior = self._prior_bpd(x_start)
        return {"total_bpd": stacked["vb"].sum(1) + prior, "prior_bpd": prior} | stacked

    def _bound_term(
        self,
        output: Tensor,
        x_start: Tensor,
        x_t: Tensor,
        t: Tensor,
        row: Row,
        clip_denoised: bool,
    ) -> tuple[Tensor, Tensor]:
        """The bound's term at `t`, `(B,)` in bits per dimension, and the predicted x0."""
        mean = self._posterior_mean(row, x_start, x_t)
        log_variance = row["posterior_log_variance_clipped"]
        model = self._moments(output, self.model_mean_type, x_t, t, clip_denoised, row)
        kl = normal_kl(mean, log_variance, model["mean"], model["log_variance"])
        decoder = -discretized_gaussian_log_likelihood(
            x_start, model["mean"], 0.5 * model["log_variance"]
        )
        term = torch.where(t == 0, mean_flat(decoder), mean_flat(kl)) / _LN2
        return term, model["pred_xstart"]

    def _prior_bpd(self, x_start: Tensor) -> Tensor:
        """KL(q(x_T | x_0) ‖ N(0, 1)), `(B,)` in bits per dimension: a constant of the schedule."""
        last = torch.full(
            x_start.shape[:1], self.num_timesteps - 1, dtype=torch.int64, device=x_start.device
        )
        mean, _, log_variance = self.q_mean_variance(_exact(x_start), last)
        zero = torch.zeros_like(mean)
        return mean_flat(normal_kl(mean, log_variance, zero, zero)) / _LN2
