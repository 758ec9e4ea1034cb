"""A DiT's weights as the native forward takes them, and whether they are still the model's.

Packing knows one design, the published one, of plain modules that nobody watches: `Packed` raises
`Unfit` with the reason for any other. `Watch` then tells at each call, in some 20 µs, whether
anything has changed that the packed copy depends on.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module

from fastdit import embeddings, model


class Unfit(Exception):
    """Why the native forward cannot stand for a model."""


def _linears(dit: nn.Module) -> Iterator[nn.Linear]:
    for block in dit.blocks:
        yield from (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
    yield dit.final_layer.linear


_TYPES = {
    "x_embedder": model.PatchEmbed,
    "x_embedder.proj": nn.Conv2d,
    "t_embedder": embeddings.TimestepEmbedder,
    "t_embedder.mlp": nn.Sequential,
    "t_embedder.mlp.0": nn.Linear,
    "t_embedder.mlp.1": nn.SiLU,
    "t_embedder.mlp.2": nn.Linear,
    "y_embedder": embeddings.LabelEmbedder,
    "y_embedder.embedding_table": nn.Embedding,
    "blocks": nn.ModuleList,
    "final_layer": model.FinalLayer,
    "final_layer.linear": nn.Linear,
    "final_layer.adaLN_modulation": nn.Sequential,
    "final_layer.adaLN_modulation.0": nn.SiLU,
    "final_layer.adaLN_modulation.1": nn.Linear,
}
_BLOCK_TYPES = {
    "": model.DiTBlock,
    ".attn": model.Attention,
    ".attn.qkv": nn.Linear,
    ".attn.proj": nn.Linear,
    ".mlp": model.Mlp,
    ".mlp.fc1": nn.Linear,
    ".mlp.fc2": nn.Linear,
    ".adaLN_modulation": nn.Sequential,
    ".adaLN_modulation.0": nn.SiLU,
    ".adaLN_modulation.1": nn.Linear,
}


_PUBLISHED = (
    "input_size",
    "patch_size",
    "in_channels",
    "hidden_size",
    "depth",
    "num_heads",
    "mlp_ratio",
    "class_dropout_prob",
    "num_classes",
    "learn_sigma",
)


def _check_design(dit: nn.Module) -> None:
    """Raise `Unfit` unless `dit` is a `fastdit.DiT` of the published design, unwatched."""
    if type(dit) is not model.DiT:
        raise Unfit(f"the model is a {type(dit).__name__}, not a fastdit.DiT")
    for name, parameter in inspect.signature(model.DiT.__init__).parameters.items():
        published = name in _PUBLISHED or name == "self" or name not in dit.config
        if not published and dit.config[name] != parameter.default:
            raise Unfit(f"{name} is {dit.config[name]!r}; it knows the published design alone")
    wanted = {"": model.DiT, **_TYPES}
    for index in range(len(dit.blocks)):
        wanted |= {f"blocks.{index}{name}": kind for name, kind in _BLOCK_TYPES.items()}
    for name, module in dit.named_modules(remove_duplicate=False):
        kind = wanted.pop(name, None)
        if type(module) is not kind:
            raise Unfit(f"{name} is a {type(module).__name__}, which it does not know")
        if "forward" in vars(module):
            raise Unfit(f"{name or 'the model'} has a forward of its own")
    if wanted:
        raise Unfit(f"{next(iter(wanted))} is missing")


def _check_parameters(dit: nn.Module) -> None:
    for name, parameter in dit.named_parameters():
        if parameter.device.type != "cpu":
            raise Unfit(f"{name} is on {parameter.device}")
        if parameter.dtype != torch.float32:
            raise Unfit(f"{name} is {parameter.dtype}; it computes in float32")
        if type(parameter) is not nn.Parameter or parameter.is_inference():
            raise Unfit(f"{name} is not a plain parameter that counts its changes")
    for name, module in dit.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is None:
            raise Unfit(f"{name} has no bias")
    if any(block.attn.num_heads != dit.num_heads for block in dit.blocks):
        raise Unfit("its blocks differ in their heads")


class Watch:
    """Everything that a packed copy depends on, and whether it is still so.

    A parameter changes by an operation in place (its version), by `.data =` or `.to()` (its
    address), or by being replaced; a module by being replaced, hooked or given another forward.
    """

    def __init__(self, dit: nn.Module) -> None:
        modules = list(dit.modules())
        self.entries = [
            (owner, name, value)
            for module in modules
            for owner in (module._modules, module._parameters)
            for name, value in owner.items()
        ]
        self.parameters = list(dit.parameters())
        self.contents = self._contents()
        self.hooks = [
            hooks
            for module in modules
            for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]
        self.instances = [vars(module) for module in modules]
        self.blocks, self.depth = dit.blocks._modules, len(dit.blocks)

    def _contents(self) -> list[int]:
        found = [p._version for p in self.parameters]
        found += [p.data_ptr() for p in self.parameters]
        return found

    def hooked(self) -> bool:
        return any(self.hooks) or bool(
            _module._global_forward_hooks or _module._global_forward_pre_hooks
        )

    def same(self) -> bool:
        for owner, name, value in self.entries:
            if owner.get(name) is not value:
                return False
        for instance in self.instances:
            if "forward" in instance:
                return False
        return len(self.blocks) == self.depth and self.contents == self._contents()


class Packed:
    """A model's weights as the library takes them; they are those of the moment it was made."""

    def __init__(self, dit: nn.Module) -> None:
        _check_design(dit)
        _check_parameters(dit)
        self.watch = Watch(dit)
        ops = torch.ops.fastdit_native
        self.current_isa = ops.cpu_isa
        self.isa = self.current_isa()
        width = dit.pos_embed.shape[-1]
        mlp = dit.blocks[0].mlp.fc1.out_features if len(dit.blocks) else width
        sizes = (dit.in_channels, *dit.input_size, dit.patch_size, width, len(dit.blocks))
        self.dit = [*sizes, dit.num_heads, mlp, dit.out_channels]
        patch = dit.x_embedder.proj
        parameters = [patch.weight.reshape(width, -1), patch.bias, dit.pos_embed[0]]
        for linear in _linears(dit):
            parameters += [linear.weight, linear.bias]
        self.weights = ops.forward_pack([p.detach().contiguous() for p in parameters], self.dit)
        self._conditioning(dit)
        self.workspaces: dict[int, Tensor] = {}

    def _conditioning(self, dit: nn.Module) -> None:
        half = dit.t_embedder.frequency_embedding_size // 2
        exponents = torch.arange(half, dtype=torch.float32) / half
        self.frequencies = torch.exp(-math.log(10000) * exponents)
        first, _, second = dit.t_embedder.mlp
        table = dit.y_embedder.embedding_table.weight
        embedder = (first.weight, first.bias, second.weight, second.bias, table)
        self.embedder = [p.detach().contiguous() for p in embedder]
        layers = [layer.adaLN_modulation[1] for layer in (*dit.blocks, dit.final_layer)]
        self.modulation = (
            [layer.weight.detach().contiguous() for layer in layers],
            [layer.bias.detach().contiguous() for layer in layers],
        )

    def conditioning(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.ops.fastdit_native.forward_conditioning(
            t.detach().float().contiguous(),
            y.detach().long().contiguous(),
            self.frequencies,
            self.embedder,
            *self.modulation,
        )

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        ops, batch = torch.ops.fastdit_native, x.shape[0]
        # Taken out while it is in use: a second thread makes its own.
        workspace = self.workspaces.pop(batch, None)
        if workspace is None:
            workspace = torch.empty(ops.forward_workspace(self.dit, batch))
            self.workspaces.clear()
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        out = ops.forward(x, rows, self.weights, workspace, self.dit)
        self.workspaces[batch] = workspace
        return out
