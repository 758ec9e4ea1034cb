"""The step that a CUDA graph captures, on fake tensors of a DiT-XL/2: what it launches, and that it
touches nothing but the device."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import pytest
import torch
from test_system import opaque_ops
from torch import nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastdit
from fastdit.plan import Kind, Plan
from fastdit.sampler.conditioning import Conditioning
from fastdit.sampler.conditions import Conditions
from fastdit.sampler.diffusion import diffusion_plan
from fastdit.sampler.flow import FLOW_SOLVERS, flow_plan
from fastdit.sampler.graphs import CapturedRun
from fastdit.sampler.noise import published_draw
from fastdit.sampler.published import Published
from fastdit.sampler.run import Recipe
from fastdit.testing import count_traffic
from fastdit.testing.fake_cuda import kernel_costs

BATCH, STEPS, LABELS = 32, 250, 5
LAUNCHES = 235  # model, guidance and update; eager PyTorch's model alone is 614
PUBLISHED_LAUNCHES = 239  # five more: `forward_with_cfg` guides in eager PyTorch
HAS_CUDA = torch.backends.cuda.is_built()
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(not HAS_CUDA, reason="this PyTorch cannot fake CUDA tensors"),
    ),
]
SOLVERS = [("ddpm", True), ("ddpm", False), ("dpm++", True), ("ddim", True), ("sde", False)]
SOLVERS += [("sde_heun", True), ("sde_heun", False)]


class OnlyDevice(TorchDispatchMode):
    """No op inside takes or makes a tensor anywhere else, and none is a copy between devices."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.ops = device, 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        self.ops += 1
        found = [
            leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)
        ]
        assert {tensor.device.type for tensor in found} <= {self.device}, op
        return out


def fake_model(device: str, depth: int) -> tuple[FakeTensorMode, fastdit.DiT]:
    """A fake DiT of XL/2's width in bfloat16 on a fake device."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with FakeTensorMode() as mode:
            dit = fastdit.DiT(depth=depth).eval()
            for module in dit.modules():
                present = {k: v for k, v in module._parameters.items() if v is not None}
                for name, value in present.items():
                    fresh = torch.empty(value.shape, device=device)
                    module._parameters[name] = nn.Parameter(fresh, requires_grad=False)
    finally:
        torch.set_default_dtype(default)
    return mode, dit


@pytest.fixture(scope="module", params=DEVICES)
def xl(request):
    """The whole DiT-XL/2."""
    return *fake_model(request.param, 28), request.param


@pytest.fixture(scope="module", params=DEVICES)
def fake(request):
    """One with two blocks: the others add nothing but time."""
    return *fake_model(request.param, 2), request.param


@functools.cache
def guided_plan(solver: str) -> Plan:
    """A solver's, on the host: not to be made under fake tensors."""
    if solver in FLOW_SOLVERS:
        plan = flow_plan(fastdit.create_transport(time_scale=1000.0), solver, STEPS)
    else:
        plan = diffusion_plan(fastdit.create_diffusion(str(STEPS)), solver)
    return plan.with_guidance(4.0, None)


def captured_run(dit, device: str, plan: Plan, seeded: bool, hoisted: bool = True) -> CapturedRun:
    """A chunk's static tensors, as `Sampler` makes them, by shape only."""

    def ints(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int64, device=device)

    rows = 2 * len(plan) + 1 if plan.noise_before is not None else len(plan) + 1
    table = torch.empty(rows, 9, device=device)
    times = torch.empty(len(plan), dtype=plan.times.dtype, device=device)
    recipe = Recipe(dit, plan, table, times, 3, None if seeded else published_draw(True))
    x = torch.empty(BATCH, 4, 32, 32, dtype=torch.bfloat16, device=device)
    seeds = ints(BATCH) if seeded else None
    given = Conditions(ints(LABELS), ints(BATCH), LABELS)
    conditioning = None
    if hoisted:
        conditioning = Conditioning.__new__(Conditioning)
        width = (6 * len(dit.blocks) + 2) * 1152
        conditioning.table = torch.empty(len(plan), LABELS, width, dtype=x.dtype, device=device)
    return CapturedRun(recipe, x, given, seeds, conditioning)


