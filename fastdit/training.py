"""`fastdit train`: train a DiT on a folder of images, an `.npz`, or the handwritten digits.

    fastdit train --data digits --out runs/digits
    fastdit train --data photos/ --image-size 64 --model DiT-S/4 --out runs/photos
    fastdit train --data photos/ --image-size 64 --model DiT-S/4 --out runs/photos --resume

The folder OUT receives `state.pt` (everything a resumed run needs), `ema.safetensors` (the model to
sample from), `loss.png` and `samples/`. Ctrl-C finishes the step, saves and stops; a run resumed
from there ends with the same bits as one that was never stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import torch
from tqdm.auto import tqdm

from fastdit import images
from fastdit.checkpoint import CheckpointError, save_model
from fastdit.checkpoint_files import atomic_write
from fastdit.data import Data, Stream, batches, load_data
from fastdit.model import DiT, DiT_models
from fastdit.sampling import sample
from fastdit.trainer import AMP, SCHEDULES, Trainer

SUMMARY = "train a model"
STATE, WEIGHTS, CURVE = "state.pt", "ema.safetensors", "loss.png"


def _option(default: Any, help: str, choices: Any = None) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """All of a run. The defaults are the published ones; each field is an option of the command.

    Raises:
        ValueError: a value that is not allowed, which is named.
    """

    data: str = _option(dataclasses.MISSING, "'digits', an .npz file, or a folder of class folders")
    out: str = _option(dataclasses.MISSING, "folder of the run")
    model: str = _option("DiT-XL/2", "published model whose shape is used", tuple(DiT_models))
    depth: int | None = _option(None, "blocks, instead of the model's")
    width: int | None = _option(None, "width of the tokens, instead of the model's")
    heads: int | None = _option(None, "attention heads, instead of the model's")
    patch: int | None = _option(None, "side of a patch, instead of the model's")
    num_classes: int | None = _option(None, "default: as many as the data has")
    class_dropout: float = _option(0.1, "share of labels dropped; 0 allows no guidance")
    learn_sigma: bool = _option(True, "also learn the variance")
    image_size: int = _option(256, "images of a folder are cropped to this size")
    mirror: bool | None = _option(None, "mirror half of the samples; default: images only")
    noise_schedule: str = _option("linear", "of the diffusion", ("linear", "cosine"))
    steps: int = _option(400_000, "optimiser steps")
    batch_size: int = _option(256, "samples of a step")
    accumulate: int = _option(1, "parts that a batch is computed in, to save memory")
    lr: float = _option(1e-4, "learning rate of AdamW")
    weight_decay: float = _option(0.0, "of AdamW")
    warmup_steps: int = _option(0, "steps over which the rate rises to lr")
    schedule: str = _option("constant", "the rate after that; cosine ends at 0", SCHEDULES)
    clip_grad: float | None = _option(None, "largest norm of the gradients; default: none")
    ema: float = _option(0.9999, "decay of the averaged weights")
    amp: str = _option("none", "autocast; weights stay float32", tuple(AMP))
    gradient_checkpointing: bool = _option(False, "recompute each block in the backward pass")
    seed: int = _option(0, "of the weights, the noise and the order of the data")
    device: str | None = _option(None, "default: the accelerator, else the CPU")
    workers: int = _option(0, "processes that read images ahead")
    checkpoint_every: int = _option(5_000, "steps between two checkpoints")
    sample_every: int = _option(5_000, "steps between two sample grids; 0 draws none")
    sample_steps: int = _option(50, "DDIM steps of a grid")
    cfg_scale: float = _option(2.0, "guidance of a grid; 1 is none")

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "checkpoint_every", "sample_steps"):
            self._require(name, getattr(self, name) >= 1, "an int >= 1")
        for name in ("warmup_steps", "sample_every", "seed", "workers", "weight_decay"):
            self._require(name, getattr(self, name) >= 0, "0 or more")
        self._require("lr", 0 < self.lr < float("inf"), "a positive number")
        self._require("ema", 0 <= self.ema < 1, "0 to below 1")
        self._require("clip_grad", self.clip_grad is None or self.clip_grad > 0, "more than 0")
        parts = f"a divisor of batch_size = {self.batch_size}"
        self._require("accumulate", self.batch_size % self.accumulate == 0, parts)
        for field in dataclasses.fields(self):
            choices = field.metadata["choices"]
            allowed = ", ".join(map(repr, choices or ()))
            self._require(field.name, not choices or getattr(self, field.name) in choices, allowed)

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ValueError(f"{name}: got {getattr(self, name)!r}, allowed is {allowed}")


RECIPES: dict[str, dict[str, Any]] = {
    "digits": {
        "depth": 3,
        "width": 96,
        "heads": 6,
        "patch": 2,
        "steps": 4500,
        "batch_size": 64,
        "lr": 1e-3,
        "warmup_steps": 100,
        "schedule": "cosine",
        "ema": 0.999,
        "checkpoint_every": 500,
        "sample_every": 1500,
    },
}
"""Other defaults for data that the package knows. `digits` makes the shipped weights."""

FREE_ON_RESUME = {
    *("data", "out", "steps", "device", "workers"),
    *("checkpoint_every", "sample_every", "sample_steps", "cfg_scale"),
}
"""Fields that a resumed run may change; the others would make it another run."""


def recipe(data: str, out: str, **changes: Any) -> TrainConfig:
    """The configuration for `data`: `RECIPES`' if it has one, with changes."""
    return TrainConfig(**{"data": data, "out": out, **RECIPES.get(data, {}), **changes})


