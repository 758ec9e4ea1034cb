"""What a training run is made of, and how it goes on after an interruption.

One step: the batch's gradients, summed over `accumulate` micro-batches, then AdamW, then

    ema ← decay·ema + (1 − decay)·parameter

Everything the next step depends on is in `state()`: the weights and their EMA, the optimiser, the
gradient scaler, the step, and torch's random state. The order of the data follows from the step.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastdit.diffusion import create_diffusion
from fastdit.model import DiT

AMP = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}
SCHEDULES = ("constant", "cosine")
FLUSH_EVERY = 20
"""Steps between two reads of the loss, which make the host wait for the device."""


class Diverged(ValueError):
    """The loss is no longer a number."""


def learning_rate(step: int, base: float, warmup: int, schedule: str, steps: int) -> float:
    """The rate of a step, counted from 0.

    Rises linearly over the first `warmup` steps to `base`; then stays there, or falls along half a
    cosine towards 0 at `steps`.
    """
    if step < warmup:
        return base * (step + 1) / warmup
    if schedule == "constant":
        return base
    progress = (step - warmup) / max(1, steps - warmup)
    return base * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


@torch.no_grad()
def update_ema(ema: DiT, model: DiT, decay: float) -> None:
    """Move each weight of `ema` towards `model`'s: decay·ema + (1 − decay)·weight."""
    averaged, current = list(ema.parameters()), list(model.parameters())
    torch._foreach_mul_(averaged, decay)
    torch._foreach_add_(averaged, current, alpha=1 - decay)


class Trainer:
    """A model in training.

    Args:
        model: trained in place, on its device, in float32.
        steps: what the cosine schedule ends at.
        batches: pairs `(B, C, H, W)`, `(B,)`, beginning with the batch of the current step.
        lr, weight_decay, warmup_steps, schedule: see `learning_rate`; AdamW, betas 0.9 and 0.999.
        ema: the decay of the average.
        accumulate: micro-batches of each batch.
        clip_grad: the largest norm of all gradients together; None does not clip.
        amp: `"none"`, `"bf16"`, or `"fp16"`, which scales the loss and skips steps that overflow.
        noise_schedule: of `create_diffusion`.

    Attributes:
        step: steps done.
        ema: the averaged model, in eval mode.
    """

    def __init__(
        self,
        model: DiT,
        *,
        steps: int,
        lr: float = 1e-4,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        schedule: str = "constant",
        ema: float = 0.9999,
        accumulate: int = 1,
        clip_grad: float | None = None,
        amp: str = "none",
        noise_schedule: str = "linear",
    ) -> None:
        self.model = model.train()
        self.ema = copy.deepcopy(model).eval().requires_grad_(False)
        self.device = next(model.parameters()).device
        self.step = 0
        self._steps, self._lr, self._warmup, self._schedule = steps, lr, warmup_steps, schedule
        self._decay, self._accumulate, self._clip = ema, accumulate, clip_grad
        self._dtype = AMP[amp]
        self._diffusion = create_diffusion(
            "", noise_schedule=noise_schedule, learn_sigma=model.learn_sigma
        )
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self._trained, lr=lr, weight_decay=weight_decay)
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=amp == "fp16")
        self._losses: list[float] = []
        self._unread: list[Tensor] = []

    def advance(self, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        """One optimiser step on the next batch.

        Raises:
            Diverged: the loss is NaN or infinite; noticed within `FLUSH_EVERY` steps and before any
                state is taken.
        """
        x, y = (part.to(self.device, non_blocking=True) for part in next(batches))
        for group in self._optimizer.param_groups:
            group["lr"] = self.rate()
        total = torch.zeros((), device=self.device)
        for x_part, y_part in zip(
            x.chunk(self._accumulate), y.chunk(self._accumulate), strict=True
        ):
            loss = self._loss(x_part, y_part) * (len(x_part) / len(x))
            self._scaler.scale(loss).backward()
            total += loss.detach()
        if self._clip is not None:
            self._scaler.unscale_(self._optimizer)
            torch.nn.utils.clip_grad_norm_(self._trained, self._clip)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        update_ema(self.ema, self.model, self._decay)
        self.step += 1
        self._unread.append(total)
        if len(self._unread) >= FLUSH_EVERY:
            self.losses()

    def rate(self) -> float:
        """The learning rate of the coming step."""
        return learning_rate(self.step, self._lr, self._warmup, self._schedule, self._steps)

    def losses(self) -> list[float]:
        """The mean loss of every step so far."""
        if self._unread:
            values = torch.stack(self._unread).cpu().tolist()
            first = self.step - len(values)
            self._unread.clear()
            for i, value in enumerate(values):
                if not math.isfinite(value):
                    raise Diverged(
                        f"the loss became {value} at step {first + i + 1}; try a lower lr, "
                        "clip_grad=1, more warmup_steps, or amp='none'"
                    )
            self._losses += values
        return self._losses

    def recent_loss(self, count: int = 100) -> float:
        """The mean over the last `count` losses that were read; NaN before the first."""
        recent = self._losses[-count:]
        return sum(recent) / len(recent) if recent else math.nan

    def state(self) -> dict[str, Any]:
        """Tensors, numbers and strings from which `load_state` goes on to the bit.

        `model`, `ema`, `opt` and `config` are where `fastdit.load_model` looks for them.
        """
        losses = torch.tensor(self.losses(), dtype=torch.float64)
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "opt": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "config": self.model.config,
            "losses": losses,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self._on_cuda() else None,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises:
            ValueError: the state is of a model of another shape.
        """
        if state["config"] != self.model.config:
            raise ValueError(f"model: got {self.model.config}, allowed is {state['config']}")
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self._optimizer.load_state_dict(state["opt"])
        self._scaler.load_state_dict(state["scaler"])
        self._losses, self._unread = state["losses"].tolist(), []
        self.step = state["step"]
        torch.set_rng_state(state["rng"].cpu())
        if self._on_cuda() and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"].cpu(), self.device)

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        t = torch.randint(0, self._diffusion.num_timesteps, (len(x),), device=self.device)
        enabled = self._dtype is not None
        with torch.autocast(self.device.type, dtype=self._dtype, enabled=enabled):
            return self._diffusion.training_losses(self.model, x, t, {"y": y})["loss"].mean()

    def _on_cuda(self) -> bool:
        return self.device.type == "cuda"