@pytest.mark.parametrize(
    ("solver", "seeded"), [("ddpm", False), ("dpm++", True), ("heun", False), ("sde_heun", True)]
)
def test_launches_of_a_step(xl, solver, seeded):
    mode, dit, device = xl
    plan = guided_plan(solver)
    with mode, torch.no_grad(), opaque_ops(device):
        run = captured_run(dit, device, plan, seeded)
        with count_traffic(kernel_costs()) as traffic:
            run.advance_captured(Kind(guided=True, draws=True))
    assert traffic.launches["fastdit::diffusion_step"] == 1 + (solver == "sde_heun")
    assert traffic.total_launches <= LAUNCHES


@pytest.mark.parametrize("hoisted", [True, False], ids=["hoisted", "conditioned in the step"])
@pytest.mark.parametrize(("solver", "seeded"), SOLVERS)
def test_a_step_stays_on_its_device_and_reads_no_value(fake, solver, seeded, hoisted):
    """A fake tensor has no value: reading one, for a branch or a shape, is an error."""
    mode, dit, device = fake
    plan = guided_plan(solver)
    with mode, torch.no_grad(), opaque_ops(device):
        run = captured_run(dit, device, plan, seeded, hoisted)
        with OnlyDevice(device) as only:
            for guided, draws in itertools.product((True, False), repeat=2):
                run.advance_captured(Kind(guided, draws))
    assert only.ops > 60


def test_launches_of_a_published_loops_step(xl):
    mode, dit, device = xl
    plan, diffusion = guided_plan("ddpm"), fastdit.create_diffusion("2")
    with mode, torch.no_grad(), opaque_ops(device):
        run = published_run(dit, device, plan, diffusion)
        with count_traffic(kernel_costs()) as traffic:
            run.advance_captured(Kind(guided=False, draws=True))
    assert traffic.total_launches <= PUBLISHED_LAUNCHES


def published_run(dit, device: str, plan: Plan, diffusion) -> CapturedRun:
    """What `p_sample_loop(dit.forward_with_cfg, ...)` captures, by shape only."""
    run = captured_run(dit, device, plan, seeded=False)
    guided = functools.partial(dit.forward_with_cfg, cfg_scale=4.0)
    asked = Published(diffusion, "ddpm", guided, run.x)
    recipe = dataclasses.replace(
        run.recipe, denoise=asked.checked(guided), draw=torch.randn_like, clip=None
    )
    return CapturedRun(recipe, run.x, run.conditions, None, run.conditioning)


@pytest.mark.parametrize("hook", ["none", "denoised_fn", "cond_fn"])
@pytest.mark.parametrize("solver", ["p", "ddim", "dpm_solver"])
def test_a_step_of_a_published_loop_stays_on_its_device_and_reads_no_value(fake, solver, hook):
    """After the first two, before which tables and times are copied there: that of order 2 before
    the second."""
    mode, dit, device = fake
    if device == "cpu" and hook != "none":
        pytest.skip("the diffusion's own steps check the timesteps' range on CPUs")
    hooks = {"denoised_fn": torch.tanh, "cond_fn": lambda x, _t, **_kwargs: -x}
    diffusion = fastdit.create_diffusion("5")
    mode.allow_non_fake_inputs = True  # the tables on the host
    with mode, opaque_ops(device):
        x = torch.empty(4, 4, 32, 32, dtype=torch.bfloat16, device=device)
        y = torch.empty(4, dtype=torch.int64, device=device)
        steps = getattr(diffusion, f"{solver}_sample_loop_progressive")(
            lambda x, t, **kwargs: dit.forward_with_cfg(x, t, **kwargs),
            x.shape,
            x,
            model_kwargs={"y": y, "cfg_scale": 4.0},
            **{hook: hooks[hook] for hook in hooks.keys() & {hook}},
        )
        next(steps), next(steps)
        with OnlyDevice(device) as only:
            assert len(list(steps)) == 3
    assert only.ops > 3 * 60


def test_the_guard_sees_a_copy_and_a_read(fake):
    """The checks above can fail."""
    mode, _dit, device = fake
    other = "meta" if device == "cpu" else "cpu"
    with mode:
        here = torch.empty(2, device=device)
        with pytest.raises(AssertionError), OnlyDevice(device):
            here.to(other)
        with pytest.raises(DataDependentOutputException):
            bool(here.sum() > 0)
