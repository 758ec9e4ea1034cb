"""The forward process q: how samples are noised, and the posterior of one step back.

    q(x_t | x_0) = N(√ᾱ_t·x_0, 1 − ᾱ_t)
    q(x_{t−1} | x_t, x_0) = N(c1·x_0 + c2·x_t, β̃_t)

The constants are float64 on the host and float32 on the device, one table per device; the rows of
a batch's timesteps are gathered once and broadcast, never expanded in memory. Nothing here reads a
CUDA tensor on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdit.diffusion.schedules import NoiseLevels, respaced_betas
from fastdit.ops import _checks

Row = dict[str, Tensor]
_COLUMNS = (
    "sqrt_alphas_cumprod",
    "one_minus_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "log_betas",
    "large_variance",
    "log_large_variance",
)


class ForwardProcess(NoiseLevels):
    """A schedule, respaced or not, and the distributions that follow from it alone.

    Args:
        betas: `(T0,)`, the original schedule, each in (0, 1).
        use_timesteps: which of its steps are kept; None keeps all.

    Attributes:
        num_timesteps: how many steps are kept, T. Every `t` below is an index from 0 to T − 1.
        timestep_map: the original timesteps of those kept: what the model is given.
        use_timesteps: the same as a set.
        original_num_steps: T0.

    `t` is an int64 tensor `(B,)`, one index for each sample, on the samples' device. Outside its
    range it is an error on the CPU; on other devices it is not read, which would be a host sync.
    """

    def __init__(
        self, betas: Sequence[float] | np.ndarray, use_timesteps: Iterable[int] | None = None
    ) -> None:
        super().__init__(betas)
        self.original_num_steps = self.num_timesteps
        kept = set(range(self.num_timesteps) if use_timesteps is None else use_timesteps)
        if not kept or not kept <= set(range(self.num_timesteps)):
            allowed = f"a subset of 0 to {self.num_timesteps - 1}, not empty"
            _checks.fail("use_timesteps", repr(use_timesteps), allowed)
        if use_timesteps is not None:
            super().__init__(respaced_betas(self.betas, kept))
        self.use_timesteps = kept
        self.timestep_map = sorted(kept)
        self._device_tensors: dict[Hashable, Tensor] = {}

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The mean, variance and log-variance of q(x_t | x_0), each shaped like `x_start`.

        Args:
            x_start: `(B, C, ...)`, clean samples.
            t: int64 `(B,)`.
        """
        self._check_timesteps(x_start, t)
        row = self._rows(x_start, t)
        return (
            (row["sqrt_alphas_cumprod"] * x_start).to(x_start.dtype),
            row["one_minus_alphas_cumprod"].expand(x_start.shape),
            row["log_one_minus_alphas_cumprod"].expand(x_start.shape),
        )

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """Draw x_t: √ᾱ_t·x_0 + √(1 − ᾱ_t)·noise, like `x_start`.

        Args:
            x_start: `(B, C, ...)`, clean samples.
            t: int64 `(B,)`.
            noise: like `x_start`; None draws `torch.randn_like(x_start)`.
        """
        self._check_timesteps(x_start, t)
        noise = torch.randn_like(x_start) if noise is None else noise
        return self._noised(self._rows(x_start, t), x_start, noise)

    def q_posterior_mean_variance(
        self, x_start: Tensor, x_t: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The mean, variance and clipped log-variance of q(x_{t−1} | x_t, x_0).

        Args:
            x_start, x_t: `(B, C, ...)`.
            t: int64 `(B,)`.
        """
        self._check_timesteps(x_t, t)
        _checks.like("x_start", x_start, x_t)
        row = self._rows(x_t, t)
        return (
            self._posterior_mean(row, x_start, x_t),
            row["posterior_variance"].expand(x_t.shape),
            row["posterior_log_variance_clipped"].expand(x_t.shape),
        )

    def _noised(self, row: Row, x_start: Tensor, noise: Tensor) -> Tensor:
        _checks.like("noise", noise, x_start)
        x_t = row["sqrt_alphas_cumprod"] * x_start + row["sqrt_one_minus_alphas_cumprod"] * noise
        return x_t.to(x_start.dtype)

    def _posterior_mean(self, row: Row, x_start: Tensor, x_t: Tensor) -> Tensor:
        mean = row["posterior_mean_coef1"] * x_start + row["posterior_mean_coef2"] * x_t
        return mean.to(x_t.dtype)

    def _rows(self, x: Tensor, t: Tensor) -> Row:
        """The constants at `t`, float32, each broadcastable against `x`: one gather."""
        columns = self._on_device(
            "constants", x.device, lambda: np.stack([getattr(self, name) for name in _COLUMNS], 1)
        )
        rows = columns.index_select(0, t).reshape(-1, len(_COLUMNS), *[1] * (x.dim() - 1))
        return dict(zip(_COLUMNS, rows.unbind(1), strict=True))

    def _original_timesteps(self, t: Tensor) -> Tensor:
        """What the model is given for the index `t`."""
        original = self._on_device(
            "timestep_map", t.device, lambda: np.array(self.timestep_map), torch.int64
        )
        return original.index_select(0, t)

    def _on_device(
        self,
        key: Hashable,
        device: torch.device,
        make: Callable[[], np.ndarray],
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """`make()` on `device`, made and copied at the first call."""
        found = self._device_tensors.get((key, device))
        if found is None:
            # An inference tensor, cached, could not be used in training later.
            with torch.inference_mode(False):
                found = torch.from_numpy(make()).to(device, dtype)
            self._device_tensors[key, device] = found
        return found

    def _check_timesteps(self, x: Any, t: Any) -> None:
        _checks.tensor("x", x, range(2, 6), "(B, C, ...)")
        allowed = f"int64 ({x.shape[0]},) on {x.device}, from 0 to {self.num_timesteps - 1}"
        if not isinstance(t, Tensor):
            raise TypeError(f"t: got {type(t).__name__}, allowed is a tensor {allowed}")
        if t.dtype != torch.int64 or t.shape != x.shape[:1] or t.device != x.device:
            _checks.fail("t", _checks.described(t), allowed)
        if t.device.type == "cpu" and t.numel() and not torch.compiler.is_compiling():
            low, high = int(t.min()), int(t.max())
            if low < 0 or high >= self.num_timesteps:
                _checks.fail("t", f"{low} to {high}", allowed)
