"""The patch_embed kernels as compiled: registers, widths, tensor cores, and their PTX simulated."""

from __future__ import annotations

import patch_cases
import pytest
import torch
from baselines import hold_instructions
from patch_cases import (
    ALL,
    ARCHITECTURES,
    beats_eager,
    check_patch_gradients,
    error,
    patch_inputs,
    run,
)

from fastdit import reference
from fastdit.kernels import patch_embed as kernels

DIT = (2, 4, (8, 8), (2, 2), 128)


# Registers at most and occupancy at least, on NVIDIA, of any DiT's patch.
BUDGET = {
    ("forward_kernel", 2): (128, 0.25),
    ("forward_kernel", 4): (128, 0.25),
    ("gradients_kernel", 2): (128, 0.25),
    ("gradients_kernel", 4): (128, 0.25),
    ("gather_kernel", 2): (48, 0.62),
    ("gather_kernel", 4): (48, 0.62),
    ("sum_rows_kernel", 2): (48, 0.62),
    ("sum_rows_kernel", 4): (48, 0.62),
}


SUMS = ("sum_rows_kernel", "gather_kernel")


def compiled(arch, patch, dtype, pos_dtype=None, widths=(1152,)):
    for width in widths:
        x = torch.empty(32, 4, 32, 32, dtype=dtype, device="meta")
        weight = torch.empty(width, 4, patch, patch, dtype=dtype, device="meta")
        bias = torch.empty(width, dtype=dtype, device="meta")
        tokens = (32 // patch) ** 2
        pos = torch.empty(1, tokens, width, dtype=pos_dtype or dtype, device="meta")
        args = (x, weight, bias, pos)
        out, forward = run(kernels.patch_embed, *args, arch=arch, mode="compile")
        yield from forward
        for wanted in (ALL, [False, True, True, False]):
            yield from run(
                kernels.patch_embed_backward, out, *args, wanted, arch=arch, mode="compile"
            )[1]


@pytest.mark.parametrize(
    ("arch", "patch", "dtype"),
    [(arch, 2, torch.bfloat16) for arch in ARCHITECTURES]
    + [("sm_90", 8, torch.bfloat16), ("sm_80", 2, torch.float32)],
)
def test_compiled_code(arch, patch, dtype):
    """At DiT-S, B, L and XL's widths, which share their code."""
    for launch in compiled(arch, patch, dtype, widths=patch_cases.WIDTHS.values()):
        found = patch_cases.resources(launch)
        assert found.spills == found.stack_bytes == 0
        assert found.loads_wide > 0
        products = launch.name not in SUMS and dtype != torch.float32
        if arch.startswith("sm_"):
            registers, occupancy = BUDGET[launch.name, dtype.itemsize]
            assert found.registers <= registers
            assert found.occupancy.fraction >= occupancy - 0.01
            assert (found.tensor_core > 0) == products
            # The tokens leave 128 bits at a time; the sums too, but for the bias's row, dpos and
            # the two columns of a patch of dx.
            if launch.name == "forward_kernel":
                assert found.stores_narrow == 0 < found.stores_wide
            if launch.name == "gradients_kernel":
                direct = launch.arguments["dx_ptr"] is not None
                assert found.stores_narrow <= 2 + direct <= 1 + found.stores_wide
        elif products:
            assert found.tensor_core > 0


@pytest.mark.parametrize(
    ("arch", "patch", "dtype", "pos_dtype"),
    [
        ("sm_80", 8, torch.float32, None),
        ("sm_80", 1, torch.bfloat16, None),
        ("sm_80", 2, torch.bfloat16, torch.float32),
        ("sm_100", 8, torch.bfloat16, torch.float32),
        ("gfx942", 4, torch.float16, torch.float32),
    ],
)
def test_other_mixtures_compile_without_spilling(arch, patch, dtype, pos_dtype):
    for launch in compiled(arch, patch, dtype, pos_dtype):
        found = patch_cases.resources(launch)
        assert found.spills == found.stack_bytes == 0
        if launch.name == "gradients_kernel" and dtype != torch.float32:
            assert found.tensor_core > 0  # a float32 gradient does not leave them


# Warp instructions of PTX for 2 samples of 8×8 latents to D = 128: the forward, dweight and dbias
# alone, dx alone, and the pass for all gradients.
INSTRUCTIONS = {
    ("sm_80", torch.bfloat16): (3168, 3952, 1104, 4816),
    ("sm_80", torch.float32): (5048, 5912, 3968, 10632),
    ("sm_90", torch.bfloat16): (2856, 3688, 1104),
    ("sm_90", torch.float32): (5000, 5840, 4240, 10872),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_compiled_code_simulated(arch, dtype):
    args, dtokens = patch_inputs(DIT, dtype)
    tokens, (forward,) = run(kernels.patch_embed, *args, arch=arch, mode="simulate")
    exact = reference.patch_embed(*(a.double() for a in args))
    assert beats_eager(tokens, reference.patch_embed(*args), exact)
    truth = reference.patch_embed_backward(dtokens.double(), *(a.double() for a in args), ALL)
    masks = [[False, True, True, False], [True, False, False, False], ALL]
    if (arch, dtype) == ("sm_90", torch.bfloat16):
        masks.pop()  # its products are wgmma, which no simulation knows
    launches = [forward]
    for mask in masks:
        got, backward = run(
            kernels.patch_embed_backward, dtokens, *args, mask, arch=arch, mode="simulate"
        )
        launches += backward
        for gradient, wanted in zip(got, truth, strict=True):
            if gradient.numel():
                floor = patch_cases.rounding_floor(wanted, dtype)
                assert error(gradient, wanted) <= 1.02 * floor + 4e-6 * wanted.abs().max()
    for launch in launches:
        simulation = launch.simulation
        assert simulation.divergent_branches == 0
        if dtype == torch.bfloat16:
            assert simulation.shared.conflict_ratio < 1.5
            assert (simulation.mma_flops > 0) == (launch.name not in SUMS)
    assert forward.simulation.stores.efficiency == 1.0
    assert forward.simulation.dram_bytes == sum(a.nbytes for a in args) + tokens.nbytes
    counted = [one for one in launches if one.name not in SUMS][: len(INSTRUCTIONS[arch, dtype])]
    hold_instructions(
        [launch.simulation.warp_instructions for launch in counted], INSTRUCTIONS[arch, dtype]
    )


def test_masks_hold_in_compiled_code():
    args, dtokens = patch_inputs((2, 3, (6, 5), (3, 5), 40), torch.bfloat16)
    tokens, _ = run(kernels.patch_embed, *args, arch="sm_80", mode="simulate")
    exact = reference.patch_embed(*(a.double() for a in args))
    assert beats_eager(tokens, reference.patch_embed(*args), exact)
    got, _ = run(kernels.patch_embed_backward, dtokens, *args, ALL, arch="sm_80", mode="simulate")
    check_patch_gradients(got, args, dtokens)
