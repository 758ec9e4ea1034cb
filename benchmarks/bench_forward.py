"""A DiT's whole forward in inference on a CPU: eager PyTorch and what users would pick instead,
against fastdit's native forward.

    python benchmarks/bench_forward.py --threads 2 [--rounds 7] [--cases tiny,S/8,S/2] [--json FILE]
    python benchmarks/bench_forward.py --threads 2 --rounds 5 --cases XL/2 --peers compile,ours

Every candidate of a case runs the same model on the same inputs, in turns; a figure is the median
of its turns and a ratio the median of the turns' ratios to eager's. Eager is the published DiT in
plain PyTorch (`fastdit.backend("reference")`, every layer's modulation by itself). "rows given" has
its conditioning computed before, as a sampler's steps do; "fused ops" is the model itself, without
the native forward, and "compiled fused ops" torch.compile of it, which is to be no slower. With and
without freezing and of our model, torch.compile compiles each whole model three times, 10 to 100 s
each, said before the table: all cases take half an hour. Peers that are not installed are named as
absent. With more than one thread a turn waits for an idle machine, `--patience` seconds in all, and
what was measured beside others is counted.
Errors are relative, in the 2-norm, to the model in float64.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from timing import interleaved, ratios
from torch import Tensor, nn

import fastdit

TINY = {"in_channels": 1, "hidden_size": 192, "depth": 6, "num_heads": 6, "num_classes": 10}
MODELS = {
    "tiny": lambda: fastdit.DiT(input_size=8, patch_size=2, **TINY),
    "tiny/1": lambda: fastdit.DiT(input_size=8, patch_size=1, **TINY),
    **{name.removeprefix("DiT-"): make for name, make in fastdit.DiT_models.items()},
}
CASES = {
    "tiny": ("tiny", 2),
    "tiny64": ("tiny", 64),
    "tiny/1": ("tiny/1", 2),
    "S/8": ("S/8", 2),
    "S/2b1": ("S/2", 1),
    "S/2": ("S/2", 2),
    "B/2": ("B/2", 2),
    "XL/2": ("XL/2", 1),
}
PEERS = ("ort", "openvino", "compile", "ours")
Forward = Callable[[], Tensor]


def model_of(name: str) -> fastdit.DiT:
    """As initialised, but with gates and a last layer that are not zero."""
    torch.manual_seed(0)
    model = MODELS[name]().eval().requires_grad_(False)
    for layer in (*model.blocks, model.final_layer):
        nn.init.normal_(layer.adaLN_modulation[1].weight, std=0.05)
        nn.init.normal_(layer.adaLN_modulation[1].bias, std=0.05)
    nn.init.normal_(model.final_layer.linear.weight, std=0.02)
    return model


class Published(nn.Module):
    """The model in eager PyTorch, each layer computing its own modulation, as published."""

    def __init__(self, model: fastdit.DiT) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        model = self.model
        with fastdit.backend("reference"):
            c = model.condition(t, y)
            x = model.x_embedder(x, model.pos_embed)
            for block in model.blocks:
                x = block(x, c)
            return model.unpatchify(model.final_layer(x, c))


def absent(*modules: str) -> str | None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"absent: {', '.join(missing)} not installed" if missing else None


def onnx_file(model: nn.Module, args: tuple[Tensor, ...], folder: Path) -> str:
    path = str(folder / "model.onnx")
    names = ["x", "t", "y"]
    with warnings.catch_warnings():  # of the exporter's age, and of every shape it traces
        warnings.simplefilter("ignore")
        torch.onnx.export(model, args, path, input_names=names, dynamo=False, opset_version=17)
    return path


def onnxruntime(path: str, args: tuple[Tensor, ...], threads: int) -> Forward:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    feed = {n: a.numpy() for n, a in zip(("x", "t", "y"), args, strict=True) if n in names}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def quantized(path: str) -> str:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    to = path.replace(".onnx", ".int8.onnx")
    quantize_dynamic(path, to, per_channel=True, weight_type=QuantType.QInt8)
    return to


def openvino(model: nn.Module, args: tuple[Tensor, ...], threads: int) -> Forward:
    import openvino as ov

    converted = ov.convert_model(model, example_input=args)
    config = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = ov.Core().compile_model(converted, "CPU", config)
    request, arrays = compiled.create_infer_request(), [a.numpy() for a in args]
    return lambda: torch.from_numpy(request.infer(arrays)[0])


def compiled(model: nn.Module, args: tuple[Tensor, ...], freezing: bool) -> Forward:
    import torch._inductor.config as inductor

    torch._dynamo.reset()
    function = torch.compile(copy.deepcopy(model))
    start = time.perf_counter()
    with inductor.patch(freezing=freezing):
        function(*args)
    kind = f"{type(model).__name__}{', freezing' if freezing else ''}"
    print(f"  torch.compile of {kind}: {time.perf_counter() - start:.0f} s", flush=True)
    return lambda: function(*args)


def peer_forwards(
    eager: nn.Module, args: tuple[Tensor, ...], peers: set[str], threads: int
) -> tuple[dict[str, Forward], dict[str, str]]:
    """The peers' forwards by name, and why others are absent."""
    found: dict[str, Forward] = {}
    missing = {}
    # Above 2 GB protobuf gives up, and a copy for eight bits would double the memory.
    large = sum(p.numel() for p in eager.parameters()) > 200e6
    if "ort" in peers:
        why = absent("onnx", "onnxruntime")
        missing |= {"onnxruntime": why} if why else {}
        with tempfile.TemporaryDirectory() as folder:
            if not why:
                path = onnx_file(eager, args, Path(folder))
                found["onnxruntime"] = onnxruntime(path, args, threads)
            if not why and not large:
                found["onnxruntime int8"] = onnxruntime(quantized(path), args, threads)
    if "openvino" in peers:
        why = absent("openvino")
        missing |= {"openvino": why} if why else {}
        found |= {} if why else {"openvino": openvino(eager, args, threads)}
    if "compile" in peers:
        found["torch.compile"] = compiled(eager, args, False)
        found["torch.compile, freezing"] = compiled(eager, args, True)
    return found, missing