def train(config: TrainConfig, *, resume: bool = False, progress: bool = True) -> Trainer:
    """Train, write the run's folder, and return the trainer with the model and its average.

    On SIGINT or SIGTERM the step is finished and saved. The caller's random state is kept.

    Args:
        config: the run.
        resume: go on with the run in `config.out`.
        progress: show a progress bar.

    Raises:
        ValueError: a configuration that does not fit the data or the run resumed, or (`Diverged`)
            a loss that is not a number.
        FileNotFoundError: no data, or nothing to resume.
        KeyboardInterrupt: stopped by a signal, after saving.
    """
    out, device = Path(config.out), _device(config.device)
    if not resume and (out / STATE).exists():
        raise ValueError(f"out: {str(out)!r} holds a run; resume it, or choose another folder")
    if resume and not (out / STATE).is_file():
        raise FileNotFoundError(f"out: {str(out)!r} has no {STATE} to resume")
    data = load_data(config.data, config.image_size)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), _tf32(device), _stop_signals() as stopped:
        torch.manual_seed(config.seed)
        trainer = _trainer(config, build_model(config, data).to(device))
        if resume:
            _load(trainer, config, data)
        out.mkdir(parents=True, exist_ok=True)
        _run(trainer, config, data, stopped, progress)
        _save(trainer, config, data)
    if stopped():
        tqdm.write(f"stopped and saved at step {trainer.step}; go on with --resume")
        raise KeyboardInterrupt
    return trainer


def build_model(config: TrainConfig, data: Data) -> DiT:
    """The model that `config` describes, for samples like those of `data`."""
    names = ("depth", "hidden_size", "num_heads", "patch_size")
    shape = dict(zip(names, DiT_models[config.model].args, strict=True))
    given = dict(zip(names, (config.depth, config.width, config.heads, config.patch), strict=True))
    shape |= {name: value for name, value in given.items() if value is not None}
    classes = data.num_classes if config.num_classes is None else config.num_classes
    if classes < data.num_classes:
        raise ValueError(
            f"num_classes: got {classes}, allowed is {data.num_classes} or more for this data"
        )
    channels, height, width = data.shape
    model = DiT(
        input_size=height if height == width else (height, width),
        in_channels=channels,
        num_classes=classes,
        class_dropout_prob=config.class_dropout,
        learn_sigma=config.learn_sigma,
        **shape,
    )
    model.gradient_checkpointing = config.gradient_checkpointing
    return model


def _trainer(config: TrainConfig, model: DiT) -> Trainer:
    names = (
        *("steps", "lr", "weight_decay", "warmup_steps", "schedule", "ema"),
        *("accumulate", "clip_grad", "amp", "noise_schedule"),
    )
    return Trainer(model, **{name: getattr(config, name) for name in names})


def _run(
    trainer: Trainer, config: TrainConfig, data: Data, stopped: Callable[[], bool], progress: bool
) -> None:
    mirror = data.mirrors if config.mirror is None else config.mirror
    stream = Stream(data, config.seed, mirror)
    source = batches(stream, config.batch_size, trainer.step, config.workers)
    bar = tqdm(
        total=config.steps, initial=trainer.step, unit="step", disable=not progress, smoothing=0.05
    )
    with bar, contextlib.closing(source):
        while trainer.step < config.steps and not stopped():
            trainer.advance(source)
            bar.update()
            rate = (bar.format_dict.get("rate") or 0) * config.batch_size
            bar.set_postfix_str(
                f"loss {trainer.recent_loss():.4f}, {rate:.0f} images/s", refresh=False
            )
            if config.sample_every and trainer.step % config.sample_every == 0:
                save_samples(trainer.ema, config, trainer.step)
            if trainer.step % config.checkpoint_every == 0 and trainer.step < config.steps:
                _save(trainer, config, data)


