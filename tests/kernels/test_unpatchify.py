"""The unpatchify kernel, both ways: every bit in its place, wide accesses, the op that runs it."""

from __future__ import annotations

import math

import patch_cases
import pytest
import torch
from baselines import hold_instructions
from patch_cases import ARCHITECTURES, run, seeded

import fastdit
from fastdit import reference
from fastdit.kernels import unpatchify as kernels

# patch, grid, channels: DiT's patches and latents; odd and non-square ones; signals.
CASES = [
    ([1, 1], [3, 16], 4),
    ([2, 2], [2, 16], 8),
    ([2, 2], [4, 4], 4),
    ([4, 4], [2, 8], 8),
    ([8, 8], [1, 4], 4),
    ([2, 4], [3, 5], 3),
    ([3, 5], [2, 7], 6),
    ([5, 1], [1, 9], 1),
    ([4], [6], 3),
    ([1], [33], 5),
    ([7], [2], 2),
]
# Tiles that are parts of a patch: too many channels, columns, rows for one.
LARGE = [([2], [2], 5000), ([3, 1500], [1, 2], 3), ([96, 16], [1, 1], 4)]


def tokens_of(patch, grid, channels, dtype=torch.float32, batch=2):
    return seeded(batch, math.prod(grid), math.prod(patch) * channels, seed=0, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("patch", "grid", "channels"), CASES + LARGE)
def test_every_element_moves_once_each_way(patch, grid, channels, dtype):
    tokens = tokens_of(patch, grid, channels, dtype)
    image, (there,) = run(kernels.unpatchify, tokens, patch, grid, channels)
    assert image.is_contiguous()
    assert torch.equal(image, reference.unpatchify(tokens, patch, grid, channels))
    back, (again,) = run(kernels.unpatchify_backward, image, patch, grid, channels)
    assert back.is_contiguous()
    assert torch.equal(back, tokens)
    for trace in (there.trace, again.trace):
        assert sum(trace.loaded.values()) == sum(trace.stored.values()) == tokens.nbytes


def test_any_bit_pattern_survives():
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16)
    tokens = bits.view(4, 16, 1024)
    image, _ = run(kernels.unpatchify, tokens, [8, 8], [4, 4], 16)
    back, _ = run(kernels.unpatchify_backward, image, [8, 8], [4, 4], 16)
    assert torch.equal(back.view(torch.int16), tokens.view(torch.int16))


def test_strided_inputs():
    patch, grid, channels = [2, 2], [3, 4], 3
    wide = seeded(2, 2 * 12, 30, seed=0)
    rows, columns = wide[:, ::2, 5:17], wide.view(2, 30, 24).mT[:, :12, :12]
    for tokens, copied in ((rows, False), (columns, True)):
        image, (launch,) = run(kernels.unpatchify, tokens, patch, grid, channels)
        assert torch.equal(image, reference.unpatchify(tokens, patch, grid, channels))
        assert (launch.arguments["tokens_ptr"].data_ptr() != tokens.data_ptr()) == copied
    whole = seeded(2, 12, 20, seed=2)[:, :, :16]  # rows of whole patches, with gaps between
    image, _ = run(kernels.unpatchify, whole, patch, grid, 4)
    assert torch.equal(image, reference.unpatchify(whole, patch, grid, 4))
    dimage = seeded(2, 6, 12, 16, seed=1)[:, ::2, ::2, 8:]
    back, (launch,) = run(kernels.unpatchify_backward, dimage, patch, grid, channels)
    assert torch.equal(back, reference.unpatchify_backward(dimage, patch, grid, channels))
    assert launch.arguments["image_ptr"].data_ptr() == dimage.data_ptr()


def test_offsets_beyond_32_bits():
    """Samples 2^30 + 3 elements apart: the third begins beyond 2^31."""
    far = torch.empty(2**31 + 2**10, dtype=torch.bfloat16)
    far = far.as_strided((3, 4, 8), (2**30 + 3, 8, 1))
    tokens = tokens_of([2, 2], [2, 2], 2, torch.bfloat16, batch=3)
    far.copy_(tokens)
    with patch_cases.VirtualGPU("sm_90", trace=False):
        image = kernels.unpatchify(far, [2, 2], [2, 2], 2)
        assert torch.equal(image, reference.unpatchify(tokens, [2, 2], [2, 2], 2))
        dimage = far.as_strided((3, 2, 4, 4), (2**30 + 3, 16, 4, 1))
        back = kernels.unpatchify_backward(dimage, [2, 2], [2, 2], 2)
    assert torch.equal(
        back, reference.unpatchify_backward(tokens.view(3, 2, 4, 4), [2, 2], [2, 2], 2)
    )


def test_a_sample_of_more_than_32_bits_is_left_to_eager():
    huge = torch.empty(1, 2**16 + 1, 2**15, device="meta")
    assert "spans 2^31" in kernels._unsupported(huge, [1], [2**16 + 1], 2**15)
    assert kernels._unsupported(huge[:, 1:], [1], [2**16], 2**15) is None


