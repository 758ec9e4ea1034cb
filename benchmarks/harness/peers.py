"""The peers: how each of the columns beside eager PyTorch and fastdit comes about.

A peer that is not installed is `Absent` with the reason. One that cannot do a case raises when it
is first called, which the measurement records.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness.problem import Absent, Column, absent


def compiled(function: Callable[..., Any], *args: Any, mode: str | None = None) -> Column:
    """`torch.compile`d on its first call; on CUDA "max-autotune" is with CUDA graphs."""
    fused = torch.compile(function, dynamic=False, mode=mode)
    return lambda: fused(*args)


def compile_columns(function: Callable[..., Any], *args: Any, device: str) -> dict[str, Column]:
    """torch.compile, and on GPUs its slowest and best."""
    found = {"torch.compile": compiled(function, *args)}
    if device == "cuda":
        found["compile, max-autotune"] = compiled(function, *args, mode="max-autotune")
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporters warn of what they always do."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def onnx_runtime(module: nn.Module, args: tuple[Tensor, ...]) -> Column:
    """ONNX Runtime on the CPU, all optimisations, with as many threads as PyTorch has."""
    for distribution in ("onnxruntime", "onnx", "onnxscript"):
        if missing := absent(distribution):
            return missing
    if args[0].dtype != torch.float32:
        return Absent("exported in fp32 alone")

    @functools.cache
    def session():
        import onnxruntime

        with tempfile.TemporaryDirectory() as folder, quiet():
            path = Path(folder) / "model.onnx"
            names = [f"input{i}" for i in range(len(args))]
            torch.onnx.export(
                module, args, path, input_names=names, dynamo=True, verbose=False, optimize=True
            )
            settings = onnxruntime.SessionOptions()
            settings.intra_op_num_threads = torch.get_num_threads()
            settings.log_severity_level = 3
            return onnxruntime.InferenceSession(path, settings, ["CPUExecutionProvider"])

    feed = {f"input{i}": value.numpy() for i, value in enumerate(args)}
    return lambda: [torch.from_numpy(out) for out in session().run(None, feed)]


def openvino(module: nn.Module, args: tuple[Tensor, ...]) -> Column:
    """OpenVINO on the CPU in float32, with as many threads as PyTorch has."""
    if missing := absent("openvino"):
        return missing
    if args[0].dtype != torch.float32:
        return Absent("exported in fp32 alone")

    @functools.cache
    def request():
        import openvino

        with quiet():
            model = openvino.convert_model(module, example_input=args)
        for port, value in zip(model.inputs, args, strict=True):
            port.get_node().set_partial_shape(openvino.PartialShape(list(value.shape)))
        model.validate_nodes_and_infer_types()
        settings = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
        }
        return openvino.compile_model(model, "CPU", settings).create_infer_request()

    feed = [value.numpy() for value in args]

    def run() -> list[Tensor]:
        found = request().infer(feed, share_inputs=True, share_outputs=True)
        return [torch.from_numpy(value) for value in found.values()]

    return run


def exported(module: nn.Module, args: tuple[Tensor, ...], device: str) -> dict[str, Column]:
    """The runtimes that take an exported model; on GPUs they have no part."""
    if device != "cpu":
        return {}
    return {"ONNX Runtime": onnx_runtime(module, args), "OpenVINO": openvino(module, args)}


def diffusers_dit(model: Any) -> nn.Module | Absent:
    """diffusers' DiT with the weights of one of ours, and DiT's arithmetic where diffusers' own
    differs: see `fastdit.diffusers_format`."""
    if missing := absent("diffusers"):
        return missing
    import diffusers

    from fastdit.diffusers_format import to_diffusers

    weights, config = to_diffusers(model.state_dict(), model.config)
    theirs = diffusers.DiTTransformer2DModel.from_config(config)
    theirs.load_state_dict(weights)
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        block.norm3.eps = 1e-6
    parameter = next(model.parameters())
    with quiet():
        return theirs.to(parameter.device, parameter.dtype).eval()


def diffusers_forward(model: Any, x: Tensor, t: Tensor, y: Tensor) -> Column:
    """One forward pass of diffusers' DiT."""
    theirs = diffusers_dit(model)
    if isinstance(theirs, Absent):
        return theirs
    return lambda: theirs(x, timestep=t, class_labels=y, return_dict=False)[0]