def candidates(name: str, batch: int, peers: set[str], threads: int):
    """Functions of no arguments by name, each forward's output in float64, and who is absent."""
    model = model_of(name)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(batch, model.in_channels, *model.input_size, generator=g)
    t = torch.randint(0, 1000, (batch,), generator=g)
    y = torch.randint(0, model.num_classes, (batch,), generator=g)
    # In eval mode: ONNX export puts the module back into the mode it found it in.
    args, eager = (x, t, y), Published(model).eval()
    native, int8 = fastdit.NativeForward(model), fastdit.NativeForward(model, quantize="int8")
    rows = native.conditioning(t, y)
    found: dict[str, Forward] = {
        "eager": lambda: eager(*args),
        "native": lambda: native(*args),
        "native, rows given": lambda: native(x, None, None, conditioning=rows),
        "native int8": lambda: int8(*args),
        "native int8, rows given": lambda: int8(x, None, None, conditioning=rows),
    }
    if "ours" in peers:
        found["fused ops"] = lambda: model(*args)
        found["compiled fused ops"] = compiled(model, args, False)
    others, missing = peer_forwards(eager, args, peers, threads)
    found |= others
    if model.hidden_size <= 384:
        true = Published(copy.deepcopy(model).double())(x.double(), t, y)
    else:  # too large for float64 in this benchmark's time: the errors are those against eager
        true = eager(*args).double()
    return found, true, missing


def measure(case: str, peers: set[str], options: argparse.Namespace) -> list[dict]:
    """Time one case, print its table, and return its rows."""
    name, batch = CASES[case]
    print(f"\n{name}, batch {batch}", flush=True)
    functions, true, missing = candidates(name, batch, peers, options.threads)
    errors = {n: float((f().double() - true).norm() / true.norm()) for n, f in functions.items()}
    timing = interleaved(functions, options.rounds, patience=options.patience)
    if timing.disturbed:
        print(f"  {timing.disturbed} turns beside other processes")
    results = []
    for who, seconds in timing.seconds.items():
        ratio = ratios(timing.seconds["eager"], seconds)
        row = {"model": name, "batch": batch, "threads": options.threads, "who": who}
        row |= {"ms": [1e3 * s for s in seconds], "ratio": ratio[0], "error": errors[who]}
        results.append(row)
        milliseconds = [f(row["ms"]) for f in (statistics.median, min, max)]
        print(
            "  {:24} {:9.2f} [{:.2f}..{:.2f}]".format(who, *milliseconds)
            + "  {:5.2f}x [{:.2f}..{:.2f}]".format(*ratio)
            + f"  error {errors[who]:.1e}",
            flush=True,
        )
    for who, why in missing.items():
        print(f"  {who:24} {why}")
    if "fused ops" in functions:
        gain = ratios(timing.seconds["fused ops"], timing.seconds["compiled fused ops"])
        print("  torch.compile of fused ops: {:.2f}x [{:.2f}..{:.2f}] of them".format(*gain))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--peers", default=",".join(PEERS), help="none for none")
    parser.add_argument("--patience", type=float, default=60, help="seconds a case may wait")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    clock = "CPU time" if options.threads == 1 else "wall time"
    isa = fastdit.NativeForward(model_of("tiny")).explain()
    print(f"torch {torch.__version__}, {isa}, {options.threads} threads, ms of {clock}")
    results = []
    for case in options.cases.split(","):
        peers = set(options.peers.split(","))
        # One peer after the other where two would not fit the memory of a small machine.
        for chosen in [{peer} for peer in sorted(peers)] if case == "XL/2" else [peers]:
            results += measure(case, chosen, options)
    if options.json:
        temporary = options.json.with_suffix(".tmp")
        temporary.write_text(json.dumps(results, indent=1))
        os.replace(temporary, options.json)


if __name__ == "__main__":
    main()