def test_empty():
    image, launches = run(kernels.unpatchify, torch.zeros(0, 4, 12), [2, 2], [2, 2], 3)
    assert image.shape == (0, 3, 4, 4)
    back, more = run(kernels.unpatchify_backward, image, [2, 2], [2, 2], 3)
    assert back.shape == (0, 4, 12)
    assert launches == more == []


@pytest.mark.parametrize(
    ("arch", "patch"),
    [(arch, patch) for arch in ARCHITECTURES for patch in (2, 8)]
    + [(arch, patch) for arch in ("sm_80", "sm_90") for patch in (1, 4)],
)
def test_compiled_code(arch, patch):
    """Every access is 128 bits wide, both ways, for the 32×32 latents of every DiT."""
    grid, pair = [32 // patch] * 2, [patch, patch]
    dtype = torch.float32 if arch == "sm_80" else torch.bfloat16
    tokens = torch.empty(32, grid[0] ** 2, patch**2 * 8, dtype=dtype, device="meta")
    image, forward = run(kernels.unpatchify, tokens, pair, grid, 8, arch=arch, mode="compile")
    _, backward = run(kernels.unpatchify_backward, image, pair, grid, 8, arch=arch, mode="compile")
    for launch in (*forward, *backward):
        found = patch_cases.resources(launch)
        assert found.spills == found.stack_bytes == 0
        assert found.registers <= 56
        assert found.occupancy.fraction >= 0.5
        assert found.loads_narrow == found.stores_narrow == 0 < found.loads_wide
        assert found.stores_wide > 0


# Warp instructions of PTX for one sample of the 32×32 latents, in bfloat16: forward, backward.
INSTRUCTIONS = {
    ("sm_80", 2): (2608, 2608),
    ("sm_80", 4): (2640, 2016),
    ("sm_80", 8): (2576, 2096),
    ("sm_90", 2): (2608, 2608),
    ("sm_90", 4): (2144, 2016),
    ("sm_90", 8): (2208, 2096),
}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("patch", [2, 4, 8])
def test_compiled_code_simulated(arch, patch):
    grid, pair = [32 // patch] * 2, [patch, patch]
    tokens = tokens_of(pair, grid, 8, torch.bfloat16, batch=1)
    image, forward = run(kernels.unpatchify, tokens, pair, grid, 8, arch=arch, mode="simulate")
    back, backward = run(
        kernels.unpatchify_backward, image, pair, grid, 8, arch=arch, mode="simulate"
    )
    assert torch.equal(image, reference.unpatchify(tokens, pair, grid, 8))
    assert torch.equal(back, tokens)
    counts = []
    for simulation in (forward[0].simulation, backward[0].simulation):
        assert simulation.loads.efficiency == simulation.stores.efficiency == 1.0
        assert simulation.dram_bytes == 2 * tokens.nbytes
        assert simulation.divergent_branches == 0
        assert simulation.shared.conflict_ratio < 1.5
        counts.append(simulation.warp_instructions)
    hold_instructions(counts, INSTRUCTIONS[arch, patch])


@pytest.mark.parametrize(("patch", "grid", "channels"), [([3, 5], [2, 7], 6), ([2], [9], 3)])
def test_masks_hold_in_compiled_code(patch, grid, channels):
    tokens = tokens_of(patch, grid, channels)
    image, _ = run(kernels.unpatchify, tokens, patch, grid, channels, mode="simulate")
    back, _ = run(kernels.unpatchify_backward, image, patch, grid, channels, mode="simulate")
    assert torch.equal(image, reference.unpatchify(tokens, patch, grid, channels))
    assert torch.equal(back, tokens)


def test_the_op_runs_the_kernels():
    tokens = tokens_of([2, 3], [2, 4], 3).requires_grad_()
    args = (tokens, [2, 3], [2, 4], 3)
    torch.compiler.reset()
    compiled = torch.compile(fastdit.ops.unpatchify, fullgraph=True, backend="aot_eager")
    with patch_cases.on_the_cpu("unpatchify") as gpu:
        assert fastdit.explain("unpatchify", *args)[0].runs == "triton"
        image = fastdit.ops.unpatchify(*args)
        (gradient,) = torch.autograd.grad(image, tokens, image.detach())
        assert len(gpu.launches) == 2
        assert torch.equal(gradient, tokens)
        report = torch.library.opcheck(torch.ops.fastdit.unpatchify.default, args)
        assert set(report.values()) == {"SUCCESS"}
        assert torch.equal(compiled(*args), image)
        with torch.autocast("cpu", torch.bfloat16):
            assert fastdit.ops.unpatchify(*args).dtype == torch.float32
        with pytest.raises(fastdit.BackendError, match="tokens is float64, the Triton kernels"):
            fastdit.ops.unpatchify(tokens.double(), *args[1:])
