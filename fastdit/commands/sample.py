"""`fastdit sample`: pictures from any checkpoint.

The model works on latents if it has four channels: they are decoded by a VAE (`--vae`), or written
as they are (`--vae none`). With one or three channels its samples are the pixels.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from fastdit import backends, images
from fastdit.diffusion import SPACINGS
from fastdit.flow import Transport, create_transport, load_transport
from fastdit.model import DiT
from fastdit.sampler import PRESETS
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add = parser.add_argument
    add("--ckpt", required=True, help="file, folder or hub id; 'digits', 'digits-flow': shipped")
    add("--classes", type=class_list, help="labels, such as 207,360")
    add("--per-class", type=int, default=1, help="samples of each class (default 1)")
    add("--count", type=int, help="samples of a model without classes (default 1)")
    add("--quality", choices=PRESETS, help="solver, steps and more where they are not given")
    add("--steps", type=int, help="denoising steps (default 250)")
    add("--spacing", choices=SPACINGS, help="of the timesteps (default uniform)")
    add("--cfg-scale", type=float, help="guidance, 1 is none (default 4 where the model has it)")
    add("--guided-channels", type=int, help="channels guided (default: 3 at most, as published)")
    add("--objective", choices=("diffusion", "flow"), help="default: what the file says, diffusion")
    add("--guidance-interval", type=float, nargs=2, help="of timesteps, or of a flow's time")
    add("--solver", choices=SOLVERS, help="default ddpm; of a flow heun")
    add("--eta", type=float, default=0.0, help="DDIM's noise (default 0)")
    add("--seed", type=int, default=0, help="default 0")
    add("--batch-size", type=int, help="samples at once (default: all, as published)")
    add("--vae", default=VAE, help=f"folder or hub id of the decoder, or 'none' (default {VAE})")
    add("--quantize", help="of the products on a CPU, such as int8 (default: none)")
    add("--out", type=Path, default=Path("samples.png"), help=".png grid or .npz for evaluation")
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


def write(out: Path, samples: Tensor, labels: list[int], columns: int) -> None:
    """Images to `.png` or `.npz`; undecoded latents to `.npz`, their first channels to `.png`."""
    latents = samples.shape[1] not in (1, 3)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".npz":
        raw = samples.float().permute(0, 2, 3, 1).cpu().numpy() if latents else None
        pixels = images.to_uint8(samples) if raw is None else raw
        images.save_npz(out, pixels, labels)
        return
    shown = samples[:, :3] / samples[:, :3].abs().amax() if latents else samples
    side = max(1, 128 // samples.shape[-1])
    images.grid(images.to_uint8(shown), columns, scale=side).save(out)


def chosen_labels(args: argparse.Namespace, model: DiT) -> list[int]:
    """Each sample's label; 0 for those of a model without classes."""
    if model.design.condition_dim or len(model.input_size) != 2:
        kind = "takes vectors" if model.design.condition_dim else "makes signals"
        raise SystemExit(f"--ckpt: the model {kind}; sample it with fastdit.sample")
    if model.y_embedder is None:
        if args.classes is not None or args.per_class != 1:
            raise SystemExit("--classes: the model has none; --count says how many samples")
        return [0] * (1 if args.count is None else args.count)
    if args.count is not None:
        raise SystemExit("--count: the model has classes; say --classes and --per-class")
    if args.classes is None:
        raise SystemExit(f"--classes: got none, allowed are labels 0 to {model.num_classes - 1}")
    return [label for label in args.classes for _ in range(args.per_class)]


def described(args: argparse.Namespace, transport: Transport | None) -> str:
    """The sampler, in words."""
    chosen = {"solver": "ddpm" if transport is None else "heun", "steps": 250}
    if args.quality is not None:
        chosen |= PRESETS[args.quality]
    return f"{args.solver or chosen['solver']} {args.steps or chosen['steps']} steps"


def run(args: argparse.Namespace) -> None:
    """Sample, decode and write."""
    if args.out.suffix not in (".png", ".npz"):
        raise SystemExit(f"--out: got {str(args.out)!r}, allowed is a .png or an .npz file")
    console = Console()
    model = load(args.ckpt, args.device, args.dtype)
    transport = transport_of(args.ckpt, args.objective)
    device = next(model.parameters()).device
    latent = model.in_channels not in (1, 3)
    vae = load_vae(args.vae, device) if latent and args.vae != "none" else None
    labels = chosen_labels(args, model)
    unlabelled = model.y_embedder is None
    scale = args.cfg_scale if args.cfg_scale is not None else 4.0 if model.guidable else 1.0
    size = args.batch_size or len(labels)
    parts = []
    with backends.backend(args.backend):
        for start in range(0, len(labels), size):
            chunk = labels[start : start + size]
            part = sample(
                model,
                len(chunk) if unlabelled else chunk,
                steps=args.steps,
                cfg_scale=scale,
                solver=args.solver,
                eta=args.eta,
                seed=args.seed + start,
                guided_channels=args.guided_channels,
                clip_denoised=not latent and transport is None,
                progress=True,
                transport=transport,
                guidance_interval=args.guidance_interval,
                quality=args.quality,
                spacing=args.spacing,
                quantize=args.quantize,
            )
            parts.append(part if vae is None else decode(vae, part))
    columns = args.per_class if args.per_class > 1 else int(np.ceil(len(labels) ** 0.5))
    write(args.out, torch.cat(parts), labels, columns)
    what = "latents" if latent and vae is None else "images"
    console.print(f"{len(labels)} {what}, {described(args, transport)} on {device}: {args.out}")
