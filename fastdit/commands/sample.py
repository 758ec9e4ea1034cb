"""`fastdit sample`: pictures or signals from any checkpoint.

The model works on latents if it has four channels: they are decoded by a VAE (`--vae`), or written
as they are (`--vae none`). With one or three channels its samples are the pixels; those of a model
of signals are plotted, or written as arrays or sounds. What may be asked for is the model's:
`--classes`, `--vectors` where it is conditioned on these, `--count` where it has no condition.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from fastdit import backends
from fastdit.commands import sample_files
from fastdit.diffusion import SPACINGS
from fastdit.flow import SDE, Transport, create_transport, load_transport
from fastdit.flow import solvers as flow_solvers
from fastdit.flow.paths import FORMS
from fastdit.model import DiT
from fastdit.sampler import PRESETS, Sampler
from fastdit.sampling import SOLVERS, sample

SUMMARY = "sample images from a checkpoint"
VAE = "stabilityai/sd-vae-ft-mse"
LATENT_SCALE = 0.18215
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def class_list(text: str) -> list[int]:
    """`"207,360"` as labels."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, allowed are labels separated by commas, such as 207,360"
        ) from None


def count(text: str) -> int:
    """An int of at least 1."""
    try:
        if (value := int(text)) >= 1:
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"got {text!r}, allowed is an int >= 1")


def vectors(text: str) -> Tensor:
    """`"0.1,0.2;0.3,0.4"`, or the array of an .npy or .npz file, as `(N, K)` float32 vectors."""
    try:
        if Path(text).suffix in (".npy", ".npz"):
            found = np.load(text, allow_pickle=False)
            if not isinstance(found, np.ndarray):
                names = [n for n in ("arr_1", "labels", *found.files) if n in found.files]
                found = found[names[0]]
        else:
            found = np.array([[float(n) for n in row.split(",")] for row in text.split(";")])
        values = torch.from_numpy(np.asarray(found, np.float32))
        if values.dim() != 2 or not values.numel():
            raise ValueError(f"shape {tuple(values.shape)}")
    except (ValueError, OSError, IndexError) as error:
        raise argparse.ArgumentTypeError(
            f"got {text!r} ({error}), allowed are vectors such as 0.1,0.2;0.3,0.4, or an .npy or "
            ".npz file of (N, K) numbers"
        ) from None
    return values


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add = parser.add_argument
    add("--ckpt", required=True, help="file, folder or hub id; 'digits', 'digits-flow': shipped")
    add("--classes", type=class_list, help="labels, such as 207,360")
    add("--vectors", type=vectors, help="conditions: a,b;c,d or an .npy or .npz file of (N, K)")
    add("--per-class", type=count, default=1, help="samples of each class or vector (default 1)")
    add("--count", type=count, help="samples of a model without condition (default 1)")
    add("--quality", choices=PRESETS, help="solver, steps and more where they are not given")
    add("--steps", type=int, help="denoising steps (default 250)")
    add("--spacing", choices=SPACINGS, help="of the timesteps (default uniform)")
    add("--cfg-scale", type=float, help="guidance, 1 is none (default 4 where the model has it)")
    add("--guided-channels", type=int, help="channels guided (default: 3 at most, as published)")
    add("--objective", choices=("diffusion", "flow"), help="default: what the file says, diffusion")
    add("--guidance-interval", type=float, nargs=2, help="of timesteps, or of a flow's time")
    add("--solver", choices=SOLVERS, help="default ddpm; of a flow heun")
    add("--diffusion-form", choices=FORMS, help="of a flow's SDE (default sigma)")
    add("--diffusion-norm", type=float, help="of a flow's SDE (default 1)")
    add("--last-step", choices=("Mean", "Tweedie", "Euler", "none"), help="of an SDE (Mean)")
    add("--last-step-size", type=float, help="of an SDE (default one step's)")
    add("--eta", type=float, default=0.0, help="DDIM's noise (default 0)")
    add("--seed", type=int, default=0, help="default 0")
    add("--batch-size", type=count, help="samples at once (default: all, as published)")
    add("--vae", default=VAE, help=f"folder or hub id of the decoder, or 'none' (default {VAE})")
    add("--quantize", help="of the products on a CPU, such as int8 (default: none)")
    add("--out", type=Path, default=Path("samples.png"), help=".png, .npz, .npy or .wav")
    add("--rate", type=int, default=16000, help="samples a second of a .wav (default 16000)")
    trace = Path("fastdit-trace.json")
    add("--profile", type=Path, nargs="?", const=trace, help="tell where the time goes; its trace")
    add("--device", default=None, help="default: the accelerator, else the CPU")
    add("--dtype", choices=DTYPES, default="fp32", help="default fp32")
    add("--backend", choices=backends.BACKENDS, default="auto", help="default auto")


