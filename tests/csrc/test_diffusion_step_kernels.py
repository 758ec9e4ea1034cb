"""The code of diffusion_step's kernels: under sanitizers, as cubins, as PTX that is executed."""

from __future__ import annotations

import math
import re
import subprocess

import compilers
import numpy as np
import pytest
import torch
from triton import knobs

from fastdit import reference
from fastdit.testing import run_ptx
from fastdit.testing.resources import is_wide

KERNELS = "diffusion_step_kernels.cu"
THREADS, PIXELS = 128, 4
STORAGE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
PAIRS = {  # dtypes of x and of the model's output, and their names in a mangled symbol
    (torch.float32, torch.float32): "IffE",
    (torch.bfloat16, torch.bfloat16): "INS_8bfloat16ES1_E",
    (torch.float16, torch.float16): "INS_4halfES1_E",
    (torch.float32, torch.bfloat16): "IfNS_8bfloat16EE",
    (torch.float32, torch.float16): "IfNS_4halfEE",
}


# ---- on the host -------------------------------------------------------------------------------


def test_philox_and_its_normals():
    """Random123's vectors, at::philox_engine, and double precision over the functions' domains."""
    assert "0 failures" in compilers.run_host("philox.cpp", "-O2", "-fno-math-errno")


def test_cuda_kernels_under_sanitizers():
    """Whole grids with tails, misalignment and every option; offsets beyond 2³¹."""
    assert "0 failures" in compilers.run_host("diffusion_step_cuda.cpp", *compilers.SANITIZERS)


def test_no_two_blocks_of_a_cuda_grid_write_one_element():
    """ThreadSanitizer, and nothing by which the threads of these kernels could cooperate."""
    sources = "".join(path.read_text() for path in (compilers.CSRC / "cuda").glob("*.cu*"))
    assert not re.search(r"__shared__|__sync|__shfl|atomic|cooperative", sources)
    flags = ("-fsanitize=thread", *compilers.QUICK)
    assert "0 failures" in compilers.run_host("diffusion_step_cuda.cpp", *flags)


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_cpu_loops_under_sanitizers(isa):
    if isa not in compilers.ISAS:
        pytest.skip(f"not an instruction set of this machine: {isa}")
    flags = (*compilers.ISAS[isa], f"-DFASTDIT_ISA={isa}", *compilers.SANITIZERS)
    assert "0 failures" in compilers.run_host("diffusion_step_cpu.cpp", *flags)


# ---- cubins ------------------------------------------------------------------------------------


