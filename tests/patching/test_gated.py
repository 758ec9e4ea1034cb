"""The gated feed-forwards of all families on `glu`, patched against themselves."""

from __future__ import annotations

import contextlib

import compare
import pytest
import research
import torch
from diffusers.models import activations, attention
from diffusers.models.transformers import (
    ace_step_transformer,
    auraflow_transformer_2d,
    transformer_flux2,
    transformer_hidream_image,
    transformer_z_image,
)
from torch import nn

import fastdit
from fastdit import backends
from fastdit.ops import _library
from fastdit.testing import count_traffic
from fastdit.testing.fake_cuda import backward, kernel_costs

WIDTH = 24
UNITS = {
    "LightningDiT": lambda: research.SwiGLUFFN(WIDTH, 40),
    "GEGLU": lambda: activations.GEGLU(WIDTH, 40),
    "GEGLU without a bias": lambda: activations.GEGLU(WIDTH, 40, bias=False),
    "SwiGLU": lambda: activations.SwiGLU(WIDTH, 40),
    "FeedForward": lambda: attention.FeedForward(WIDTH, activation_fn="swiglu"),
    "Lumina": lambda: attention.LuminaFeedForward(WIDTH, 40, multiple_of=8),
    "AuraFlow": lambda: auraflow_transformer_2d.AuraFlowFeedForward(WIDTH, 60),
    "ACE-Step": lambda: ace_step_transformer.AceStepMLP(WIDTH, 40),
    "Flux 2": lambda: transformer_flux2.Flux2FeedForward(WIDTH),
    "Z-Image": lambda: transformer_z_image.FeedForward(WIDTH, 40),
    "HiDream": lambda: transformer_hidream_image.HiDreamImageFeedForwardSwiGLU(WIDTH, 60, 8),
}
every_unit = pytest.mark.parametrize("name", UNITS)


def make(name):
    torch.manual_seed(0)
    return compare.randomise(nn.Sequential(UNITS[name]()))


def call(model, tokens=5):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, tokens, WIDTH, generator=generator)
    return model(x.to(next(model.parameters()).dtype))


@every_unit
def test_outputs_and_every_gradient(name):
    model = make(name)
    theirs, before = compare.run(model, call), compare.state(model)
    with fastdit.backend("native"), fastdit.patched(model) as handle:
        (site,) = handle.report().replaced
        assert site.ops == "glu"
        assert not handle.report().skipped
        out, grad = compare.worst(compare.run(model, call), theirs)
        assert compare.state(model) == before
    assert out <= 8
    assert grad <= 32
    assert all(torch.equal(v, theirs[k]) for k, v in compare.run(model, call).items())


@every_unit
@torch.no_grad()
def test_low_precision_is_no_further_from_float64(name):
    model = make(name).bfloat16()
    exact = compare.outputs(make(name).bfloat16().double(), lambda m: call(m, 200))
    theirs = compare.error(model, lambda m: call(m, 200), exact)
    with fastdit.backend("native"), fastdit.patched(model):
        assert compare.error(model, lambda m: call(m, 200), exact) <= 1.02 * theirs


@contextlib.contextmanager
def on_meta():
    """glu's kernels for CUDA stand for those of meta tensors."""
    with contextlib.ExitStack() as stack:
        for op in ("glu", "glu_backward"):
            definition = _library.DEFINITIONS[op]
            kernels = [
                backends.Kernel(op, "meta", kernel.name, definition.fake, kernel.unsupported)
                for kernel in backends.kernels_for(op, "cuda")
            ]
            stack.enter_context(backends.replaced(op, "meta", kernels))
        yield


def counted(model):
    """Launches and bytes of a forward and of a training step, in bfloat16."""
    x = torch.empty(8, 64, WIDTH, dtype=torch.bfloat16, device="meta", requires_grad=True)
    with on_meta(), fastdit.backend("native"):
        with count_traffic(kernel_costs()) as forward, torch.no_grad():
            model(x)
        with count_traffic(kernel_costs()) as step:
            backward(model(x).float().square().mean())
    return [(t.total_launches, t.total_bytes) for t in (forward, step)]


# Of a forward and of a training step: launches before and after, and what is no longer moved, in
# tensors of the hidden width. A forward saves the activation's launch and its tensor, written and
# read (Lumina's goes through float32); a step also the join of the halves' gradients and the sum of
# the bias's; its partial sums are an eighth of a tensor here.
COUNTS = {
    "LightningDiT": ((4, 3, 2), (23, 19, 11.8)),
    "GEGLU": ((3, 2, 2), (19, 15, 11.8)),
    "Lumina": ((7, 4, 10), (28, 21, 23)),
    "Flux 2": ((4, 3, 2), (23, 17, 18)),
}


@pytest.mark.parametrize("name", COUNTS)
def test_launches_and_bytes(name):
    with torch.device("meta"):
        model = nn.Sequential(UNITS[name]()).bfloat16()
    before = counted(model)
    fastdit.patch(model)
    hidden = 8 * 64 * 2 * (72 if name == "Flux 2" else 40)  # bytes of a tensor of that width
    for was, now, (launches, fewer, tensors) in zip(
        before, counted(model), COUNTS[name], strict=True
    ):
        assert (was[0], now[0]) == (launches, fewer)
        assert (was[1] - now[1]) / hidden == pytest.approx(tensors, abs=0.1)


@torch.no_grad()
def test_a_changed_or_watched_projection_runs_as_it_is():
    model, seen = make("GEGLU"), []
    with fastdit.backend("native"), fastdit.patched(model):
        model[0].proj.register_forward_hook(lambda *_: seen.append(1))
        watched = call(model)
        model[0].proj = nn.Sequential(nn.Linear(WIDTH, 80), nn.Tanh())
        changed = call(model)
    assert seen == [1]
    torch.testing.assert_close(changed, call(model))
    assert watched.shape == changed.shape


@torch.no_grad()
def test_projections_of_two_dtypes_run_the_original():
    class Widened(nn.Linear):
        def forward(self, x):
            return super().forward(x).double()

    model = make("Z-Image")
    fastdit.patch(model)
    model[0].w3 = Widened(WIDTH, 40)
    model[0].w2.double()
    torch.testing.assert_close(call(model.eval()), type(model[0]).forward(model[0], call_input()))


def call_input():
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1))


class Fork(transformer_z_image.FeedForward):
    """Another activation under the same names."""

    def forward(self, x):
        return self.w2(torch.relu(self.w1(x)) * self.w3(x))


def test_a_fork_with_another_activation_is_left_alone():
    report = fastdit.patch(nn.Sequential(Fork(WIDTH, 40))).report()
    assert not report.replaced
    assert "its forward gives a relative difference" in report.skipped[0].reason


def test_what_diffusers_warns_of_is_left_to_it():
    model = make("GEGLU")
    fastdit.patch(model)
    with pytest.warns(FutureWarning, match="scale"):
        model[0](call_input(), scale=2.0)
