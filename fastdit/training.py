"""Training: the published recipe with what a long run needs.

AdamW on the diffusion loss, an exponential moving average (EMA) of the weights from which all
samples are drawn, and a state file from which a run goes on exactly: interrupted and resumed, it
ends with the same bits as if nothing had happened (`fastdit.trainer` says how).
"""

from __future__ import annotations

import contextlib
import importlib.util
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdit import images
from fastdit.checkpoint import atomic_write, save_model
from fastdit.data import order
from fastdit.flow import transport_metadata
from fastdit.sampling import sample
from fastdit.trainer import TrainConfig, Trainer

STATE, WEIGHTS, CURVE = "state.pt", "ema.safetensors", "loss.png"


def train(config: TrainConfig, *, resume: bool = False, progress: bool = True) -> Trainer:
    """Run `config` to its last step and write its files into `config.out`.

    `state.pt` to resume from, `ema.safetensors` for `load_model`, `loss.png`, and sample grids.
    Ctrl-C or SIGTERM ends the step in hand, saves, and stops.

    Raises:
        DivergedError: the loss is not finite; nothing is saved over the last checkpoint.
        KeyboardInterrupt: the run was asked to stop, and has saved.
        FileExistsError: the folder holds a run already and `resume` is False.
        FileNotFoundError: `resume` is True and it holds none.
        ImportError: matplotlib, which draws the loss, is missing; said before the first step.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("training draws its loss with matplotlib: pip install 'fastdit[train]'")
    out = Path(config.out)
    found = (out / STATE).exists()
    if found and not resume:
        raise FileExistsError(f"--out: {str(out)!r} holds a run; pass --resume or another folder")
    if resume and not found:
        raise FileNotFoundError(f"--resume: there is no {STATE} in {str(out)!r}")
    trainer = Trainer(config)
    out.mkdir(parents=True, exist_ok=True)
    if resume:
        trainer.restore(torch.load(out / STATE, map_location=trainer.device, weights_only=True))
    with _asked_to_stop() as stop:
        _loop(trainer, out, progress, stop)
    save(trainer, out)
    if stop.is_set():
        raise KeyboardInterrupt
    return trainer


@contextlib.contextmanager
def _asked_to_stop() -> Iterator[threading.Event]:
    """Inside, Ctrl-C and SIGTERM set the event instead of cutting a step in two."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may set handlers
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: stop.set()) for number in signals]
    try:
        yield stop
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def _loop(trainer: Trainer, out: Path, progress: bool, stop: threading.Event) -> None:
    from tqdm.auto import tqdm

    c = trainer.config
    bar = tqdm(total=c.steps, initial=trainer.steps_done, disable=not progress, unit="step")
    recent, clock = None, time.perf_counter()
    with bar:
        while trainer.steps_done < c.steps and not stop.is_set():
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
    atomic_write(out / STATE, lambda path: _write_state(trainer.state(), path))
    save_model(trainer.average, out / WEIGHTS, metadata=transport_metadata(trainer.transport))
    if trainer.losses:
        atomic_write(out / CURVE, lambda path: plot_losses(trainer.losses, path))


def _write_state(state: dict[str, Any], path: Path) -> None:
    """Through a file object: given a path, torch writes its name into the archive."""
    with open(path, "wb") as file:
        torch.save(state, file)


def save_samples(trainer: Trainer, path: Path) -> None:
    """A grid of the average's samples, a row for each of the first ten classes, drawn from the
    run's seed without touching its generators."""
    model = trainer.average
    rows = min(10, model.num_classes)
    classes: Any = [label for label in range(rows) for _ in range(8)]
    if model.design.condition_dim:
        classes = trainer.data.batch(order(len(trainer.data), trainer.config.seed, 0, 64))[1]
    pixels = model.in_channels in (1, 3)
    out = sample(
        model,
        64 if len(classes) == 0 else classes,
        steps=20,
        cfg_scale=2.0 if model.guidable else 1.0,
        solver="heun" if trainer.transport else "dpm++",
        seed=trainer.config.seed,
        clip_denoised=pixels and trainer.transport is None,
        transport=trainer.transport,
    )
    if out.dim() == 3:
        atomic_write(path, lambda temporary: plot_signals(out[:8], temporary))
        return
    shown = out if pixels else out[:, :3] / out[:, :3].abs().amax()
    scale = max(1, 64 // out.shape[-1])
    labels = [str(row) for row in range(rows)]
    images.save(images.grid(images.to_uint8(shown), 8, scale=scale, row_labels=labels), path)


def plot_signals(signals: Tensor, path: Path) -> None:
    """`(B, C, L)` signals below each other, a line for each channel, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(signals), squeeze=False, figsize=(6, len(signals)))
    for channels, row in zip(signals.float().cpu(), axes[:, 0], strict=True):
        row.plot(channels.T, linewidth=0.8)
        row.set_axis_off()
    figure.savefig(path, format="png", dpi=120)
    plt.close(figure)


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
