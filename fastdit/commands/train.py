"""`fastdit train`: the published recipe with what a long run needs.

AdamW on the diffusion or flow loss, an exponential moving average (EMA) of the weights from which
all samples are drawn, and a state file from which a run goes on exactly: interrupted and resumed,
it ends with the same bits as if nothing had happened.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from fastdit.backends import devices
from fastdit.commands import design_options
from fastdit.sizes import parse_axes
from fastdit.trainer import TrainConfig
from fastdit.training import WEIGHTS, train

SUMMARY = "train a DiT on a folder of images, an .npz file, or the digits"

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

DIGITS_FLOW = {"learn_sigma": False, "t_sampling": "logit_normal", "time_scale": 1000.0}
"""What `--data digits --objective flow` changes besides."""

HELP = {
    "data": "'digits', an .npz file, a folder of .npz files, or a folder of images by class",
    "out": "folder of the run's files",
    "objective": "what the model learns: diffusion or flow",
    "model": "a size of the paper, such as DiT-S/2; custom is the next four",
    "depth": "blocks",
    "hidden_size": "width of the tokens",
    "num_heads": "attention heads; a divisor of the width",
    "patch_size": "side of a patch, or one for each axis: 8,2; a signal's: 8,",
    "image_size": "side that the images of a folder are cropped to",
    "buckets": "sizes that a folder's images are sorted into, such as 256x256,192x320",
    "class_dropout_prob": "share of labels dropped, for guidance",
    "learn_sigma": "also learn the variance",
    "unconditional": "leave the labels out",
    "steps": "updates in all",
    "batch_size": "samples of an update",
    "accumulate": "parts that a batch is computed in, one after another",
    "lr": "learning rate",
    "weight_decay": "AdamW's",
    "warmup_steps": "steps in which the learning rate rises",
    "schedule": "of the learning rate: constant or cosine",
    "ema": "decay of the averaged weights",
    "clip_grad": "largest norm of the gradient",
    "amp": "autocast: none, bf16 or fp16",
    "flip": "mirror images at random; better not for latents",
    "seed": "of weights, data and noise",
    "device": "cpu, cuda, ...",
    "save_every": "steps between two saves",
    "sample_every": "steps between two grids of samples; 0 is none",
    "path_type": "flow: Linear, GVP or VP",
    "prediction": "flow: velocity, noise or score",
    "loss_weight": "flow: None, velocity or likelihood",
    "train_eps": "flow: how near to its ends times are drawn",
    "sample_eps": "flow: how near to its ends samples begin and end",
    "t_sampling": "flow: the times' distribution, uniform or logit_normal",
    "logit_mean": "flow: of logit_normal",
    "logit_std": "flow: of logit_normal",
    "timestep_shift": "flow: below 1 draws more times near the noise",
    "cosine_loss": "flow: add the angle between velocities to the loss",
    "time_scale": "flow: what times are multiplied by for the model",
}
"""What each option is; its default follows."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One option for each field of `TrainConfig`; what is not given is the data's default."""
    kinds = {"int": int, "float": float, "str": str, "float | None": float, "str | None": str}
    kinds["int | tuple[int, ...]"] = parse_axes
    design_options.add_arguments(parser)
    for field in dataclasses.fields(TrainConfig):
        if field.name == "design":
            continue
        option = f"--{field.name.replace('_', '-')}"
        required = field.default is dataclasses.MISSING
        shown = HELP[field.name] if required else f"{HELP[field.name]} ({default_of(field)})"
        if field.type == "bool":
            action = argparse.BooleanOptionalAction
            parser.add_argument(option, action=action, default=None, help=shown)
        else:
            kind = kinds[str(field.type)]
            parser.add_argument(option, type=kind, required=required, default=None, help=shown)
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")


def default_of(field: dataclasses.Field[Any]) -> str:
    """An option's default, and those of the digits' recipes."""
    shown = f"default {field.default}"
    if field.name == "device":
        shown = "default: the accelerator, else the CPU"
    elif field.name in ("train_eps", "sample_eps"):
        shown = "default: as published for the path"
    elif field.default in ("", None):
        shown = "default: none"
    for case, recipe in (("digits", DIGITS), ("digits with flow", DIGITS_FLOW)):
        if field.name in recipe:
            shown += f"; {case}: {recipe[field.name]}"
    return shown


def config_from(args: argparse.Namespace) -> TrainConfig:
    """The options given, over the data's recipe, over the defaults."""
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    given = {k: v for k, v in vars(args).items() if k in names and v is not None}
    recipe = DIGITS if args.data == "digits" else {}
    if recipe and args.objective == "flow":
        recipe = recipe | DIGITS_FLOW
    design = design_options.options_from(args)
    return TrainConfig(**{"device": devices()[-1], **recipe, **given, "design": design})


def run(args: argparse.Namespace) -> None:
    """`fastdit train`."""
    config = config_from(args)
    trainer = train(config, resume=args.resume)
    print(f"{trainer.steps_done} steps; weights for load_model in {Path(config.out) / WEIGHTS}")
