"""DiT: a Transformer that denoises latents (Peebles & Xie 2022), thin over fastdit's ops.

With c the sum of the embedded timestep and label, each block is

    shift₁, scale₁, gate₁, shift₂, scale₂, gate₂ = Linear(SiLU(c))
    x += gate₁·attention(LN(x)·(1 + scale₁) + shift₁)
    x += gate₂·mlp(LN(x)·(1 + scale₂) + shift₂)

Parameters, their names and their initialisation are the published ones, so published checkpoints
load as they are. `fastdit.designs` has what may be chosen otherwise, `fastdit.blocks` the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastdit import modulation, ops, positions, sizes
from fastdit.blocks import DiTBlock, FinalLayer, PatchEmbed
from fastdit.designs import Named, design_of
from fastdit.embeddings import LabelEmbedder, TimestepEmbedder, VectorEmbedder
from fastdit.flops import multiply_adds
from fastdit.ops._checks import fail
from fastdit.sizes import SIZES


class DiT(nn.Module):
    """Diffusion Transformer, by default with adaLN-Zero blocks.

    Args:
        input_size: height and width of the latent, or `(length,)` of a signal; an int is a square.
        patch_size: side of a patch, or its side along each axis; divides `input_size`.
        in_channels: channels of the latent.
        hidden_size: width D of the tokens; a multiple of `num_heads`, and of 4 for the positions.
        depth: blocks.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP over D.
        class_dropout_prob: share of labels dropped in training; 0 builds no null class.
        num_classes: labels are 0 to num_classes - 1; num_classes itself is the null class. 0 is a
            model without labels.
        learn_sigma: also predict the variance, in a second half of the output channels.
        **design: the fields of `fastdit.designs.Design`: `conditioning`, `positions`, `rope`,
            `norm`, `qk_norm`, `mlp` and more.

    Attributes:
        config: the arguments, as a checkpoint keeps them; of `design` what is not the default.
        design: the `Design`; `design.options()` is empty for a published model.

    Raises:
        TypeError: an argument that there is not.
        ValueError: an argument that does not fit, which is named.
    """

    def __init__(
        self,
        input_size: int | tuple[int, ...] = 32,
        patch_size: int | tuple[int, ...] = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        **design: Any,
    ) -> None:
        super().__init__()
        self.input_size, self.patch = sizes.input_and_patch(input_size, patch_size)
        if len(self.input_size) == 1:
            design = {"positions": "sincos_1d", **design}
        self.design = design_of(design)
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
            **self.design.options(),
        }
        sizes.check_config(self.config, self.design)
        self.grid = sizes.grid(self.input_size, self.patch)
        self.learn_sigma = learn_sigma
        self.in_channels = in_channels
        self.out_channels = in_channels * 2 if learn_sigma else in_channels
        self.patch_size = patch_size
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.num_classes = num_classes
        self.gradient_checkpointing = False

        self.x_embedder = PatchEmbed(self.patch, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size, self.design.frequency_dim)
        self.y_embedder: LabelEmbedder | VectorEmbedder | None = None
        if num_classes:
            self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        elif self.design.condition_dim:
            width = self.design.condition_dim
            self.y_embedder = VectorEmbedder(width, hidden_size, class_dropout_prob)
        sources = 1 if self.y_embedder is None else 2
        in_context = self.design.conditioning == "in_context"
        self.context_width = sources * hidden_size if in_context else 0
        positions.add(self)
        self.blocks = nn.ModuleList(
            DiTBlock(hidden_size, num_heads, mlp_ratio, self.design, sources) for _ in range(depth)
        )
        self.final_layer = FinalLayer(
            hidden_size, self.patch, self.out_channels, self.design, sources
        )
        layers = (*self.blocks, self.final_layer)
        self.rows_widths = [self.context_width, *(layer.rows_width for layer in layers)]
        self.initialize_weights()
        self._pack()
        self.register_load_state_dict_post_hook(_pack_loaded)  # assign=True replaces parameters

    def initialize_weights(self) -> None:
        """The published initialisation: the model starts as the zero function, each modulated
        block as the identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        positions.initialize(self)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.hidden_size, -1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        if isinstance(self.y_embedder, LabelEmbedder):
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for embedder in (self.t_embedder, self.y_embedder):
            if isinstance(embedder, TimestepEmbedder | VectorEmbedder):
                nn.init.normal_(embedder.mlp[0].weight, std=0.02)
                nn.init.normal_(embedder.mlp[2].weight, std=0.02)
        for layer in (*self.blocks, self.final_layer):
            layer.initialize_modulation()
        nn.init.zeros_(self.final_layer.linear.weight)

    def unpatchify(self, x: Tensor, grid: tuple[int, ...] | None = None) -> Tensor:
        """`(B, T, prod(patch)·C)` rows as `(B, C, *size)`; by default of the model's own grid."""
        return ops.unpatchify(x, self.patch, grid or self.grid, self.out_channels)

    def condition(
        self, t: Tensor, y: Tensor | None = None, force_drop_ids: Tensor | None = None
    ) -> Tensor:
        """`(B,)` timesteps and labels as the condition c of every block: `(B, D)`; `(B, 2·D)` where
        they are joined, `(B, 2, D)` where they are a sequence (1 for 2 without labels)."""
        embedded = [self.t_embedder(t)]
        if self.y_embedder is not None:
            embedded.append(self.y_embedder(y, self.training, force_drop_ids))
        elif force_drop_ids is not None:
            fail("force_drop_ids", "a tensor", "None in a model without y")
        if not self.design.modulated:
            return torch.stack(embedded, dim=1)
        if self.design.condition_fusion == "concat":
            return torch.cat(embedded, dim=1)
        return embedded[0] if len(embedded) == 1 else embedded[0] + embedded[1]

    @property
    def guidable(self) -> bool:
        """Whether the model knows what no condition is, and so can be guided."""
        return self.y_embedder is not None and self.y_embedder.dropout_prob > 0

    def null_condition(self, batch: int) -> Tensor:
        """The y of `batch` samples without a condition: `(B,)`, or `(B, condition_dim)` vectors.

        Raises:
            ValueError: the model has none.
        """
        if not self.guidable:
            what = "without y" if self.y_embedder is None else "with class_dropout_prob=0"
            fail("null_condition", f"a model {what}", "one with y and class_dropout_prob > 0")
        if isinstance(self.y_embedder, VectorEmbedder):
            return self.y_embedder.null.detach().expand(batch, -1)
        device = self.y_embedder.embedding_table.weight.device
        return torch.full((batch,), self.num_classes, device=device)

    def conditioning(
        self, t: Tensor, y: Tensor | None = None, force_drop_ids: Tensor | None = None
    ) -> Tensor:
        """All that x has no part in, `(B, W)`: every layer's modulations, `(6·depth + 2)·D` of them
        in the published design; cross-attention's keys and values; in-context tokens.

        A sampler computes its schedule's rows in one call (one product, see `fastdit.modulation`)
        and gives each step its own: `model(x, None, None, conditioning=rows)`.
        """
        c = self.condition(t, y, force_drop_ids)
        if self.design.modulated:
            return modulation.rows(self._modulations(), c)
        if self.context_width:
            return c.flatten(1)
        return torch.cat([block.rows(c) for block in self.blocks] or [c.flatten(1)[:, :0]], dim=1)

    def forward(
        self,
        x: Tensor,
        t: Tensor | None,
        y: Tensor | None = None,
        force_drop_ids: Tensor | None = None,
        *,
        conditioning: Tensor | None = None,
    ) -> Tensor:
        """Predict the noise in `x`, and with `learn_sigma` its variance.

        Args:
            x: `(B, C, H, W)` noised latents, or `(B, C, L)` signals, of the model's `input_size`;
                with `any_size`, of any size that the patch divides.
            t: `(B,)` timesteps, 0 to 999.
            y: `(B,)` int64 labels; `num_classes` is the null class. `(B, condition_dim)` vectors in
                a model of these, None in one without condition.
            force_drop_ids: `(B,)`; 1 drops that label, whatever the dropout.
            conditioning: rows that `model.conditioning` gave for these t and y, which are then
                not read and may be None.

        Returns:
            `(B, out_channels, *size)`.

        Raises:
            TypeError, ValueError: an argument is no tensor, or of another shape, dtype or device.
            IndexError: a label that the model does not have, on a CPU.
        """
        grid = sizes.check_inputs(self, x, t, y, conditioning)
        c = None
        if conditioning is None and self._packed():
            conditioning = self.conditioning(t, y, force_drop_ids)
        if conditioning is None:
            c = self.condition(t, y, force_drop_ids)
        context, *per_block, last = self._split(conditioning)
        x = self.x_embedder(x, positions.table_for(self, grid))
        tokens, extra = x.shape[1], 0
        if self.context_width:
            context = c if context is None else context.unflatten(1, (-1, self.hidden_size))
            x, extra = torch.cat([x, context.to(x.dtype)], dim=1), context.shape[1]
        rope = None if self.feat_rope is None else self.feat_rope(grid, extra)
        pending = None
        for block, own in zip(self.blocks, per_block, strict=True):
            args = (x, c, pending, True, own, rope)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x, pending = checkpoint(block, *args, use_reentrant=False)
            else:
                x, pending = block(*args)
        return self.unpatchify(self.final_layer(x, c, pending, last)[:, :tokens], grid)

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
            fail("guided_channels", guided_channels, f"0 to {self.out_channels}")
        if len(x) % 2:
            fail("x", f"{len(x)} rows", "an even number (labels, then nulls)")
        half = x[: len(x) // 2]
        out = self.forward(torch.cat([half, half]), t, y, conditioning=conditioning)
        eps, rest = out[:, :guided_channels], out[:, guided_channels:]
        cond, null = eps.chunk(2)
        guided = null + cfg_scale * (cond - null)
        return torch.cat([torch.cat([guided, guided]), rest], dim=1)

    def flops(self, input_size: int | tuple[int, ...] | None = None) -> int:
        """Multiply-adds of one sample's forward, as the paper counts its Gflops.

        Args:
            input_size: of the sample; None is the model's.
        """
        return multiply_adds(self, input_size)

    def set_input_size(self, input_size: int | tuple[int, ...]) -> DiT:
        """Make `input_size` the model's, in place, for sampling or fine-tuning; returns the model.

        Computed positions become those of the new grid, as `position_scaling` says. Learned ones
        stay the parameters they are, and are resampled in every forward.

        Raises:
            ValueError: the patch does not divide it.
        """
        positions.resize(self, input_size)
        return self

    def _modulations(self) -> list[nn.Module]:
        layers = (*self.blocks, self.final_layer)
        return [layer.adaLN_modulation for layer in layers] if self.design.modulated else []

    def _packed(self) -> bool:
        return self.design.modulated and modulation.packed(self._modulations())

    def _split(self, conditioning: Tensor | None) -> Sequence[Tensor | None]:
        """The context's and each layer's columns of the conditioning rows, as views."""
        if conditioning is None:
            return [None] * len(self.rows_widths)
        return conditioning.split(self.rows_widths, dim=1)

    def _pack(self) -> None:
        if self.design.modulated:
            modulation.pack(self._modulations())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DiT:
        super()._apply(fn, recurse)  # .to(), .half() and the like move each parameter by itself
        self._pack()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # of a deep copy, whose parameters were cloned one by one
        self._pack()


def _pack_loaded(model: DiT, _incompatible_keys: Any) -> None:
    model._pack()


def _build(depth: int, hidden_size: int, num_heads: int, patch_size: int, **kwargs: Any) -> DiT:
    sized = {"depth": depth, "hidden_size": hidden_size, "num_heads": num_heads}
    return DiT(**{**sized, "patch_size": patch_size, **kwargs})


DiT_models = Named(
    "DiT_models",
    {
        f"DiT-{size}/{patch}": partial(_build, *shape, patch)
        for size, shape in reversed(SIZES.items())
        for patch in (2, 4, 8)
    },
)
"""The twelve published models by name: `DiT_models["DiT-XL/2"](input_size=32)`."""
