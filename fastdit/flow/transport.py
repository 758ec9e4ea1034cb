"""Training a flow model, and the functions of its output that samplers integrate.

Draw noise x0 and a time t, go to x_t on the path, and compare the model's output with what it
should predict there: the velocity, the noise or the score. The published code's choices are the
defaults; `fastdit.flow.create_transport` lists the options beside them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdit.diffusion.losses import mean_flat
from fastdit.flow.kinds import ModelType, PathType, WeightType
from fastdit.flow.paths import PATHS, per_sample
from fastdit.ops import _checks

Model = Callable[..., Tensor]

T_SAMPLINGS = ("uniform", "logit_normal")


def shifted(t: Tensor, shift: float) -> Tensor:
    """t·s/(1 + (s − 1)·t): below 1, more of the time near the noise (Esser et al. 2024)."""
    return t if shift == 1 else shift * t / (1 + (shift - 1) * t)


class Transport:
    """A path, what the model predicts on it, and how it is trained.

    `fastdit.create_transport` makes one by the published names and describes the arguments.

    Attributes:
        model_type, path_type, loss_type: as given, enums.
        path: the interpolant, a `fastdit.flow.paths.Path`.
        train_eps, sample_eps: how far training and sampling stay from the singular ends.
    """

    def __init__(
        self,
        *,
        model_type: ModelType,
        path_type: PathType,
        loss_type: WeightType,
        train_eps: float,
        sample_eps: float,
        t_sampling: str = "uniform",
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
        timestep_shift: float = 1.0,
        cosine_loss: bool = False,
        time_scale: float = 1.0,
    ) -> None:
        self.model_type = ModelType(model_type)
        self.path_type = PathType(path_type)
        self.loss_type = WeightType(loss_type)
        for name, eps in (("train_eps", train_eps), ("sample_eps", sample_eps)):
            if not 0 <= eps < 0.5:
                _checks.fail(name, repr(eps), "None or a number from 0 to below 0.5")
        if t_sampling not in T_SAMPLINGS:
            _checks.fail("t_sampling", repr(t_sampling), ", ".join(map(repr, T_SAMPLINGS)))
        positive = {"logit_std": logit_std, "timestep_shift": timestep_shift}
        for name, value in (positive | {"time_scale": time_scale}).items():
            if not 0 < value < math.inf:
                _checks.fail(name, repr(value), "a finite number > 0")
        self.path = PATHS[self.path_type]
        self.train_eps, self.sample_eps = train_eps, sample_eps
        self.t_sampling, self.logit_mean, self.logit_std = t_sampling, logit_mean, logit_std
        self.timestep_shift, self.cosine_loss = timestep_shift, cosine_loss
        self.time_scale = time_scale

    @property
    def config(self) -> dict[str, Any]:
        """The arguments of `fastdit.create_transport` that make this transport."""
        names = ("train_eps", "sample_eps", "t_sampling", "logit_mean", "logit_std")
        names += ("timestep_shift", "cosine_loss", "time_scale")
        kinds = {"path_type": self.path_type, "prediction": self.model_type}
        kinds["loss_weight"] = self.loss_type
        return {k: v.value for k, v in kinds.items()} | {k: getattr(self, k) for k in names}

    def __repr__(self) -> str:
        """The call of `create_transport` that makes it: the path, the prediction, and of the other
        arguments what is not the default."""
        config = self.config
        named = {name: config[name] for name in ("path_type", "prediction")}
        usual = create_transport(**named).config
        named |= {name: value for name, value in config.items() if value != usual[name]}
        return f"create_transport({', '.join(f'{k}={v!r}' for k, v in named.items())})"

    def check_interval(
        self,
        train_eps: float,
        sample_eps: float,
        *,
        diffusion_form: str = "SBDM",
        sde: bool = False,
        reverse: bool = False,
        eval: bool = False,
        last_step_size: float = 0.0,
    ) -> tuple[float, float]:
        """The times between which to train (`eval=False`) or sample, by the published rules.

        VP stays eps away from the data only; the linear and the GVP path, for noise and score
        models and for SDEs, from both ends. An SDE leaves its last step out. One thing differs: a
        noise model on the VP path in reverse starts at 1 − eps, where the published 1 gives NaN.
        """
        eps = sample_eps if eval else train_eps
        velocity = self.model_type is ModelType.VELOCITY
        end = 1 - last_step_size if sde and last_step_size else 1 - eps
        if self.path_type is PathType.VP:
            start = 0.0
        elif velocity and not sde:
            # No singular end; eps is 0 unless the caller asked for another.
            start = eps
        else:
            start = eps if (diffusion_form == "SBDM" and sde) or not velocity else 0.0
        if not reverse:
            return start, end
        if self.path_type is PathType.VP and self.model_type is ModelType.NOISE:
            return end, start
        return 1 - start, 1 - end

    def sample_t(self, count: int) -> Tensor:
        """`(count,)` float32 times on the CPU, from torch's generator there, as published."""
        t0, t1 = self.check_interval(self.train_eps, self.sample_eps)
        if self.t_sampling == "uniform":
            unit = torch.rand((count,))
        else:
            unit = torch.sigmoid(self.logit_mean + self.logit_std * torch.randn((count,)))
        return shifted(unit, self.timestep_shift) * (t1 - t0) + t0

    def sample(self, x1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Times `(B,)`, noise like `x1`, and `x1`: drawn in the published order, noise first."""
        x0 = torch.randn_like(x1)
        t = self.sample_t(x1.shape[0])
        return t.to(x1.device, torch.promote_types(x1.dtype, torch.float32)), x0, x1

    def training_losses(
        self,
        model: Model,
        x1: Tensor,
        model_kwargs: dict[str, Any] | None = None,
        *,
        noise: Tensor | None = None,
        t: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The loss of each sample; average `loss` over the batch to train.

        Velocity: mean (e − v)². Noise: mean weight·(e − x0)². Score: mean weight·(σ·e + x0)². The
        weight is 1, (g/σ)² (`velocity`: the loss of the velocity that e stands for) or g/σ²
        (`likelihood`). With `cosine_loss`, 1 − cos(e, target) along the channels is added.

        Args:
            model: called as `model(x_t, t·time_scale, **model_kwargs)`, returns `(B, C, ...)`; of
                `(B, 2C, ...)` the second half is not used, as published.
            x1: `(B, C, ...)`, data.
            model_kwargs: what else the model is called with.
            noise: like `x1`; None draws.
            t: `(B,)` times; None draws.

        Returns:
            `loss` `(B,)`, float32 or better, and `pred`, the model's output.
        """
        if noise is None and t is None:
            t, noise, _ = self.sample(x1)
        if noise is None:
            noise = torch.randn_like(x1)
        if t is None:
            t = self.sample_t(x1.shape[0]).to(x1.device)
        _checks.like("noise", noise, x1)
        if t.shape != x1.shape[:1] or not t.is_floating_point() or t.device != x1.device:
            allowed = f"floating point ({x1.shape[0]},) on {x1.device}"
            _checks.fail("t", _checks.described(t), allowed)
        exact = torch.promote_types(x1.dtype, torch.float32)
        t, x0, x1_exact = t.to(exact), noise.to(exact), x1.to(exact)
        xt, ut = self.path.at(t, x0, x1_exact)
        output = self.model_output(model, xt.to(x1.dtype), t, model_kwargs)
        error, weight = self._error(output.to(exact), t, x0, ut)
        loss = mean_flat(weight * error.square())
        if self.cosine_loss:
            target = ut if self.model_type is ModelType.VELOCITY else x0
            predicted = target + error
            loss = loss + mean_flat(1 - F.cosine_similarity(predicted, target, dim=1))
        return {"loss": loss, "pred": output}

    def _error(self, output: Tensor, t: Tensor, x0: Tensor, ut: Tensor) -> tuple[Tensor, Any]:
        """What is squared, and its weight. A score's error is that of the noise, with its sign."""
        if self.model_type is ModelType.VELOCITY:
            return output - ut, 1.0
        t = per_sample(t, output)
        sigma, _ = self.path.sigma(t)
        weight: Any = 1.0
        if self.loss_type is WeightType.VELOCITY:
            weight = (self.path.score_weight(t) / sigma) ** 2
        elif self.loss_type is WeightType.LIKELIHOOD:
            weight = self.path.score_weight(t) / sigma**2
        if self.model_type is ModelType.NOISE:
            return output - x0, weight
        return -(output * sigma + x0), weight

    def model_output(
        self, model: Model, x: Tensor, t: Tensor, model_kwargs: dict[str, Any] | None = None
    ) -> Tensor:
        """The first C channels of `model(x, t·time_scale, **model_kwargs)`, checked."""
        scaled = t if self.time_scale == 1 else t * self.time_scale
        return self.checked(model(x, scaled, **(model_kwargs or {})), x)

    @staticmethod
    def checked(output: Any, x: Tensor) -> Tensor:
        """The first C channels of what a model returned for `x`."""
        channels = x.shape[1]
        shapes = [(x.shape[0], n * channels, *x.shape[2:]) for n in (1, 2)]
        if not isinstance(output, Tensor) or output.shape not in shapes:
            allowed = f"{shapes[0]}, or {shapes[1]} whose second half is not used"
            _checks.fail("the model's output", _checks.described(output), allowed)
        return output[:, :channels]

    def prior_logp(self, z: Tensor) -> Tensor:
        """log N(z; 0, 1), `(B,)` in nats."""
        each = z.flatten(1).to(torch.promote_types(z.dtype, torch.float32))
        return -0.5 * (each.square().sum(1) + each.shape[1] * math.log(2 * math.pi))

    def get_drift(self) -> Model:
        """`drift(x, t, model, **model_kwargs)`, the velocity of the probability flow ODE."""
        return self._function("velocity")

    def get_score(self) -> Model:
        """`score(x, t, model, **model_kwargs)`, the score of x_t's distribution."""
        return self._function("score")

    def _function(self, wanted: str) -> Model:
        def of(x: Tensor, t: Tensor, model: Model, **model_kwargs: Any) -> Tensor:
            output = self.model_output(model, x, t, model_kwargs)
            return self.convert(wanted, x, t, output)

        return of

    def convert(self, wanted: str, x: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """`"velocity"`, `"score"` or `"data"` (the predicted x1) from the model's output.

        Args:
            wanted: which.
            x: `(B, C, ...)` at the times `t` `(B,)`.
            t: in [0, 1], not scaled.
            output: like `x`.
        """
        if wanted == self.model_type.value:
            return output
        a, b = self.path.coefficients(wanted, self.model_type, t.double())
        exact = torch.promote_types(x.dtype, torch.float32)
        a, b = (per_sample(c.to(exact), x) for c in (a, b))
        return (a * x + b * output).to(x.dtype)


def create_transport(
    path_type: str = "Linear",
    prediction: str = "velocity",
    loss_weight: str | None = None,
    train_eps: float | None = None,
    sample_eps: float | None = None,
    *,
    t_sampling: str = "uniform",
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    timestep_shift: float = 1.0,
    cosine_loss: bool = False,
    time_scale: float = 1.0,
) -> Transport:
    """The transport of the published SiT by default: linear path, velocity, plain loss.

    Args:
        path_type: `"Linear"`, `"GVP"` or `"VP"`; see `fastdit.flow.paths`.
        prediction: what the model predicts: `"velocity"`, `"noise"` or `"score"`.
        loss_weight: of a noise or score model's loss: None, `"velocity"` or `"likelihood"`.
        train_eps: how far training stays from a singular end of the path; None is 1e-5 for VP,
            1e-3 for noise and score models on the other paths, and 0 for their velocity models.
        sample_eps: the same for sampling; None is 1e-3, 1e-3 and 0.
        t_sampling: of the times to train at: `"uniform"` or `"logit_normal"`, the sigmoid of
            N(logit_mean, logit_std²) (Esser et al. 2024).
        logit_mean, logit_std: of `"logit_normal"`.
        timestep_shift: s of t·s/(1 + (s − 1)·t), for training and for the samplers' grids; below 1
            is more time near the noise.
        cosine_loss: add 1 − cos(prediction, target) along the channels (Yao et al. 2025).
        time_scale: what t in [0, 1] is multiplied by for the model. 1 is published; 1000 gives
            DiT's timestep embedding the range that it was made for.

    Raises:
        ValueError: a name or a number that is not allowed, which is named.
    """
    names = (
        ("path_type", path_type, PathType),
        ("prediction", prediction, ModelType),
        ("loss_weight", loss_weight, WeightType),
    )
    for name, value, kind in names:
        if value not in [member.value for member in kind]:
            _checks.fail(name, repr(value), ", ".join(repr(member.value) for member in kind))
    path, model = PathType(path_type), ModelType(prediction)
    if path is PathType.VP:
        train, sampling = 1e-5, 1e-3
    elif model is ModelType.VELOCITY:
        train, sampling = 0.0, 0.0
    else:
        train, sampling = 1e-3, 1e-3
    return Transport(
        model_type=model,
        path_type=path,
        loss_type=WeightType(loss_weight),
        train_eps=train if train_eps is None else train_eps,
        sample_eps=sampling if sample_eps is None else sample_eps,
        t_sampling=t_sampling,
        logit_mean=logit_mean,
        logit_std=logit_std,
        timestep_shift=timestep_shift,
        cosine_loss=cosine_loss,
        time_scale=time_scale,
    )
