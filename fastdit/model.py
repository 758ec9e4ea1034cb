"""DiT: a Transformer that denoises latents (Peebles & Xie 2022), thin over fastdit's ops.

With c the sum of the embedded timestep and label, each block is

    shift₁, scale₁, gate₁, shift₂, scale₂, gate₂ = Linear(SiLU(c))
    x += gate₁·attention(LN(x)·(1 + scale₁) + shift₁)
    x += gate₂·mlp(LN(x)·(1 + scale₂) + shift₂)

A block hands its last branch on unadded, so that one `gated_adaln` both ends it and begins the
next: between two matrix products the residual stream is read and written once. Parameters, their
names and their initialisation are the published ones, so published checkpoints load as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastdit import modulation, ops
from fastdit.embeddings import LabelEmbedder, TimestepEmbedder, sincos_2d

Branch = tuple[Tensor, Tensor]
"""What a block leaves to be added: a branch's output `(B, N, D)` and its gate `(B, D)`."""

EPS = 1e-6


class PatchEmbed(nn.Module):
    """Patches to tokens; holds the convolution `proj` whose weights the checkpoints name."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x: Tensor, pos: Tensor | None = None) -> Tensor:
        return ops.patch_embed(x, self.proj.weight, self.proj.bias, pos)


class Attention(nn.Module):
    """Multi-head self-attention with one packed projection."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(ops.attention(self.qkv(x), self.num_heads))


class Mlp(nn.Module):
    """Two Linears around a tanh-GELU; the first one's bias is added by the GELU's kernel."""

    def __init__(self, hidden_size: int, mlp_hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, mlp_hidden)
        self.fc2 = nn.Linear(mlp_hidden, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(ops.bias_gelu(F.linear(x, self.fc1.weight), self.fc1.bias))


def _modulated(x: Tensor, pending: Branch | None, shift: Tensor, scale: Tensor) -> Branch:
    """The stream with the pending branch added, and its modulated normalisation."""
    if pending is None:
        return x, ops.adaln(x, shift, scale, EPS)
    return ops.gated_adaln(x, *pending, shift, scale, EPS)


class DiTBlock(nn.Module):
    """A Transformer block conditioned by adaLN-Zero."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.attn = Attention(hidden_size, num_heads)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(
        self,
        x: Tensor,
        c: Tensor | None,
        pending: Branch | None = None,
        defer: bool = False,
        modulations: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Branch]:
        """One block.

        Args:
            x: `(B, N, D)` tokens.
            c: `(B, D)` condition.
            pending: the branch that the block before left to be added to `x`.
            defer: leave this block's last branch to the next.
            modulations: `(B, 6·D)`, this block's, where they are known already; `c` is not read.

        Returns:
            `(B, N, D)`; with `defer`, that without the last branch, and the branch.
        """
        modulations = self.adaLN_modulation(c) if modulations is None else modulations
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulations.chunk(6, dim=1)
        x, normed = _modulated(x, pending, shift_msa, scale_msa)
        x, normed = _modulated(x, (self.attn(normed), gate_msa), shift_mlp, scale_mlp)
        last = (self.mlp(normed), gate_mlp)
        return (x, last) if defer else ops.gated_residual(x, *last)


class FinalLayer(nn.Module):
    """A modulated normalisation and the Linear that turns tokens into rows of pixels."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(
        self,
        x: Tensor,
        c: Tensor | None,
        pending: Branch | None = None,
        modulations: Tensor | None = None,
    ) -> Tensor:
        modulations = self.adaLN_modulation(c) if modulations is None else modulations
        shift, scale = modulations.chunk(2, dim=1)
        return self.linear(_modulated(x, pending, shift, scale)[1])