def load(ckpt: str, device: str | None, dtype: str):
    """The checkpoint's model, on the device, ready to sample."""
    from fastdit.checkpoint import load_model

    device = device or backends.devices()[-1]
    return load_model(located(ckpt), device=device, dtype=DTYPES[dtype])


def located(ckpt: str) -> str | Path:
    """The path of a shipped model's name; any other as it is."""
    from fastdit.digits import weights_path

    shipped = {"digits": "diffusion", "digits-flow": "flow"}
    return weights_path(shipped[ckpt]) if ckpt in shipped else ckpt


def transport_of(ckpt: str, objective: str | None) -> Transport | None:
    """The flow that the checkpoint was trained with; None samples a diffusion.

    SiT's checkpoints do not say that they are flows: `objective="flow"` takes SiT's defaults.
    """
    if objective == "diffusion":
        return None
    found = load_transport(located(ckpt))
    return create_transport() if found is None and objective == "flow" else found


def load_vae(name: str, device: torch.device):
    """The Stable Diffusion decoder of `name`, a folder or hub id."""
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise SystemExit(
            "--vae: decoding latents needs diffusers: pip install 'fastdit[vae]', "
            "or pass --vae none to write the latents"
        ) from None
    try:
        return AutoencoderKL.from_pretrained(name).to(device).eval()
    except OSError as error:
        raise SystemExit(
            f"--vae: could not load {name!r} ({error}); pass a local folder, or none"
        ) from None


@torch.no_grad()
def decode(vae, latents: Tensor) -> Tensor:
    """Latents as images in [-1, 1], one at a time: the decoder needs 3 GB for a 512-pixel image."""
    rows = (latents.to(next(vae.parameters())) / LATENT_SCALE).split(1)
    return torch.cat([vae.decode(row).sample for row in rows])


def chosen_conditions(args: argparse.Namespace, model: DiT) -> Tensor:
    """Each sample's label `(N,)`, or its vector `(N, K)`; 0 of a model without condition."""
    width = model.design.condition_dim
    if width:
        if args.classes is not None or args.count is not None:
            raise SystemExit("--classes, --count: the model takes vectors; say --vectors")
        if args.vectors is None:
            raise SystemExit(f"--vectors: got none, allowed are vectors of {width} numbers")
        if args.vectors.shape[1] != width:
            got = f"vectors of {args.vectors.shape[1]} numbers"
            raise SystemExit(f"--vectors: got {got}, allowed are vectors of {width}")
        return args.vectors.repeat_interleave(args.per_class, 0)
    if args.vectors is not None:
        raise SystemExit("--vectors: the model takes none")
    if model.y_embedder is None:
        if args.classes is not None or args.per_class != 1:
            raise SystemExit("--classes: the model has none; --count says how many samples")
        return torch.zeros(1 if args.count is None else args.count, dtype=torch.int64)
    if args.count is not None:
        raise SystemExit("--count: the model has classes; say --classes and --per-class")
    if args.classes is None:
        raise SystemExit(f"--classes: got none, allowed are labels 0 to {model.num_classes - 1}")
    return torch.tensor(args.classes).repeat_interleave(args.per_class)


