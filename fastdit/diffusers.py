"""fastdit's samplers as a scheduler of diffusers: `pip install 'fastdit[vae]'`.

    pipe = DiTPipeline.from_pretrained("facebook/DiT-XL-2-256")
    pipe.scheduler = fastdit.diffusers.Scheduler.from_config(pipe.scheduler.config)

DDIM, DDPM and DPM-Solver++ are rows of one table (`fastdit.diffusion.tables`), computed in float64,
and a step is one call of `fastdit.ops.diffusion_step` where diffusers launches ten to thirty
kernels. The row is looked up on the device from the timestep, so that no step waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fastdit import ops
from fastdit.diffusers_schedule import ALLOWED, betas, spaced
from fastdit.diffusion import tables
from fastdit.diffusion.kinds import ModelMeanType, ModelVarType
from fastdit.diffusion.schedules import NoiseLevels, respaced_betas
from fastdit.ops._checks import fail
from fastdit.reference import TABLE_COLUMNS

try:
    from diffusers import ConfigMixin, SchedulerMixin
    from diffusers.configuration_utils import register_to_config
    from diffusers.utils import BaseOutput
    from diffusers.utils.torch_utils import randn_tensor
except ImportError as error:
    raise ImportError("fastdit.diffusers needs diffusers: pip install 'fastdit[vae]'") from error

VARIANCES = {
    "fixed_small": ModelVarType.FIXED_SMALL,
    "fixed_large": ModelVarType.FIXED_LARGE,
    "learned_range": ModelVarType.LEARNED_RANGE,
}


@dataclass
class SchedulerOutput(BaseOutput):
    """`prev_sample`, the next step's input, and `pred_original_sample`, the predicted x0."""

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


