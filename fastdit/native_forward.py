"""A whole DiT in inference on a CPU, in one call of the compiled library: csrc/cpu/forward.cpp.

    run = fastdit.NativeForward(model)
    out = run(x, t, y)                             # as model(x, t, y), to 1e-6 relative
    rows = run.conditioning(t, y)                  # once for all steps of a sampler
    out = run(x, None, None, conditioning=rows)
    run.reason                                     # None, or why the last call ran the model itself

Weights are packed once, in the order in which the micro-kernel reads them, and packed again when a
parameter has changed; bias, GELU, gate and residual are applied as a product's tile leaves its
registers. Whatever it does not know runs the model: fused ops around PyTorch's products.
docs/native_forward.md has the maths and the figures.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fastdit import backends, native, sizes
from fastdit.native_weights import Packed, Unfit

QUANTIZE = (None, "int8")
PARTS = ("embed", "norm", "qkv", "attention", "proj", "fc1", "fc2", "last")
"""What `NativeForward.parts` tells apart. norm: LayerNorm and modulation, and all quantising;
fc1: with its GELU; last: the last product and the way back to an image."""


class NativeForward:
    """A DiT's forward on a CPU in float32, for inference; callable like the model.

    The model may change between calls: its weights are packed again. What cannot be seen is a
    change through `parameter.data` in place (`parameter.data.add_()`); `refresh()` tells of it.
    It holds a second copy of the block weights, and from call to call the activations of the last
    batch size. Calls from several threads are safe.

    Args:
        dit: the model. Whatever it is, calls work; `reason` says why one ran the model itself.
        quantize: None computes in float32. `"int8"` multiplies in 8 bits in the four Linears of a
            block: weights with a scale for each output channel, activations with one for each
            token; embedders, modulations, attention and the final layer stay float32.
            `quantization_error` tells what that costs.

    Raises:
        ValueError: `quantize` is neither.

    Attributes:
        reason: why the last call ran the model (fused ops around PyTorch's products), or None if
            the compiled library ran it.
    """

    def __init__(self, dit: nn.Module, quantize: str | None = None) -> None:
        if quantize not in QUANTIZE:
            allowed = ", ".join(map(repr, QUANTIZE))
            raise ValueError(f"quantize: got {quantize!r}, allowed is {allowed}")
        self.model, self.quantize = dit, quantize
        self.reason: str | None = None
        self._packed: Packed | None = None

    def refresh(self) -> None:
        """Pack the weights again at the next call, whether or not they seem to have changed."""
        self._packed = None

    def unfit(self, x: Tensor | None = None, conditioning: Tensor | None = None) -> str | None:
        """Why a call would run the model, or None; without arguments, any call."""
        try:
            self._ready(x, conditioning)
        except Unfit as why:
            return str(why)
        return None

    def explain(self, x: Tensor | None = None, conditioning: Tensor | None = None) -> str:
        """What a call would run, and why; without arguments, any call."""
        why = self.unfit(x, conditioning)
        if why is not None:
            return f"the model: {why}"
        kind = f"{self.quantize} in the blocks' Linears" if self.quantize else "float32"
        return f"native forward (csrc, {torch.ops.fastdit_native.cpu_isa()}, {kind})"

    def _ready(self, *tensors: Tensor | None) -> Packed:
        """The packed weights of now, or `Unfit`: why the library cannot take this call."""
        _check_surroundings()
        given = [t for t in tensors if t is not None]
        for value in given:
            _check_tensor(value)
        if torch.is_grad_enabled():
            if any(t.requires_grad for t in given):
                raise Unfit("a gradient of an argument is wanted")
            if any(p.requires_grad for p in self.model.parameters()):
                raise Unfit("gradients of the parameters are wanted; use torch.no_grad()")
        packed = self._packed
        if packed is None or not packed.watch.same() or packed.isa != packed.current_isa():
            packed = self._pack()
        if packed.watch.hooked():
            raise Unfit("a module has a forward hook")
        embedder = self.model.y_embedder
        if self.model.training and embedder is not None and embedder.dropout_prob > 0:
            raise Unfit("the model is in training mode, where labels are dropped")
        return packed

    def _pack(self) -> Packed:
        try:
            native.load()
        except native.NativeError as error:
            raise Unfit(str(error).partition("\n")[0]) from None
        self._packed = None  # frees the memory before as much is taken again
        with torch.no_grad():
            self._packed = packed = Packed(self.model, self.quantize)
        return packed

    def conditioning(
        self, t: Tensor, y: Tensor | None = None, force_drop_ids: Tensor | None = None
    ) -> Tensor:
        """`model.conditioning(t, y)`: all that x has no part in, `(B, (6·depth + 2)·D)`."""
        try:
            packed = self._ready()
        except Unfit as why:
            self.reason = str(why)
            return self.model.conditioning(t, y, force_drop_ids)
        self.reason = None
        if _plain(packed, t, y, force_drop_ids):
            return packed.conditioning(t, y)
        return self.model.conditioning(t, y, force_drop_ids)

    def __call__(
        self,
        x: Tensor,
        t: Tensor | None,
        y: Tensor | None = None,
        force_drop_ids: Tensor | None = None,
        *,
        conditioning: Tensor | None = None,
    ) -> Tensor:
        """`model(x, t, y, force_drop_ids, conditioning=conditioning)`.

        Returns:
            `(B, out_channels, H, W)`.

        Raises:
            ValueError: as the model.
        """
        try:
            packed = self._ready(x, conditioning)
        except Unfit as why:
            self.reason = str(why)
            return self.model(x, t, y, force_drop_ids, conditioning=conditioning)
        self.reason = None
        sizes.check_inputs(self.model, x, t, y, conditioning)
        if conditioning is None:
            if _plain(packed, t, y, force_drop_ids):
                return packed.labelled(x, t, y)
            conditioning = self.model.conditioning(t, y, force_drop_ids)
        return packed.forward(x, conditioning)

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
        """`model.forward_with_cfg` with this forward."""
        try:
            self._ready(x, conditioning)
        except Unfit as why:
            self.reason, run = str(why), self.model
        else:
            run = self
        guide = type(self.model).forward_with_cfg  # what the model does, around this forward
        return guide(run, x, t, y, cfg_scale, guided_channels, conditioning=conditioning)

    def quantization_error(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> float:
        """How far this forward is from the model's own for these inputs: |got - want| / |want|, in
        the 2-norm over all outputs."""
        with torch.no_grad():
            want = self.model(x, t, y).double()
            return float((self(x, t, y).double() - want).norm() / want.norm())

    def parts(self, x: Tensor, conditioning: Tensor) -> tuple[Tensor, dict[str, float]]:
        """The output, and the seconds of processor time that went into each of `PARTS`: over all
        threads of samples that one thread computes alone, of the calling thread for the others.

        Raises:
            RuntimeError: this call would run the model itself.
        """
        try:
            packed = self._ready(x, conditioning)
        except Unfit as why:
            raise RuntimeError(f"parts: only the native forward tells them; {why}") from None
        sizes.check_inputs(self.model, x, None, None, conditioning)
        seconds = torch.zeros(torch.get_num_threads(), len(PARTS), dtype=torch.float64)
        out = packed.forward(x, conditioning, seconds)
        return out, dict(zip(PARTS, seconds.sum(0).tolist(), strict=True))

    forward = __call__

    @property
    def out_channels(self) -> int:
        """The model's, for `forward_with_cfg`."""
        return self.model.out_channels


def _check_surroundings() -> None:
    """Raise `Unfit` if somebody else wants to see PyTorch's ops, or asks for others."""
    if torch.compiler.is_compiling():
        raise Unfit("torch.compile traces it")
    if backends.current_backend() == "reference":
        raise Unfit("fastdit.backend('reference') was asked for")
    if torch.is_autocast_enabled("cpu"):
        raise Unfit("autocast is on; it computes in float32")
    if torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() is not None:
        raise Unfit("a mode or a trace watches PyTorch's ops")
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        raise Unfit("a transform of torch.func runs")


def _check_tensor(value: Tensor) -> None:
    if type(value) not in (Tensor, nn.Parameter):
        raise Unfit(f"an argument is a {type(value).__name__}")
    if value.device.type != "cpu":
        raise Unfit(f"an argument is on {value.device}")
    if value.dtype != torch.float32:
        raise Unfit(f"an argument is {value.dtype}; it computes in float32")
    if value.is_neg():
        raise Unfit("an argument is lazily negated")


def _plain(packed: Packed, t: Tensor, y: Tensor | None, force_drop_ids: Tensor | None) -> bool:
    """Whether the library can condition: the model does it as published, and these are timesteps
    and labels on this device, one for each sample."""
    if not packed.conditions or force_drop_ids is not None:
        return False
    for value in (t, y):
        if type(value) is not Tensor or value.device.type != "cpu" or value.dim() != 1:
            return False
    return t.shape == y.shape and not (y.is_floating_point() or t.is_neg())
