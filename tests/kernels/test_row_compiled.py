"""The row-wise kernels compiled: within their budgets, and the compiled code right and lean."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from baselines import hold_instructions
from row_cases import error
from row_launches import (
    AMD_OCCUPANCY,
    ARCHITECTURES,
    BATCH,
    BUDGETS,
    INSTRUCTIONS,
    TOKENS,
    WIDTHS,
    compiled,
    instructions,
    simulated,
)

from fastdit import reference
from fastdit.kernels import adaln, gated_residual
from fastdit.testing import VirtualGPU, inspect

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Every width on the H100, DiT-XL's everywhere, and AMD's tile of a narrow row: in every run.
COMPILED = [
    *[("sm_90", width, BF16) for width in WIDTHS],
    *[(arch, 1152, BF16) for arch in ("sm_80", "sm_100", "sm_120", "gfx942")],
    ("gfx942", 384, BF16),
    ("sm_80", 1152, FP16),
    ("sm_90", 1152, FP32),
]
EVERYTHING = itertools.product(ARCHITECTURES, WIDTHS, (BF16, FP16, FP32))


@pytest.mark.parametrize(("arch", "width", "dtype"), COMPILED)
def test_registers_occupancy_and_access_widths(arch, width, dtype):
    for name, launch in compiled(arch, width, dtype).items():
        check_resources(name, launch, dtype)


@pytest.mark.slow  # three minutes of compilation
@pytest.mark.parametrize(
    ("arch", "width", "dtype"), [one for one in EVERYTHING if one not in COMPILED]
)
def test_registers_occupancy_and_access_widths_everywhere(arch, width, dtype):
    for name, launch in compiled(arch, width, dtype).items():
        check_resources(name, launch, dtype)


def check_resources(name, launch, dtype):
    found, budget = inspect(launch), BUDGETS[name]
    full = int(dtype == FP32)
    assert (found.spills, found.stack_bytes) == (0, 0), (name, found)
    assert found.loads_wide >= 1, (name, found)
    assert found.stores_wide >= 1, (name, found)
    if found.arch == "gfx942":
        assert found.occupancy.fraction >= AMD_OCCUPANCY, (name, found)
    else:
        assert found.registers <= budget.registers[full], (name, found)
        assert found.occupancy.fraction >= budget.occupancy[full], (name, found)
    if dtype != FP32:  # 8 columns a thread in one access; 32-bit tails are wide as well
        assert found.loads_narrow <= 10, (name, found)


@pytest.mark.parametrize("arch", ["sm_80", "gfx942"])
def test_the_sum_of_the_slots(arch):
    x = torch.empty(2, 600, 1152, dtype=BF16, device="meta")
    with VirtualGPU(arch, mode="compile") as gpu:
        gated_residual.gated_residual_backward(x, x, x[:, 0])
    (launch,) = [one for one in gpu.launches if one.name == "finish_kernel"]
    found = inspect(launch)
    assert (found.spills, found.stack_bytes) == (0, 0)
    assert found.loads_wide >= 1
    assert found.occupancy.fraction >= 0.5


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_offsets_of_rows_have_64_bits(arch):
    """Tensors of more than 2^31 elements: only a column, or a row of the statistics, has 32."""
    for launch in compiled(arch, 1152, BF16).values():
        offsets = re.findall(r"tt\.addptr .* : !tt\.ptr<bf16>, (i\d+)", launch.compiled.asm["ttir"])
        assert offsets
        assert set(offsets) == {"i64"}


@pytest.mark.parametrize(("arch", "width"), INSTRUCTIONS)
def test_the_compiled_code(arch, width):
    """The numbers of float64, every sector used, no divergence, the instructions committed."""
    tensors, launches, returned = simulated(arch, width, BF16)
    exact = {name: tensor.double() for name, tensor in tensors.items()}
    _check(exact, returned)
    stream = 2 * BATCH * TOKENS * width
    streams = {"adaln": 2, "gated_residual": 3, "gated_adaln": 4}
    streams |= {"adaln_backward": 3, "gated_residual_backward": 3, "gated_adaln_backward": 6}
    for name, launch in launches.items():
        found = launch.simulation
        assert found.loads.efficiency >= 0.99, name
        assert found.stores.efficiency >= 0.99, name
        assert found.divergent_branches == 0, name
        assert found.atomics == 0, name
        # Beside the streams: modulation, statistics, partial sums; 12 float32 rows of a sample.
        assert streams[name] * stream <= found.dram_bytes, name
        assert found.dram_bytes <= streams[name] * stream + 12 * BATCH * (4 * width + 32), name
    counts = {name: instructions(launch) for name, launch in launches.items()}
    hold_instructions(counts, INSTRUCTIONS[arch, width])


def _check(t: dict, returned: dict) -> None:
    """Outputs to a rounding and gradients to float32's, of what the kernels stored before."""
    modulation, options = (t["shift"], t["scale"], None, None), ("layer", True)
    h, _out, mean, rstd = returned["gated_adaln"]
    x_mean, x_rstd = (s.double() for s in returned["adaln"][1:])
    truth = {
        "adaln": (reference.adaln(t["x"], *modulation, 1e-6, *options),),
        "gated_residual": (reference.gated_residual(t["x"], t["y"], t["gate"]),),
        "gated_adaln": (
            reference.gated_residual(t["x"], t["y"], t["gate"]),
            reference.adaln(h.double(), *modulation, 1e-6, *options),
        ),
        "adaln_backward": reference.adaln_backward(
            t["dout"], t["x"], x_mean, x_rstd, *modulation, *options
        ),
        "gated_residual_backward": reference.gated_residual_backward(
            t["dout"], t["y"], t["gate"]
        ),
        "gated_adaln_backward": reference.gated_adaln_backward(
            t["dh"], t["dout"], h.double(), mean.double(), rstd.double(), t["y"], t["gate"],
            *modulation, *options,
        ),
    }  # fmt: skip
    for name, wanted in truth.items():
        for got, want in zip(returned[name], wanted, strict=False):
            if want.numel():
                floor = error(want.to(got.dtype), want)
                assert error(got, want) <= 1.02 * floor + 4e-6 * float(want.abs().max()), name


def test_the_compiled_code_in_float32_with_a_large_mean():
    """Beside a mean of 100 the deviations of 1 keep all of float32's digits."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 1152, generator=generator) + 100
    with VirtualGPU("sm_80", mode="simulate"):
        out = adaln.adaln(x, None, None, None, None, 1e-6, "layer", True)[0]
    truth = reference.adaln(x.double(), None, None, None, None, 1e-6, "layer", True)
    assert error(out, truth) <= 1.02 * error(truth.float(), truth) + 1e-6