class Scheduler(SchedulerMixin, ConfigMixin):
    """DDIM, DDPM or DPM-Solver++ for any pipeline of diffusers that predicts ε, x0 or v.

    Reads the configs of DDIMScheduler, DDPMScheduler and DPMSolverMultistepScheduler and gives
    their samples; `solver` chooses, whatever the config was of.

    Args:
        num_train_timesteps: T, the length of the training schedule.
        beta_start, beta_end: ends of the linear and scaled_linear schedules.
        beta_schedule: "linear", "scaled_linear" or "squaredcos_cap_v2".
        trained_betas: `(T,)` betas instead of a schedule.
        solver: "ddim", "ddpm" or "dpm++".
        solver_order: of DPM-Solver++: 1, or 2 for 2M.
        prediction_type: what the model predicts: "epsilon", "sample" or "v_prediction".
        variance_type: of DDPM: "fixed_small", "fixed_large", or "learned_range" where the model's
            output has twice the sample's channels.
        clip_sample: clamp the predicted x0 to ±`clip_sample_range`.
        timestep_spacing: "leading", "trailing" or "linspace" as in diffusers, "published" as the
            published code respaces: first and last timestep included.
        steps_offset: added to leading timesteps.
        set_alpha_to_one: DDIM's last step goes to ᾱ = 1; False: to the first timestep's.
        final_sigmas_type, thresholding, rescale_betas_zero_snr, use_karras_sigmas: read, so that a
            config that asks for something else is refused.

    Raises:
        ValueError: an option that has another value than those named here.
    """

    order = 1
    _compatibles: ClassVar[list[str]] = [
        "DDIMScheduler",
        "DDPMScheduler",
        "DPMSolverMultistepScheduler",
    ]

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        solver: str = "ddim",
        solver_order: int = 2,
        prediction_type: str = "epsilon",
        variance_type: str = "fixed_small",
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        set_alpha_to_one: bool = True,
        final_sigmas_type: str = "zero",
        thresholding: bool = False,
        rescale_betas_zero_snr: bool = False,
        use_karras_sigmas: bool = False,
    ) -> None:
        for name, allowed in ALLOWED.items():
            if self.config[name] not in allowed:
                fail(name, repr(self.config[name]), ", ".join(map(repr, allowed)))
        self._betas = betas(self.config)
        self.betas = torch.from_numpy(self._betas).float()
        self.alphas = 1.0 - self.betas
        self._alphas_cumprod = np.cumprod(1.0 - self._betas)
        self.alphas_cumprod = torch.from_numpy(self._alphas_cumprod).float()
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self._schedule(np.arange(num_train_timesteps)[::-1].copy(), None)

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Another scheduler's config with what it left at its own defaults, on which its samples
        depend; diffusers takes the new class's for these."""
        given = {
            name: value
            for name, value in config_dict.items()
            if name != "_use_default_values" and value is not None
        }
        return super().extract_init_dict(given, **kwargs)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Choose the timesteps of a run, and forget the last one's.

        Args:
            num_inference_steps: how many, spaced by `timestep_spacing`.
            device: where `timesteps` are to be.
            timesteps: these instead, falling.

        Raises:
            ValueError: neither or both are given; too many; timesteps that do not fall, or are
                outside the schedule.
        """
        if (num_inference_steps is None) == (timesteps is None):
            fail("num_inference_steps", num_inference_steps, "one of it and timesteps")
        total = self.config.num_train_timesteps
        if timesteps is None:
            if not 1 <= num_inference_steps <= total:
                fail("num_inference_steps", num_inference_steps, f"1 to {total}")
            chosen = spaced(self.config, num_inference_steps)
        else:
            chosen = np.array(timesteps, dtype=np.int64)
        if not (np.diff(chosen) < 0).all() or not 0 <= chosen[-1] <= chosen[0] < total:
            fail("timesteps", chosen.tolist(), f"falling ints from {total - 1} to 0")
        self.num_inference_steps = len(chosen)
        self._schedule(chosen, device)

    def _schedule(self, timesteps: np.ndarray, device: str | torch.device | None) -> None:
        """Noise levels at these timesteps; the row of each of the T in the tables, -1 for none."""
        self.timesteps = torch.from_numpy(timesteps).to(device=device)
        rising = timesteps[::-1]
        self._levels = NoiseLevels(respaced_betas(self._betas, rising.tolist()))
        if not self.config.set_alpha_to_one:
            self._levels.alphas_cumprod_prev[0] = self._alphas_cumprod[0]
        rows = np.full(self.config.num_train_timesteps, -1)
        rows[rising] = np.arange(len(rising))
        self._rows = torch.from_numpy(rows)
        self._on_device: dict[Any, Tensor] = {}
        self._previous: tuple[int, Tensor] | None = None

    def _table(self, eta: float, order: int) -> np.ndarray:
        config, levels = self.config, self._levels
        sample = config.prediction_type == "sample"
        mean = ModelMeanType.START_X if sample else ModelMeanType.EPSILON
        if config.solver == "ddim":
            table = tables.ddim(levels, mean, eta)
        elif config.solver == "ddpm":
            table = tables.ddpm(levels, mean, VARIANCES[config.variance_type])
        else:
            table = tables.dpm_solver(levels, mean, order)
        if config.prediction_type == "v_prediction":  # x0 = √ᾱ·x − √(1 − ᾱ)·v
            table[:, TABLE_COLUMNS.index("a")] = np.sqrt(levels.alphas_cumprod)
            table[:, TABLE_COLUMNS.index("b")] = -levels.sqrt_one_minus_alphas_cumprod
        return table

    def _at(self, device: torch.device, name: str, eta: float = 0.0, order: int = 1) -> Tensor:
        """A table, √ᾱ of the rows' next timesteps, or the map from timesteps to rows, on a device
        and kept there."""
        key = (device, name, eta, order)
        if key not in self._on_device:
            found = self._rows
            if name == "table":
                found = torch.from_numpy(self._table(eta, order)).float()
            elif name == "signal":
                found = torch.from_numpy(np.sqrt(self._levels.alphas_cumprod_prev)).float()
            self._on_device[key] = found.to(device)
        return self._on_device[key]

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """The sample as it is: these solvers scale nothing."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """One update x_t → x of the next timestep.

        Args:
            model_output: `(B, C, ...)`, or `(B, 2C, ...)`: the second half chooses the variance
                with `variance_type="learned_range"` and is ignored otherwise.
            timestep: one of `timesteps`, an int or a tensor `()`, on any device.
            sample: `(B, C, ...)`, x_t.
            eta: DDIM's share of noise, 0 to 1.
            use_clipped_model_output: with `clip_sample`, have DDIM derive ε from the clipped x0,
                as published, in one op; False leaves ε what the model said, as diffusers does.
            generator: of the noise, one or one for each sample.
            variance_noise: the noise, instead.
            return_dict: a `SchedulerOutput`, or a tuple.

        Raises:
            ValueError: the timestep is none of `timesteps` (told where that needs no copy from a
                device), or a tensor has another shape.
        """
        known = self._known_row(timestep)
        order = self._order(known)
        table = self._at(sample.device, "table", float(eta), order)
        if known is None:
            row = self._at(sample.device, "rows").index_select(0, timestep.reshape(1).long())
            row = row.reshape(())
        else:
            row = torch.full((), known, dtype=torch.int64, device=sample.device)
        learned = self.config.solver == "ddpm" and self.config.variance_type == "learned_range"
        clip = self.config.clip_sample_range if self.config.clip_sample else None
        later = clip is not None and self.config.solver == "ddim" and not use_clipped_model_output
        x, x0 = ops.diffusion_step(
            sample,
            model_output,
            table,
            row,
            noise=self._noise(sample, eta, known, generator, variance_noise),
            x0_previous=self._previous[1] if order == 2 else None,
            clip=None if later else clip,
            learned_range=learned,
        )
        if later:
            x, x0 = self._clipped(x, x0, row)
        if self.config.solver == "dpm++":
            self._previous = (known if known is not None else -1), x0
        return SchedulerOutput(x, x0) if return_dict else (x, x0)

    def _clipped(self, x: Tensor, x0: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        """Clip x0 and leave ε: x, which is √ᾱ·x0 and a share of ε, changes by √ᾱ of x0's change."""
        limit = self.config.clip_sample_range
        clipped = x0.clamp(-limit, limit)
        signal = self._at(x.device, "signal").index_select(0, row.reshape(1)).to(x.dtype)
        return x + signal * (clipped - x0), clipped

    def _known_row(self, timestep: int | Tensor) -> int | None:
        """The table's row, where it can be told without waiting for a device."""
        if isinstance(timestep, Tensor):
            if timestep.numel() != 1:
                fail("timestep", tuple(timestep.shape), "one timestep, an int or a tensor ()")
            if timestep.device.type != "cpu":
                return None
        value = int(timestep)
        row = int(self._rows[value]) if 0 <= value < len(self._rows) else -1
        if row < 0:
            fail("timestep", value, f"one of scheduler.timesteps {self.timesteps.tolist()}")
        return row

    def _order(self, row: int | None) -> int:
        """2 where DPM-Solver++ 2M has the x0 of the timestep just before, or must trust it has."""
        if self.config.solver != "dpm++" or self.config.solver_order == 1:
            return 1
        if self._previous is None or (row is not None and self._previous[0] not in (-1, row + 1)):
            return 1
        return 2

    def _noise(
        self,
        sample: Tensor,
        eta: float,
        row: int | None,
        generator: torch.Generator | list[torch.Generator] | None,
        given: Tensor | None,
    ) -> Tensor | None:
        """The noise of a step that has any; the last step has none."""
        solver = self.config.solver
        if row == 0 or not (solver == "ddpm" or (solver == "ddim" and eta > 0)):
            return None
        if given is not None:
            return given
        return randn_tensor(
            sample.shape, generator=generator, device=sample.device, dtype=sample.dtype
        )

    def _mixture(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """√ᾱ and √(1 − ᾱ) of `(B,)` timesteps, to broadcast over samples."""
        roots = np.sqrt(self._alphas_cumprod), np.sqrt(1 - self._alphas_cumprod)
        shape = (-1, *[1] * (like.dim() - 1))
        signal, noise = (
            torch.from_numpy(root).to(like.device, like.dtype)[timesteps.to(like.device)]
            for root in roots
        )
        return signal.reshape(shape), noise.reshape(shape)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """q(x_t | x_0): √ᾱ·x0 + √(1 − ᾱ)·noise, a timestep for each sample."""
        signal, sigma = self._mixture(timesteps, original_samples)
        return signal * original_samples + sigma * noise

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """v = √ᾱ·noise − √(1 − ᾱ)·x0, what a v-prediction model learns."""
        signal, sigma = self._mixture(timesteps, sample)
        return signal * noise - sigma * sample

    def __len__(self) -> int:
        return self.config.num_train_timesteps