def _pair(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(isinstance(n, int) and n > 0 for n in pair):
        raise ValueError(f"{name}: got {value!r}, allowed is a positive int or two of them")
    return pair


class DiT(nn.Module):
    """Diffusion Transformer with adaLN-Zero blocks.

    Args:
        input_size: height and width of the latent; an int is a square.
        patch_size: side of a patch; divides `input_size`.
        in_channels: channels of the latent.
        hidden_size: width D of the tokens; a multiple of 4 and of `num_heads`.
        depth: blocks.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP over D.
        class_dropout_prob: share of labels dropped in training; 0 builds no null class.
        num_classes: labels are 0 to num_classes - 1; num_classes itself is the null class.
        learn_sigma: also predict the variance, in a second half of the output channels.

    Raises:
        ValueError: an argument that does not fit, which is named.
    """

    def __init__(
        self,
        input_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "input_size": input_size,
            "patch_size": patch_size,
            "in_channels": in_channels,
            "hidden_size": hidden_size,
            "depth": depth,
            "num_heads": num_heads,
            "mlp_ratio": mlp_ratio,
            "class_dropout_prob": class_dropout_prob,
            "num_classes": num_classes,
            "learn_sigma": learn_sigma,
        }
        _check_config(self.config)
        self.input_size = _pair("input_size", input_size)
        height, width = self.input_size
        self.grid = (height // patch_size, width // patch_size)
        self.learn_sigma = learn_sigma
        self.in_channels = in_channels
        self.out_channels = in_channels * 2 if learn_sigma else in_channels
        self.patch_size = patch_size
        self.num_heads = num_heads
        self.num_classes = num_classes
        self.gradient_checkpointing = False

        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        tokens = self.grid[0] * self.grid[1]
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, hidden_size), requires_grad=False)
        self.blocks = nn.ModuleList(
            DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth)
        )
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self.initialize_weights()
        self._pack()
        self.register_load_state_dict_post_hook(_pack_loaded)  # assign=True replaces parameters

    def initialize_weights(self) -> None:
        """The published initialisation: the model starts as the zero function, each block as the
        identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        with torch.no_grad():
            pos = sincos_2d(self.pos_embed.shape[-1], self.grid)
            self.pos_embed.copy_(torch.from_numpy(pos).float().unsqueeze(0))
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.pos_embed.shape[-1], -1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        for layer in (*self.blocks, self.final_layer):
            nn.init.zeros_(layer.adaLN_modulation[-1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def unpatchify(self, x: Tensor) -> Tensor:
        """`(B, T, patch²·C)` rows as `(B, C, H, W)`."""
        return ops.unpatchify(x, self.patch_size, self.grid, self.out_channels)

    def condition(self, t: Tensor, y: Tensor, force_drop_ids: Tensor | None = None) -> Tensor:
        """`(B,)` timesteps and labels as the condition c `(B, D)` of every block."""
        return self.t_embedder(t) + self.y_embedder(y, self.training, force_drop_ids)

    def conditioning(self, t: Tensor, y: Tensor, force_drop_ids: Tensor | None = None) -> Tensor:
        """All that x has no part in: every layer's modulations, `(B, (6·depth + 2)·D)`.

        A sampler computes the rows of its whole schedule in one call and hands each step its own:
        `model(x, None, None, conditioning=rows)`. Without gradients the rows are one product
        (`fastdit.modulation`).
        """
        c = self.condition(t, y, force_drop_ids)
        return modulation.rows(self._modulations(), c)

    def forward(
        self,
        x: Tensor,
        t: Tensor | None,
        y: Tensor | None,
        force_drop_ids: Tensor | None = None,
        *,
        conditioning: Tensor | None = None,
    ) -> Tensor:
        """Predict the noise in `x`, and with `learn_sigma` its variance.

        Args:
            x: `(B, C, H, W)` noised latents of the model's `input_size`.
            t: `(B,)` timesteps, 0 to 999.
            y: `(B,)` int64 labels; `num_classes` is the null class.
            force_drop_ids: `(B,)`; 1 drops that label, whatever the dropout.
            conditioning: rows that `model.conditioning` gave for these t and y, which are then
                not read and may be None.

        Returns:
            `(B, out_channels, H, W)`.

        Raises:
            ValueError: `x`, `t`, `y` or `conditioning` has another shape.
        """
        self._check_inputs(x, t, y, conditioning)
        c = None
        if conditioning is None and modulation.packed(self._modulations()):
            conditioning = self.conditioning(t, y, force_drop_ids)
        if conditioning is None:
            c = self.condition(t, y, force_drop_ids)
        *per_block, last = self._split(conditioning)
        x = self.x_embedder(x, self.pos_embed)
        pending = None
        for block, own in zip(self.blocks, per_block, strict=True):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x, pending = checkpoint(block, x, c, pending, True, own, use_reentrant=False)
            else:
                x, pending = block(x, c, pending, True, own)
        return self.unpatchify(self.final_layer(x, c, pending, last))

    def forward_with_cfg(
        self,
        x: Tensor,
        t: Tensor | None,
        y: Tensor | None,
        cfg_scale: float,
        guided_channels: int = 3,
        *,
        conditioning: Tensor | None = None,
    ) -> Tensor:
        """`forward` with classifier-free guidance u + s·(c - u), for a sampler that keeps 2B rows.

        Args:
            x, t, y: 2B rows; `y` is labels, then nulls. Only the first half of `x` is used, for
                both, as published.
            cfg_scale: s; 1 is no guidance.
            guided_channels: how many of the output's first channels are guided; the rest stay
                unguided. The published code guides 3 of the 4 latent channels, and its reported
                figures depend on it; `model.in_channels` guides them all.
            conditioning: as in `forward`, 2B rows.

        Returns:
            `(2B, out_channels, H, W)`, the guided channels equal in both halves.
        """
        if not 0 <= guided_channels <= self.out_channels and guided_channels != 3:
            raise ValueError(
                f"guided_channels: got {guided_channels}, allowed is 0 to {self.out_channels}"
            )
        if len(x) % 2:
            raise ValueError(
                f"x: got {len(x)} rows, allowed is an even number (labels, then nulls)"
            )
        half = x[: len(x) // 2]
        out = self.forward(torch.cat([half, half]), t, y, conditioning=conditioning)
        eps, rest = out[:, :guided_channels], out[:, guided_channels:]
        cond, null = eps.chunk(2)
        guided = null + cfg_scale * (cond - null)
        return torch.cat([torch.cat([guided, guided]), rest], dim=1)

    def _modulations(self) -> list[nn.Module]:
        return [layer.adaLN_modulation for layer in (*self.blocks, self.final_layer)]

    def _split(self, conditioning: Tensor | None) -> Sequence[Tensor | None]:
        """Each layer's columns of the conditioning rows, as views."""
        if conditioning is None:
            return [None] * (len(self.blocks) + 1)
        width = self.pos_embed.shape[-1]
        return conditioning.split([6 * width] * len(self.blocks) + [2 * width], dim=1)

    def _pack(self) -> None:
        modulation.pack(self._modulations())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DiT:
        super()._apply(fn, recurse)  # .to(), .half() and the like move each parameter by itself
        self._pack()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # of a deep copy, whose parameters were cloned one by one
        self._pack()

    def _check_inputs(
        self, x: Tensor, t: Tensor | None, y: Tensor | None, conditioning: Tensor | None
    ) -> None:
        shape = (self.in_channels, *self.input_size)
        if x.dim() != 4 or tuple(x.shape[1:]) != shape:
            raise ValueError(
                f"x: got {tuple(x.shape)}, allowed is (B, {', '.join(map(str, shape))})"
            )
        if conditioning is not None:
            wanted = (x.shape[0], (6 * len(self.blocks) + 2) * self.pos_embed.shape[-1])
            if tuple(conditioning.shape) != wanted:
                raise ValueError(
                    f"conditioning: got {tuple(conditioning.shape)}, allowed is {wanted}"
                )
            return
        for name, value in (("t", t), ("y", y)):
            if value is None or value.shape != x.shape[:1]:
                got = None if value is None else tuple(value.shape)
                raise ValueError(f"{name}: got {got}, allowed is ({x.shape[0]},)")


