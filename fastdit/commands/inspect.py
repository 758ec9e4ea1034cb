"""`fastdit inspect`: pictures of what a model sees.

    fastdit inspect --ckpt digits --classes 3 --out attention.png
    fastdit inspect --ckpt digits-flow --classes 3,8 --filmstrip --out film.png

Attention: for one query token, a row of pictures for each block and one for each head, over the
predicted image: the brighter a patch, the more the query looks there. Filmstrip: for each class the
data that the model predicts at steps spread over the run, from noise to the sample.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console

from fastdit import images
from fastdit.checkpoint_files import atomic_write
from fastdit.commands.sample import class_list, load, transport_of
from fastdit.inspection import Frame, attention_maps, trajectory
from fastdit.model import DiT
from fastdit.sampler import DIFFUSION_SOLVERS, FLOW_SOLVERS

SUMMARY = "draw attention maps, or the predicted image step by step"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add = parser.add_argument
    add("--ckpt", default="digits", help="as in sample (default digits)")
    add("--objective", choices=("diffusion", "flow"), help="default: what the file says, diffusion")
    add("--classes", type=class_list, default=[3], help="labels; attention takes the first")
    add("--filmstrip", action="store_true", help="the predicted data over the steps")
    add("--frames", type=int, default=9, help="of a filmstrip (default 9)")
    add("--blocks", type=class_list, help="such as 0,2 (default all)")
    add("--heads", type=class_list, help="such as 0,1 (default all)")
    add("--at", type=float, default=0.5, help="attention when: 0 the start to 1 (default 0.5)")
    add("--query", type=class_list, help="row,column of the query patch (default the centre)")
    add("--steps", type=int, default=25, help="solver steps (default 25)")
    solvers = (*DIFFUSION_SOLVERS, *FLOW_SOLVERS)
    add("--solver", choices=solvers, help="default ddim; of a flow euler")
    add("--cfg-scale", type=float, default=2.0, help="guidance (default 2)")
    add("--seed", type=int, default=0, help="default 0")
    add("--device", default=None, help="default: the accelerator, else the CPU")
    add("--out", type=Path, default=Path("inspect.png"), help="default inspect.png")


def shown(pixels: torch.Tensor) -> torch.Tensor:
    """What can be looked at: pixels as they are, of latents three channels scaled to [-1, 1]."""
    if pixels.shape[1] in (1, 3):
        return pixels
    return pixels[:, :3] / pixels[:, :3].abs().amax().clamp(min=1e-6)


def filmstrip(frames: list[Frame], classes: list[int], count: int):
    """`count` frames spread over the run, the sample last, a row for each class."""
    count = min(count, len(frames))
    chosen = [frames[round(i * (len(frames) - 1) / max(1, count - 1))] for i in range(count)]
    tiles = torch.stack([shown(frame.data) for frame in chosen], 1).flatten(0, 1)
    labels = [f"{frame.time:.0f}" for frame in chosen[:-1]] + ["sample"]
    return images.grid(
        images.to_uint8(tiles),
        count,
        scale=max(1, 64 // tiles.shape[-1]),
        row_labels=[str(label) for label in classes],
        column_labels=labels[-count:],
    )


def _chosen(name: str, given: list[int] | None, count: int) -> list[int]:
    if given is not None and not all(0 <= i < count for i in given):
        raise ValueError(f"--{name}: got {given}, allowed is 0 to {count - 1}")
    return list(range(count)) if given is None else given


def _query(given: list[int] | None, grid: tuple[int, int]) -> tuple[int, int]:
    row, column = (
        (n // 2 for n in grid) if given is None else (given if len(given) == 2 else (-1, -1))
    )
    if not (0 <= row < grid[0] and 0 <= column < grid[1]):
        raise ValueError(f"--query: got {given}, allowed is row,column in {grid[0]}x{grid[1]}")
    return row, column


def attention_figure(
    model: DiT,
    frame: Frame,
    label: int,
    blocks: list[int],
    heads: list[int],
    query: tuple[int, int],
):
    """The maps of one query as a matplotlib figure, all on one scale."""
    try:
        import matplotlib
    except ImportError:
        raise ImportError("attention maps need matplotlib: pip install 'fastdit[train]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    y = None if model.y_embedder is None else torch.full((1,), label, device=frame.x.device)
    maps = attention_maps(model, frame, y)[:, 0]
    rows, columns = model.grid
    token = query[0] * columns + query[1]
    seen = maps[blocks][:, heads, token, : rows * columns].unflatten(-1, (rows, columns))
    picture = images.to_uint8(shown(frame.data))[0]
    height, width = picture.shape[:2]
    size = (1.4 * (len(heads) + 1) + 1.1, 1.4 * len(blocks) + 0.5)
    # Most weights are far below the largest: a root shows them.
    scale = matplotlib.colors.PowerNorm(0.5, 0, float(seen.max()))
    figure, axes = plt.subplots(
        len(blocks), len(heads) + 1, figsize=size, squeeze=False, layout="constrained"
    )
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    for i, block in enumerate(blocks):
        predicted, *others = axes[i]
        predicted.imshow(picture)
        predicted.set_ylabel(f"block {block}")
        for j, head in enumerate(heads):
            heat = others[j].imshow(seen[i, j].numpy(), cmap="magma", extent=extent, norm=scale)
            others[j].contour(picture.mean(-1), levels=[127], colors="white", linewidths=0.7)
            if i == 0:
                others[j].set_title(f"head {head}", fontsize=9)
        for axis in axes[i]:
            patch = (width / columns, height / rows)
            corner = (query[1] * patch[0] - 0.5, query[0] * patch[1] - 0.5)
            axis.add_patch(
                plt.Rectangle(corner, *patch, fill=False, edgecolor="cyan", linewidth=1.5)
            )
            axis.set(xticks=[], yticks=[])
    axes[0][0].set_title("predicted", fontsize=9)
    figure.colorbar(heat, ax=axes, shrink=0.8, label="attention of the marked patch")
    return figure


def run(args: argparse.Namespace) -> None:
    """Sample, look, and write the picture."""
    if args.out.suffix != ".png":
        raise ValueError(f"--out: got {str(args.out)!r}, allowed is a .png file")
    if not 0 <= args.at <= 1:
        raise ValueError(f"--at: got {args.at}, allowed is 0 to 1")
    if args.frames < 1:
        raise ValueError(f"--frames: got {args.frames}, allowed is 1 or more")
    model = load(args.ckpt, args.device, "fp32")
    transport = transport_of(args.ckpt, args.objective)
    if len(model.grid) != 2 or model.design.condition_dim:
        raise ValueError("--ckpt: got a model of signals or of vectors, allowed is one of images")
    blocks = _chosen("blocks", args.blocks, len(model.blocks))
    heads = _chosen("heads", args.heads, model.num_heads)
    query = _query(args.query, model.grid)
    frames = trajectory(
        model,
        args.classes if model.y_embedder is not None else len(args.classes),
        steps=args.steps,
        solver=args.solver or ("ddim" if transport is None else "euler"),
        cfg_scale=args.cfg_scale if model.guidable else 1.0,
        seed=args.seed,
        clip_denoised=transport is None and model.in_channels in (1, 3),
        transport=transport,
    )
    if args.filmstrip:
        picture = filmstrip(frames, args.classes, args.frames)
        images.save(picture, args.out)
    else:
        frame = frames[round(args.at * (len(frames) - 2))]
        first = Frame(frame.time, frame.x[:1], frame.data[:1])
        figure = attention_figure(model, first, args.classes[0], blocks, heads, query)
        atomic_write(args.out, lambda path: figure.savefig(path, format="png", dpi=120))
    Console().print(f"wrote {args.out}")