def _save(trainer: Trainer, config: TrainConfig, data: Data) -> None:
    out = Path(config.out)
    state = trainer.state()
    state |= {"train": dataclasses.asdict(config), "samples": len(data)}
    atomic_write(out / STATE, lambda temporary: torch.save(state, temporary))
    save_model(trainer.ema, out / WEIGHTS)
    if trainer.losses():
        save_curve(trainer.losses(), out / CURVE)


def _load(trainer: Trainer, config: TrainConfig, data: Data) -> None:
    path = Path(config.out) / STATE
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        before, samples = state["train"], state["samples"]
    except (RuntimeError, EOFError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: not the state of a run, or damaged ({error})") from error
    fixed = set(before) - FREE_ON_RESUME | ({"steps"} if config.schedule != "constant" else set())
    for name in sorted(fixed):
        now = getattr(config, name, None)
        if now != before[name]:
            raise ValueError(f"{name}: got {now!r}, allowed is {before[name]!r}, as the run began")
    if len(data) != samples:
        raise ValueError(f"data: got {len(data)} samples, allowed is {samples}, as the run began")
    if config.steps < state["step"]:
        raise ValueError(f"steps: got {config.steps}, allowed is {state['step']} (done) or more")
    trainer.load_state(state)


def save_curve(losses: list[float], path: Path) -> None:
    """Plot the loss of every step, and its running mean, on logarithmic axes."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "the loss curve is drawn by matplotlib: pip install 'fastdit[train]'"
        ) from error
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    window = max(1, len(losses) // 100)
    mean = np.convolve(losses, np.full(window, 1 / window), "valid")
    steps = np.arange(1, len(losses) + 1)
    axes.plot(steps, losses, color="0.8", linewidth=0.6, label="each step")
    axes.plot(steps[window - 1 :], mean, color="C0", label=f"mean of {window}")
    axes.set(xlabel="step", ylabel="loss", xscale="log", yscale="log")
    axes.legend()
    canvas = FigureCanvasAgg(figure)
    atomic_write(path, lambda temporary: canvas.print_png(temporary))


def save_samples(model: DiT, config: TrainConfig, step: int) -> None:
    """A grid of up to ten classes, eight samples each, in `samples/`."""
    classes = [label for label in range(min(10, model.num_classes)) for _ in range(8)]
    pixels = model.in_channels in (1, 3)
    samples = sample(
        model,
        classes,
        steps=config.sample_steps,
        solver="ddim",
        cfg_scale=config.cfg_scale if config.class_dropout else 1,
        seed=config.seed,
        clip_denoised=pixels,
    )
    shown = samples if pixels else samples[:, :3] / samples[:, :3].abs().amax()
    picture = images.grid(images.to_uint8(shown), 8, scale=max(1, 64 // samples.shape[-1]))
    path = Path(config.out) / "samples" / f"{step:07d}.png"
    atomic_write(path, lambda temporary: picture.save(temporary, format="png"))


def _device(name: str | None) -> torch.device:
    if name is not None:
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextlib.contextmanager
def _tf32(device: torch.device) -> Iterator[None]:
    """TF32 products on GPUs, as published; the setting is put back."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Whether SIGINT or SIGTERM came; the second one acts at once, as it would have."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def stop(number: int, _frame: Any) -> None:
        came.append(number)
        restore()

    for number in before:
        signal.signal(number, stop)
    try:
        yield lambda: bool(came)
    finally:
        restore()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare one option for each field of `TrainConfig`, and `--resume`."""
    hints = get_type_hints(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        required = field.default is dataclasses.MISSING
        kinds = [kind for kind in get_args(hints[field.name]) if kind is not type(None)]
        kind = kinds[0] if kinds else hints[field.name]
        told = "" if required or field.default is None else f" (default {field.default})"
        options: dict[str, Any] = {"help": field.metadata["help"] + told, "required": required}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= {"type": kind, "choices": field.metadata["choices"]}
        name = "--" + field.name.replace("_", "-")
        parser.add_argument(name, default=argparse.SUPPRESS, **options)
    parser.add_argument("--resume", action="store_true", help="go on with the run in OUT")


def run(args: argparse.Namespace) -> None:
    """Train as the command line says."""
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    given = {name: value for name, value in vars(args).items() if name in names}
    config = recipe(**given)
    train(config, resume=args.resume)
    print(f"wrote {Path(config.out) / WEIGHTS}")
