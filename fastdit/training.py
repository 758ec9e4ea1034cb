"""Training: the published recipe with what a long run needs.

AdamW on the diffusion loss, an exponential moving average (EMA) of the weights from which all
samples are drawn, and a state file from which a run goes on exactly: interrupted and resumed, it
ends with the same bits as if nothing had happened. The state holds the weights, their average, the
optimiser, the gradient scaler, the step, and the random generators; the order of the data follows
from the seed and the step.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdit import data as datasets
from fastdit import images
from fastdit.backends import devices
from fastdit.checkpoint import atomic_write, save_model
from fastdit.diffusion import create_diffusion
from fastdit.model import DiT, DiT_models
from fastdit.sampling import sample

SUMMARY = "train a DiT on a folder of images, an .npz file, or the digits"
SCHEDULES = ("constant", "cosine")
AMP = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}
STATE, WEIGHTS, CURVE = "state.pt", "ema.safetensors", "loss.png"


@dataclass(frozen=True)
class TrainConfig:
    """A run. The defaults are the published ones, but for what depends on the data.

    `model` is a name of `DiT_models`, or "custom" with `depth`, `hidden_size`, `num_heads` and
    `patch_size`. `batch_size` samples make an update, `accumulate` of them at a time in turn.
    """

    data: str
    out: str
    model: str = "custom"
    depth: int = 3
    hidden_size: int = 96
    num_heads: int = 4
    patch_size: int = 2
    image_size: int = 256
    class_dropout_prob: float = 0.1
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
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule: got {self.schedule!r}, allowed is {', '.join(SCHEDULES)}")
        if self.amp not in AMP:
            raise ValueError(f"amp: got {self.amp!r}, allowed is {', '.join(AMP)}")
        if self.model != "custom" and self.model not in DiT_models:
            raise ValueError(
                f"model: got {self.model!r}, allowed is custom, {', '.join(DiT_models)}"
            )
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema: got {self.ema}, allowed is 0 to below 1")


DIGITS = {
    "steps": 7000,
    "batch_size": 64,
    "lr": 1e-3,
    "schedule": "cosine",
    "ema": 0.998,
    "warmup_steps": 100,
    "flip": False,
    "save_every": 1000,
    "sample_every": 1000,
}
"""What `--data digits` changes of the defaults: the recipe of the weights that ship."""


def build_model(config: TrainConfig, data: datasets.Dataset) -> DiT:
    """The model of `config` for images of the data's shape and its classes."""
    channels, height, width = data.shape
    options: dict[str, Any] = {
        "input_size": height if height == width else (height, width),
        "in_channels": channels,
        "num_classes": data.num_classes,
        "class_dropout_prob": config.class_dropout_prob,
    }
    if config.model != "custom":
        return DiT_models[config.model](**options)
    names = ("depth", "hidden_size", "num_heads", "patch_size")
    return DiT(**options, **{name: getattr(config, name) for name in names})


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
        self.data = datasets.load_data(config.data, config.image_size)
        self.device = torch.device(config.device)
        torch.manual_seed(config.seed)
        self.model = build_model(config, self.data).to(self.device).train()
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.lr, weight_decay=config.weight_decay
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == "fp16")
        self.diffusion = create_diffusion("")
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
            indices = datasets.order(len(self.data), c.seed, start + i * part, part)
            loss = self._loss(*self.data.batch(indices)) / c.accumulate
            self.scaler.scale(loss).backward()
            total += loss.item()
        self._update()
        self.steps_done += 1
        self.losses.append(total)
        return total

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        x, y = x.to(self.device), y.to(self.device)
        if self.config.flip:
            x = torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5, x.flip(-1), x)
        t = torch.randint(0, self.diffusion.num_timesteps, (len(x),), device=self.device)
        amp = AMP[self.config.amp]
        with torch.autocast(self.device.type, amp, enabled=amp is not None):
            terms = self.diffusion.training_losses(self.model, x, t, {"y": y})
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
        ours, theirs = dataclasses.asdict(self.config), state["config"]
        differing = [k for k in ours if k not in free and ours[k] != theirs.get(k)]
        if differing:
            told = ", ".join(f"{k} = {theirs.get(k)!r} then, {ours[k]!r} now" for k in differing)
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


