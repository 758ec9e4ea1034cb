"""fastdit.hub: what `kernels` asks of a layer, checked by hand, and by `kernels` itself if it is
installed."""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers.models import attention, normalization
from diffusers.models.transformers import transformer_flux, transformer_wan
from torch import nn

from fastdit import hub

CLASSES = [
    normalization.AdaLayerNormZero,
    normalization.AdaLayerNormZeroSingle,
    normalization.AdaLayerNormContinuous,
    normalization.CogVideoXLayerNormZero,
    normalization.FP32LayerNorm,
    normalization.RMSNorm,
    attention.BasicTransformerBlock,
    attention.JointTransformerBlock,
    transformer_flux.FluxTransformerBlock,
    transformer_flux.FluxSingleTransformerBlock,
    transformer_wan.WanTransformerBlock,
]


@pytest.mark.parametrize("cls", CLASSES)
def test_a_layer_has_the_signature_of_the_class_it_replaces(cls):
    layer = hub.mapping()[cls.__name__]["cuda"].load()
    kinds = [
        [p.kind for p in inspect.signature(c.forward).parameters.values()] for c in (layer, cls)
    ]
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize("name", hub.LAYERS)
def test_layers_have_no_state(name):
    layer = hub.LAYERS[name]
    assert issubclass(layer, nn.Module)
    assert layer.__init__ is nn.Module.__init__
    own = {n for n, _ in inspect.getmembers(layer)} - {n for n, _ in inspect.getmembers(nn.Module)}
    assert own == {"can_torch_compile", "has_backward"}
    assert (layer.can_torch_compile, layer.has_backward) == (True, True)


def test_forwards_bound_to_other_modules_compute_the_same():
    torch.manual_seed(0)
    original = normalization.AdaLayerNormZero(32)
    x, emb = torch.randn(2, 3, 32), torch.randn(2, 32)
    expected = original(x, emb=emb)
    original.forward = hub.LAYERS["AdaLayerNormZero"].forward.__get__(original)
    pairs = zip(original(x, emb=emb), expected, strict=True)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)


def test_an_unknown_layer_is_named():
    with pytest.raises(ValueError, match="layer_name: got 'Conv', allowed are DiTBlock"):
        hub.Repository("Conv")
    assert hub.Repository("Mlp") == hub.Repository("Mlp")
    assert {hub.Repository("Mlp"), hub.Repository("Mlp")} == {hub.Repository("Mlp")}


def test_a_repository_has_the_layout_of_the_hub(tmp_path):
    hub.write_repository(tmp_path)
    for device in ("cpu", "cuda"):
        build = tmp_path / "build" / f"torch-{device}"
        assert json.loads((build / "metadata.json").read_text())["backend"] == {"type": device}
        found: dict = {}
        exec((build / "__init__.py").read_text(), found)
        assert found["layers"].FinalLayer is hub.LAYERS["FinalLayer"]


PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import compare, families, torch
from kernels import LocalLayerRepository, Mode, kernelize, use_kernel_mapping
from fastdit import hub

for name in ("DiT", "PixArt-Sigma", "SD3", "Flux", "Wan"):
    model, call = families.make(name)
    expected = compare.run(model, call)
    assert hub.extend(model)
    with use_kernel_mapping(hub.mapping()):
        kernelize(model, mode=Mode.TRAINING | Mode.TORCH_COMPILE, device="cpu")
    replaced = {type(m).__name__ for m in model.modules() if "forward" in m.__dict__}
    assert any(name.endswith("Block") for name in replaced), replaced
    out, grad = compare.worst(compare.run(model, call), expected)
    assert out < 8 and grad < 32, (name, out, grad)

folder = hub.write_repository(Path("repository"))
model, call = families.make("AuraFlow")
expected = compare.run(model, call)
names = hub.extend(model)
local = {n: {"cpu": LocalLayerRepository(folder, layer_name=n)} for n in names}
with use_kernel_mapping(local, inherit_mapping=False):
    kernelize(model, mode=Mode.INFERENCE, device="cpu", use_fallback=False)
assert compare.worst(compare.run(model, call), expected)[0] < 8
print("kernelized")
"""


def test_kernelize(tmp_path):
    try:
        importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("Hugging Face kernels is not installed")
    # Elsewhere, because the repository's own folder kernels/ is on the path here.
    folder = Path(__file__).parent / "patching"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder)],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert "kernelized" in done.stdout, done.stderr