def chosen_solver(args: argparse.Namespace) -> str | SDE | None:
    """The solver, with the options of an SDE that are given."""
    names = ("diffusion_form", "diffusion_norm", "last_step", "last_step_size")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if not given:
        return args.solver
    solver = flow_solvers.SOLVERS.get(args.solver)
    if not isinstance(solver, SDE):
        name = "--" + next(iter(given)).replace("_", "-")
        raise SystemExit(f"{name}: allowed with --solver sde and sde_heun")
    if given.get("last_step") == "none":
        given["last_step"] = None
    return replace(solver, **given)


def described(args: argparse.Namespace, transport: Transport | None) -> str:
    """The sampler, in words."""
    if args.solver == "dopri5":
        return "dopri5"
    chosen = {"solver": "ddpm" if transport is None else "heun", "steps": 250}
    if args.quality is not None:
        chosen |= PRESETS[args.quality]
    return f"{args.solver or chosen['solver']} {args.steps or chosen['steps']} steps"


def kind(model: DiT) -> str:
    """What the model's samples are."""
    if len(model.input_size) == 1:
        return "signals"
    return "images" if model.in_channels in (1, 3) else "latents"


def run(args: argparse.Namespace) -> None:
    """Sample, decode and write."""
    if args.out.suffix not in sample_files.SUFFIXES:
        allowed = "a .png, .npz, .npy or .wav file"
        raise SystemExit(f"--out: got {str(args.out)!r}, allowed is {allowed}")
    console = Console()
    model = load(args.ckpt, args.device, args.dtype)
    transport = transport_of(args.ckpt, args.objective)
    device = next(model.parameters()).device
    what = kind(model)
    raw = what != "latents" or args.vae == "none" or args.out.suffix == ".wav"
    vae = None if raw else load_vae(args.vae, device)
    conditions = chosen_conditions(args, model)
    scale = args.cfg_scale if args.cfg_scale is not None else 4.0 if model.guidable else 1.0
    options = {
        "steps": args.steps,
        "cfg_scale": scale,
        "solver": chosen_solver(args),
        "eta": args.eta,
        "guided_channels": args.guided_channels,
        "clip_denoised": what == "images" and transport is None,
        "transport": transport,
        "guidance_interval": args.guidance_interval,
        "quality": args.quality,
        "spacing": args.spacing,
        "quantize": args.quantize,
    }
    parts = []
    with backends.backend(args.backend):
        for start, given in batches(conditions, args.batch_size):
            classes = len(given) if model.y_embedder is None else given
            part = sample(model, classes, seed=args.seed + start, progress=True, **options)
            parts.append(part if vae is None else decode(vae, part))
    columns = args.per_class if args.per_class > 1 else int(np.ceil(len(conditions) ** 0.5))
    files = sample_files.write(args.out, torch.cat(parts), conditions, columns, args.rate)
    what = "images" if vae is not None else what
    named = str(files[0]) if len(files) == 1 else f"{files[0]} to {files[-1].name}"
    console.print(f"{len(conditions)} {what}, {described(args, transport)} on {device}: {named}")
    if args.profile is not None:
        with backends.backend(args.backend):
            profiled(console, model, classes, options, args.profile)


def batches(conditions: Tensor, size: int | None) -> Iterator[tuple[int, Tensor]]:
    """The conditions, so many at a time, each with the index of its first one."""
    size = size or len(conditions)
    for start in range(0, len(conditions), size):
        yield start, conditions[start : start + size]


def profiled(console: Console, model: DiT, classes: Any, options: dict, trace: Path) -> None:
    """What `fastdit profile` prints, of the last batch's run."""
    from fastdit.commands.profile import show  # which loads models with this command
    from fastdit.profiling import profile

    show(console, profile(Sampler(model, **options), classes, trace), trace)