def tool(name: str, *arguments: str) -> str:
    command = [getattr(knobs.nvidia, name).path, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_registers_spills_and_access_widths(arch):
    cubin = str(compilers.compile_cuda(KERNELS, arch, "cubin"))
    usage = re.findall(
        r"Function (\w+):\s+REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)",
        tool("cuobjdump", "-res-usage", cubin),
    )
    assert len(usage) == 10
    assert all(int(registers) <= 64 for _, registers, _, _ in usage)
    assert all(stack == local == "0" for _, _, stack, local in usage)
    for section in tool("nvdisasm", "-c", cubin).split(".section\t.text.")[1:]:
        name = section.split(",")[0]
        opcodes = re.findall(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", section)
        assert not [code for code in opcodes if code.startswith(("LDL", "STL"))]
        loads = sum(code.startswith("LDG") and is_wide(code) for code in opcodes)
        stores = sum(code.startswith("STG") and is_wide(code) for code in opcodes)
        if "tokens" not in name or "Iff" in name:
            # x, noise and the previous x0; x' and x0. Of a bfloat16 or half x's image also the
            # output, its σ half, and both of the null half.
            assert (loads, stores) >= (3, 2), name


# ---- PTX, executed -----------------------------------------------------------------------------


def launch(x, output, table, step, noise, previous, clip, learned, guided, seed, patch):
    """One launch of the compiled kernel in the simulator, with `StepCall` as csrc lays it out."""
    channels, plane = x.shape[1], math.prod(x.shape[2:])
    pixels = math.prod(patch) if patch else 1
    out_channels = output.shape[2] // pixels if patch else output.shape[1]
    results = torch.full_like(x, math.nan), torch.full_like(x, math.nan)
    call = [
        *(x, output, noise, previous, *results, table, step, seed),
        *map(np.int64, (x.shape[0], channels, plane, out_channels, guided, table.shape[0])),
        *map(np.int32, (step.dim(), 0 if seed is None else seed.dim(), learned)),
        np.float32(math.inf if clip is None else clip),
        *map(np.int32, (x.shape[-1] if patch else 0, *(patch or [1, 0]))),
        *map(np.int32, (STORAGE[x.dtype], STORAGE[output.dtype])),
    ]
    run = PIXELS if patch else 16 // x.element_size()
    blocks = -(-(plane if patch else channels * plane) // (THREADS * run)) * x.shape[0]
    ptx = compilers.compile_cuda(KERNELS, "sm_80", "ptx").read_text()
    name = f"diffusion_step_{'tokens' if patch else 'image'}{PAIRS[x.dtype, output.dtype]}"
    return results, run_ptx(ptx, (blocks,), (THREADS,), [call], kernel=name)


def random(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def arguments(dtype, output_dtype, noise, patch=None, size=(4, 12)):
    channels, batch = 4, 3
    shape = (batch, channels, *size)
    x, given, previous = (random(*shape, dtype=dtype, seed=s) for s in (0, 1, 2))
    shape = (6, 2 * channels, *size)
    if patch:
        pixels = math.prod(patch)
        shape = (6, math.prod(size) // pixels, pixels * 2 * channels)
    output = random(*shape, dtype=output_dtype, seed=3)
    seed = {"seed": torch.tensor(2**40 + 3), "seeds": torch.tensor([5, -1, 7])}.get(noise)
    given = given if noise == "given" else None
    step = torch.tensor([2, 0, 3])
    table = random(4, 9, dtype=torch.float32, seed=4).abs() * torch.tensor([1.0] * 6 + [-1, -1, 1])
    return x, output, table, step, given, previous, 0.9, noise is not None, 3, seed, patch


@pytest.mark.parametrize("patch", [None, [2, 3]], ids=["image", "tokens"])
@pytest.mark.parametrize("noise", [None, "given", "seed", "seeds"])
@pytest.mark.parametrize(("dtype", "output_dtype"), PAIRS, ids=str)
def test_the_compiled_ptx_computes_the_definition(dtype, output_dtype, noise, patch):
    args = arguments(dtype, output_dtype, noise, patch)
    got, _ = launch(*args)
    exact = reference.diffusion_step(
        *(a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args)
    )
    for g, e in zip(got, exact, strict=True):
        rounding = torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 0
        assert ((g.double() - e).abs() <= rounding * e.abs() + 3e-6).all()


@pytest.mark.parametrize("patch", [None, [2, 2]], ids=["image", "tokens"])
def test_memory_is_moved_once_in_whole_sectors(patch):
    args = arguments(torch.float32, torch.float32, "given", patch, size=(16, 16))
    x, output, *_ = args
    _, found = launch(*args)
    assert found.stores.dram_bytes == 2 * x.nbytes
    assert found.stores.efficiency == 1.0
    assert found.divergent_branches == 0
    # x, noise and the previous x0 whole; of the null half 3 of 8 channels, which in token rows
    # share their sectors with the others; steps and coefficients at most 6 sectors.
    null = output.nbytes // 2 * 3 // 8 if patch is None else output.nbytes // 2
    least = 3 * x.nbytes + output.nbytes // 2 + null
    assert least <= found.loads.dram_bytes <= least + 6 * 32
    if patch is None:
        assert found.loads.efficiency == 1.0