def train(config: TrainConfig, *, resume: bool = False, progress: bool = True) -> Trainer:
    """Run `config` to its last step and write its files into `config.out`.

    `state.pt` to resume from, `ema.safetensors` for `load_model`, `loss.png`, and sample grids.
    Ctrl-C saves before it stops.

    Raises:
        FileExistsError: the folder holds a run already and `resume` is False.
        FileNotFoundError: `resume` is True and it holds none.
    """
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    found = (out / STATE).exists()
    if found and not resume:
        raise FileExistsError(f"--out: {str(out)!r} holds a run; pass --resume or another folder")
    if resume and not found:
        raise FileNotFoundError(f"--resume: there is no {STATE} in {str(out)!r}")
    trainer = Trainer(config)
    if resume:
        trainer.restore(torch.load(out / STATE, map_location=trainer.device, weights_only=True))
    try:
        _loop(trainer, out, progress)
    finally:
        save(trainer, out)
    return trainer


def _loop(trainer: Trainer, out: Path, progress: bool) -> None:
    from tqdm.auto import tqdm

    c = trainer.config
    bar = tqdm(total=c.steps, initial=trainer.steps_done, disable=not progress, unit="step")
    recent, clock = None, time.perf_counter()
    with bar:
        while trainer.steps_done < c.steps:
            loss = trainer.step()
            recent = loss if recent is None else 0.98 * recent + 0.02 * loss
            bar.update()
            now = time.perf_counter()
            bar.set_postfix_str(f"loss {recent:.4f}, {c.batch_size / (now - clock):.0f} images/s")
            clock = now
            if c.sample_every and trainer.steps_done % c.sample_every == 0:
                save_samples(trainer, out / f"samples-{trainer.steps_done:07d}.png")
            if trainer.steps_done % c.save_every == 0 and trainer.steps_done < c.steps:
                save(trainer, out)


def save(trainer: Trainer, out: Path) -> None:
    """The state, the EMA weights and the loss curve, each written whole or not at all."""
    atomic_write(out / STATE, lambda path: torch.save(trainer.state(), path))
    save_model(trainer.average, out / WEIGHTS)
    if trainer.losses:
        atomic_write(out / CURVE, lambda path: plot_losses(trainer.losses, path))


def save_samples(trainer: Trainer, path: Path) -> None:
    """A grid of the average's samples, a row for each of the first ten classes, drawn from the
    run's seed without touching its generators."""
    model = trainer.average
    rows = min(10, model.num_classes)
    classes = [label for label in range(rows) for _ in range(8)]
    pixels = model.in_channels in (1, 3)
    guided = model.y_embedder.dropout_prob > 0
    out = sample(
        model,
        classes,
        steps=20,
        cfg_scale=2.0 if guided else 1.0,
        solver="dpm++",
        seed=trainer.config.seed,
        clip_denoised=pixels,
    )
    shown = out if pixels else out[:, :3] / out[:, :3].abs().amax()
    scale = max(1, 64 // out.shape[-1])
    labels = [str(row) for row in range(rows)]
    images.grid(images.to_uint8(shown), 8, scale=scale, row_labels=labels).save(path)


def plot_losses(losses: list[float], path: Path) -> None:
    """The loss of every step and its running mean, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    values = np.asarray(losses)
    window = max(1, len(values) // 50)
    mean = np.convolve(values, np.ones(window) / window, mode="valid")
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot(values, color="0.8", linewidth=0.6, label="each step")
    axes.plot(np.arange(len(mean)) + window - 1, mean, label=f"mean of {window}")
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.legend()
    figure.savefig(path, format="png", dpi=120)
    plt.close(figure)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One option for each field of `TrainConfig`; what is not given is the data's default."""
    kinds = {"int": int, "float": float, "str": str, "float | None": float}
    for field in dataclasses.fields(TrainConfig):
        option = f"--{field.name.replace('_', '-')}"
        required = field.default is dataclasses.MISSING
        shown = "" if required else f"default {field.default}"
        if field.name in DIGITS:
            shown += f"; digits: {DIGITS[field.name]}"
        if field.type == "bool":
            action = argparse.BooleanOptionalAction
            parser.add_argument(option, action=action, default=None, help=shown)
        else:
            kind = kinds[str(field.type)]
            parser.add_argument(option, type=kind, required=required, default=None, help=shown)
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")


def config_from(args: argparse.Namespace) -> TrainConfig:
    """The options given, over the data's recipe, over the defaults."""
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    given = {k: v for k, v in vars(args).items() if k in names and v is not None}
    recipe = DIGITS if args.data == "digits" else {}
    return TrainConfig(**{"device": devices()[-1], **recipe, **given})


def run(args: argparse.Namespace) -> None:
    """`fastdit train`."""
    config = config_from(args)
    trainer = train(config, resume=args.resume)
    print(f"{trainer.steps_done} steps; weights for load_model in {Path(config.out) / WEIGHTS}")