def _pack_loaded(model: DiT, _incompatible_keys: Any) -> None:
    model._pack()


def _check_config(config: dict[str, Any]) -> None:
    for name in ("patch_size", "in_channels", "hidden_size", "num_heads", "num_classes"):
        if not isinstance(config[name], int) or config[name] < 1:
            raise ValueError(f"{name}: got {config[name]!r}, allowed is a positive int")
    if not isinstance(config["depth"], int) or config["depth"] < 0:
        raise ValueError(f"depth: got {config['depth']!r}, allowed is an int >= 0")
    if config["hidden_size"] % config["num_heads"]:
        raise ValueError(
            f"num_heads: got {config['num_heads']}, allowed is a divisor of "
            f"hidden_size = {config['hidden_size']}"
        )
    for size in _pair("input_size", config["input_size"]):
        if size % config["patch_size"]:
            raise ValueError(
                f"patch_size: got {config['patch_size']}, allowed is a divisor of "
                f"input_size = {config['input_size']}"
            )
    if not 0 <= config["class_dropout_prob"] <= 1:
        raise ValueError(
            f"class_dropout_prob: got {config['class_dropout_prob']!r}, allowed is 0 to 1"
        )


SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
"""Depth, width and heads of the paper's four sizes (Peebles & Xie 2022, table 1)."""


def _build(depth: int, hidden_size: int, num_heads: int, patch_size: int, **kwargs: Any) -> DiT:
    sized = {"depth": depth, "hidden_size": hidden_size, "num_heads": num_heads}
    return DiT(**{**sized, "patch_size": patch_size, **kwargs})


DiT_models = {
    f"DiT-{size}/{patch}": partial(_build, *shape, patch)
    for size, shape in reversed(SIZES.items())
    for patch in (2, 4, 8)
}
"""The twelve published models by name: `DiT_models["DiT-XL/2"](input_size=32)`."""
