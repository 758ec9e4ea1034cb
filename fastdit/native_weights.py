"""A DiT's weights as the native forward takes them, and whether they are still the model's.

Packing knows one design, the published one, of plain modules that nobody watches: `Packed` raises
`Unfit` with the reason for any other. `Watch` then tells at each call, in some 20 µs, whether
anything has changed that the packed copy depends on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module

from fastdit import blocks, embeddings, model, positions


class Unfit(Exception):
    """Why the native forward cannot stand for a model."""


KNOWN = {
    "conditioning": "adaln_zero",
    "rope": False,
    "any_size": False,
    "norm": "layer",
    "qk_norm": None,
    "mlp": "gelu",
    "residual": "x",
    "scale_plus_one": True,
}
"""What must be as published in a model's design. The other fields shape its positions, of which it
has a table, and its conditioning, of which it gets rows."""

_BODY = {
    "x_embedder": (blocks.PatchEmbed,),
    "x_embedder.proj": (nn.Conv1d, nn.Conv2d),
    "blocks": (nn.ModuleList,),
    "final_layer": (blocks.FinalLayer,),
    "final_layer.norm_final": (blocks.Norm,),
    "final_layer.linear": (nn.Linear,),
}
_BLOCK = {
    "": (blocks.DiTBlock,),
    ".norm1": (blocks.Norm,),
    ".attn": (blocks.Attention,),
    ".attn.qkv": (nn.Linear,),
    ".attn.proj": (nn.Linear,),
    ".norm2": (blocks.Norm,),
    ".mlp": (blocks.Mlp,),
    ".mlp.fc1": (nn.Linear,),
    ".mlp.fc2": (nn.Linear,),
}
_MODULATION = {"": nn.Sequential, ".0": nn.SiLU, ".1": nn.Linear}
_EMBEDDERS = {
    "t_embedder": embeddings.TimestepEmbedder,
    "t_embedder.mlp": nn.Sequential,
    "t_embedder.mlp.0": nn.Linear,
    "t_embedder.mlp.1": nn.SiLU,
    "t_embedder.mlp.2": nn.Linear,
    "y_embedder": embeddings.LabelEmbedder,
    "y_embedder.embedding_table": nn.Embedding,
}


def linears(dit: nn.Module) -> Iterator[nn.Linear]:
    """The Linears that read tokens, in the order of their packing."""
    for block in dit.blocks:
        yield from (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
    yield dit.final_layer.linear


def _check_design(dit: nn.Module) -> None:
    """Raise `Unfit` unless `dit` is a `fastdit.DiT` whose tokens go through what is known."""
    if type(dit) is not model.DiT:
        raise Unfit(f"the model is a {type(dit).__name__}, not a fastdit.DiT")
    for name, published in KNOWN.items():
        got = getattr(dit.design, name)
        if got != published:
            raise Unfit(f"{name} is {got!r}; it knows {published!r}")
    modules = dict(dit.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        if "forward" in vars(module):
            raise Unfit(f"{name or 'the model'} has a forward of its own")
    wanted = dict(_BODY)
    for index in range(len(dit.blocks)):
        wanted |= {f"blocks.{index}{name}": kinds for name, kinds in _BLOCK.items()}
    for name, kinds in wanted.items():
        if type(modules.get(name)) not in kinds:
            raise Unfit(f"{name} is a {type(modules.get(name)).__name__}, which it does not know")
    if len(dit.rows_widths) != len(dit.blocks) + 2:
        raise Unfit("blocks were added or taken away")
    if any(block.attn.num_heads != dit.num_heads for block in dit.blocks):
        raise Unfit("its blocks differ in their heads")
    if any(module.bias is None for module in (dit.x_embedder.proj, *linears(dit))):
        raise Unfit("a layer has no bias")


def _published_conditioning(dit: nn.Module) -> bool:
    """Whether rows are Linear(SiLU(c)) of c = MLP(t) + table[y], all of it plain."""
    modules = dict(dit.named_modules(remove_duplicate=False))
    layers = [f"blocks.{i}" for i in range(len(dit.blocks))] + ["final_layer"]
    wanted = dict(_EMBEDDERS)
    for layer in layers:
        wanted |= {f"{layer}.adaLN_modulation{name}": kind for name, kind in _MODULATION.items()}
    return (
        dit.design.condition_fusion == "sum"
        and all(type(modules.get(name)) is kind for name, kind in wanted.items())
        and all(modules[name].bias is not None for name, k in wanted.items() if k is nn.Linear)
    )


def _check_parameters(dit: nn.Module) -> None:
    for name, parameter in dit.named_parameters():
        if parameter.device.type != "cpu":
            raise Unfit(f"{name} is on {parameter.device}")
        if parameter.dtype != torch.float32:
            raise Unfit(f"{name} is {parameter.dtype}; it computes in float32")
        if type(parameter) is not nn.Parameter or parameter.is_inference():
            raise Unfit(f"{name} is not a plain parameter that counts its changes")


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
        self.dit, self.blocks, self.depth = dit, dit.blocks._modules, len(dit.blocks)
        self.input_size = dit.input_size

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
        return (
            len(self.blocks) == self.depth
            and self.dit.input_size == self.input_size
            and self.contents == self._contents()
        )


class Packed:
    """A model's weights as the library takes them; they are those of the moment it was made."""

    def __init__(self, dit: nn.Module, quantize: str | None) -> None:
        _check_design(dit)
        _check_parameters(dit)
        self.watch = Watch(dit)
        ops = torch.ops.fastdit_native
        self.current_isa = ops.cpu_isa
        self.isa = self.current_isa()
        width, signal = dit.hidden_size, len(dit.patch) == 1
        size, patch = ((1, *pair) if signal else pair for pair in (dit.input_size, dit.patch))
        mlp = dit.blocks[0].mlp.fc1.out_features if len(dit.blocks) else width
        sizes = (dit.in_channels, *size, *patch, width, len(dit.blocks))
        self.dit, self.signal = [*sizes, dit.num_heads, mlp, dit.out_channels], signal
        table = positions.table_for(dit, dit.grid)
        tokens = math.prod(dit.grid)
        table = torch.zeros(tokens, width) if table is None else table[0].float()
        proj = dit.x_embedder.proj
        parameters = [proj.weight.reshape(width, -1), proj.bias, table]
        for linear in linears(dit):
            parameters += [linear.weight, linear.bias]
        parameters = [p.detach().contiguous() for p in parameters]
        self.int8 = quantize == "int8"
        self.weights = ops.forward_pack(parameters, self.dit, self.int8)
        self.conditions = _published_conditioning(dit)
        if self.conditions:
            self._take_conditioning(dit)
        self.workspaces: dict[tuple[int, int], Tensor] = {}

    def _take_conditioning(self, dit: nn.Module) -> None:
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
        """`(B, W)` rows of timesteps and labels, if the model `conditions` as published."""
        return torch.ops.fastdit_native.forward_conditioning(*self._conditions(t, y))

    def _conditions(self, t: Tensor, y: Tensor) -> tuple:
        times, labels = t.detach().float().contiguous(), y.detach().long().contiguous()
        return times, labels, self.frequencies, self.embedder, *self.modulation

    def forward(self, x: Tensor, rows: Tensor, seconds: Tensor | None = None) -> Tensor:
        """The model's output for x and its conditioning rows.

        `seconds`, if given, `(threads, 8)` in float64: each thread's processor time in each part is
        added to it."""
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        forward = torch.ops.fastdit_native.forward
        return self._with_workspace(x, lambda x, *rest: forward(x, rows, *rest, seconds))

    def labelled(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The model's output for x, timesteps and labels, if it `conditions` as published: the
        product of a layer's modulations runs beside the layer before."""
        forward, arguments = torch.ops.fastdit_native.forward_labelled, self._conditions(t, y)
        return self._with_workspace(x, lambda x, *rest: forward(x, *arguments, *rest))

    def _with_workspace(self, x: Tensor, forward: Callable[..., Tensor]) -> Tensor:
        ops, batch = torch.ops.fastdit_native, x.shape[0]
        # Taken out while it is in use: a second thread makes its own.
        key = batch, torch.get_num_threads()
        workspace = self.workspaces.pop(key, None)
        if workspace is None:
            workspace = torch.empty(ops.forward_workspace(self.dit, batch, self.int8))
            self.workspaces.clear()
        x = x.unsqueeze(2) if self.signal else x
        out = forward(x, self.weights, workspace, self.dit, self.int8)
        self.workspaces[key] = workspace
        return out.squeeze(2) if self.signal else out
