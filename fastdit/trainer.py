"""What a training run is made of: its settings, its state, and one step.

A step sums the gradients of `accumulate` parts of a batch, updates with AdamW, and moves the
average: ema = decay·ema + (1 - decay)·weights. All that the next step depends on is in `state()`:
the weights, their average, the optimiser, the gradient scaler, the step, and the random
generators; the order of the data follows from the seed and the step.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdit import data as datasets
from fastdit.backends import checked_device
from fastdit.diffusion import create_diffusion
from fastdit.flow import Transport, create_transport
from fastdit.model import DiT, DiT_models
from fastdit.sizes import resized

OBJECTIVES = ("diffusion", "flow")
SCHEDULES = ("constant", "cosine")
FLOW_OPTIONS = (
    "path_type",
    "prediction",
    "loss_weight",
    "train_eps",
    "sample_eps",
    "t_sampling",
    "logit_mean",
    "logit_std",
    "timestep_shift",
    "cosine_loss",
    "time_scale",
)
AMP = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class DivergedError(ValueError):
    """The loss is no longer a finite number."""


@dataclass(frozen=True)
class TrainConfig:
    """A run. The defaults are the published ones, but for what depends on the data.

    `model` is a name of `DiT_models`, or "custom" with `depth`, `hidden_size`, `num_heads` and
    `patch_size`; `design` holds fields of `fastdit.designs.Design`, and `unconditional` leaves the
    labels out. `buckets` are sizes of images to train on together (`fastdit.buckets`). `flip`
    mirrors images at random; signals have no mirror image.

    `batch_size` samples make an update, `accumulate` of them at a time in turn.

    `objective` is "diffusion", the noise of 1000 steps, or "flow". The flow's options, from
    `path_type` to `time_scale`, are `fastdit.create_transport`'s; they say nothing of a diffusion.
    """

    data: str
    out: str
    objective: str = "diffusion"
    model: str = "custom"
    depth: int = 3
    hidden_size: int = 96
    num_heads: int = 4
    patch_size: int | tuple[int, ...] = 2
    image_size: int = 256
    buckets: str = ""
    class_dropout_prob: float = 0.1
    learn_sigma: bool = True
    design: dict[str, Any] = dataclasses.field(default_factory=dict)
    unconditional: bool = False
    steps: int = 400_000
    batch_size: int = 256
    accumulate: int = 1
    lr: float = 1e-4
    weight_decay: float = 0.0
    warmup_steps: int = 0
    schedule: str = "constant"
    ema: float = 0.9999
    clip_grad: float | None = None
    amp: str = "none"
    flip: bool = True
    seed: int = 0
    device: str = "cpu"
    save_every: int = 5000
    sample_every: int = 0
    path_type: str = "Linear"
    prediction: str = "velocity"
    loss_weight: str | None = None
    train_eps: float | None = None
    sample_eps: float | None = None
    t_sampling: str = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    timestep_shift: float = 1.0
    cosine_loss: bool = False
    time_scale: float = 1.0

    def __post_init__(self) -> None:
        positive = ("steps", "batch_size", "accumulate", "save_every", "image_size")
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, allowed is 1 or more")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate: got {self.accumulate}, allowed is a divisor of "
                f"batch_size = {self.batch_size}"
            )
        if self.objective not in OBJECTIVES:
            allowed = ", ".join(OBJECTIVES)
            raise ValueError(f"objective: got {self.objective!r}, allowed is {allowed}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule: got {self.schedule!r}, allowed is {', '.join(SCHEDULES)}")
        if self.amp not in AMP:
            raise ValueError(f"amp: got {self.amp!r}, allowed is {', '.join(AMP)}")
        if self.model != "custom" and self.model not in DiT_models:
            raise ValueError(
                f"model: got {self.model!r}, allowed is custom, {', '.join(DiT_models)}"
            )
        for name in ("lr", "weight_decay", "warmup_steps", "sample_every"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: got {getattr(self, name)}, allowed is 0 or more")
        if self.clip_grad is not None and not self.clip_grad > 0:
            raise ValueError(f"clip_grad: got {self.clip_grad}, allowed is None or above 0")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema: got {self.ema}, allowed is 0 to below 1")
        if self.objective == "flow":
            self.transport()
            return
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in FLOW_OPTIONS:
            if getattr(self, name) != defaults[name]:
                raise ValueError(
                    f"{name}: got {getattr(self, name)!r}, allowed is {defaults[name]!r} with "
                    "objective='diffusion'"
                )

    def transport(self) -> Transport | None:
        """The flow that the run trains; None trains a diffusion."""
        if self.objective == "diffusion":
            return None
        return create_transport(**{name: getattr(self, name) for name in FLOW_OPTIONS})


def build_model(config: TrainConfig, data: datasets.Dataset) -> DiT:
    """The model of `config` for the data's shape and its classes or vectors.

    Raises:
        ValueError: the patch does not divide one of the data's sizes.
    """
    channels, *size = data.shape
    options: dict[str, Any] = {
        "input_size": size[0] if len(size) == 2 and size[0] == size[1] else tuple(size),
        "in_channels": channels,
        "num_classes": 0 if config.unconditional else data.num_classes,
        "class_dropout_prob": config.class_dropout_prob,
        "learn_sigma": config.learn_sigma,
        **config.design,
    }
    if data.condition_dim and not config.unconditional:
        options["condition_dim"] = data.condition_dim
    shapes = getattr(data, "shapes", [data.shape])
    if len(set(shapes)) > 1:
        options["any_size"] = True
    if config.model != "custom":
        model = DiT_models[config.model](**options)
    else:
        names = ("depth", "hidden_size", "num_heads", "patch_size")
        model = DiT(**options, **{name: getattr(config, name) for name in names})
    for shape in shapes:
        resized("--data: a size", shape[1:], model.patch)
    return model


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of a step, counted from 0: a linear rise over the warm-up, then constant, or half a
    cosine down to 0 at the last step."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    share = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.lr * 0.5 * (1 + math.cos(math.pi * share))


class Trainer:
    """A run in progress: `step()` makes one update; `state()` and `restore()` keep it."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.device = checked_device(config.device)
        self.data = datasets.load_data(config.data, config.image_size, config.buckets)
        torch.manual_seed(config.seed)
        self.model = build_model(config, self.data).to(self.device).train()
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.lr, weight_decay=config.weight_decay
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == "fp16")
        self.transport = config.transport()
        self.diffusion = create_diffusion("", learn_sigma=config.learn_sigma)
        self.steps_done = 0
        self.losses: list[float] = []

    def step(self) -> float:
        """One update on `batch_size` samples; returns the mean loss."""
        c = self.config
        part = c.batch_size // c.accumulate
        start = self.steps_done * c.batch_size
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(c, self.steps_done)
        total = 0.0
        for i in range(c.accumulate):
            indices = datasets.batch_order(self.data, c.seed, start + i * part, part)
            loss = self._loss(*self.data.batch(indices)) / c.accumulate
            self.scaler.scale(loss).backward()
            total += loss.item()
        if not math.isfinite(total):
            raise DivergedError(
                f"the loss of step {self.steps_done + 1} is {total}: the last checkpoint is kept; "
                "try a lower lr, clip_grad, or amp='none'"
            )
        self._update()
        self.steps_done += 1
        self.losses.append(total)
        return total

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        x, y = x.to(self.device), y.to(self.device)
        if self.config.flip and x.dim() == 4:
            x = torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5, x.flip(-1), x)
        amp = AMP[self.config.amp]
        with torch.autocast(self.device.type, amp, enabled=amp is not None):
            condition = {"y": None if self.config.unconditional else y}
            if self.transport is not None:
                terms = self.transport.training_losses(self.model, x, condition)
            else:
                t = torch.randint(0, self.diffusion.num_timesteps, (len(x),), device=self.device)
                terms = self.diffusion.training_losses(self.model, x, t, condition)
        return terms["loss"].mean()

    def _update(self) -> None:
        if self.config.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        update_average(self.average, self.model, self.config.ema)

    def state(self) -> dict[str, Any]:
        """All that the next step depends on."""
        cuda = self.device.type == "cuda"
        return {
            "model": self.model.state_dict(),
            "ema": self.average.state_dict(),
            "opt": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.steps_done,
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if cuda else None,
            "config": dataclasses.asdict(self.config),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state of the same run.

        Raises:
            ValueError: it is of a run with another model, data, batch or seed.
        """
        free = {"out", "save_every", "sample_every", "device"}
        if self.config.schedule == "constant":  # a cosine ends with the steps it was made for
            free.add("steps")
        added = dataclasses.asdict(TrainConfig(data="", out=""))  # what an older state lacks
        ours, theirs = dataclasses.asdict(self.config), {**added, **state["config"]}
        differing = [k for k in ours if k not in free and ours[k] != theirs[k]]
        if differing:
            told = ", ".join(f"{k} = {theirs[k]!r} then, {ours[k]!r} now" for k in differing)
            raise ValueError(f"--resume: the run was another one: {told}")
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["opt"])
        self.scaler.load_state_dict(state["scaler"])
        self.steps_done, self.losses = state["step"], state["losses"].tolist()
        torch.set_rng_state(state["rng"].cpu())
        if state["cuda_rng"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"].cpu(), self.device)


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """EMA: average = decay·average + (1 - decay)·model, parameter by parameter."""
    ours = [p for p in average.parameters() if p.is_floating_point()]
    torch._foreach_lerp_(ours, list(model.parameters()), 1 - decay)
