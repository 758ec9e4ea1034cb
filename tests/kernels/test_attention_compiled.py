"""The Triton attention kernels compiled: resources on each architecture, PTX in the simulator."""

from __future__ import annotations

import pytest
import torch
from attention_cases import BF16, FP16, FP32, Case, eager, errors, fused, make
from baselines import hold_instructions

from fastdit.kernels.attention_tiles import HEAD_DIMS
from fastdit.testing import VirtualGPU, inspect
from fastdit.testing.resources import sass_opcodes

KERNELS = ("attention_kernel", "dq_kernel", "dkv_kernel")
HEADS = {64: 12, 72: 16, 104: 8, 128: 8}  # 64: DiT-S, B and L; 72: DiT-XL

MOST = {
    ("sm_80", 64, 256): ((172, 40), (128, 24), (168, 25)),
    ("sm_80", 72, 256): ((168, 50), (168, 30), (168, 26)),
    ("sm_80", 72, 250): ((182, 50), (185, 30), (168, 26)),
    ("sm_90", 64, 256): ((186, 80), (122, 64), (197, 65)),
    ("sm_90", 72, 256): ((136, 60), (130, 80), (226, 81)),
    ("sm_90", 128, 64): ((205, 32), (186, 96), (220, 65)),
    ("sm_100", 64, 256): ((188, 81), (107, 73), (115, 81)),
    ("sm_100", 72, 256): ((132, 81), (124, 99), (142, 61)),
    ("sm_120", 64, 256): ((156, 24), (132, 24), (172, 25)),
    ("sm_120", 72, 256): ((192, 30), (176, 30), (166, 26)),
    ("sm_120", 104, 250): ((179, 28), (204, 42), (254, 22)),
    ("gfx942", 64, 256): ((158, 16), (112, 8), (160, 8)),
    ("gfx942", 72, 256): ((159, 16), (139, 8), (215, 8)),
}
"""(architecture, head_dim, tokens) to the registers and KiB of shared memory of each kernel, the
most of Triton 3.8 and 3.9."""

TENSOR_CORE = {"sm_80": 40, "sm_90": 8, "sm_100": 12, "sm_120": 40, "gfx942": 16}
INSTRUCTION = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "sm_120": "HMMA"}
ARCHITECTURES = (*INSTRUCTION, "gfx942")


def compiled(arch: str, case: Case):
    with VirtualGPU(arch, mode="compile") as gpu:
        fused(make(case, device="meta"))
    return {launch.name: launch for launch in gpu.launches}


def resources(arch: str, case: Case):
    return {name: inspect(launch) for name, launch in compiled(arch, case).items()}


def tensor_core_instructions(launch) -> int:
    """Those of the launch's own architecture: a Hopper that fell back to HMMA has none."""
    if launch.arch == "gfx942":
        return inspect(launch).tensor_core
    opcodes = sass_opcodes(launch.compiled.asm["cubin"])
    return sum(n for name, n in opcodes.items() if name.split(".")[0] == INSTRUCTION[launch.arch])


@pytest.mark.parametrize(("arch", "head_dim", "tokens"), MOST)
def test_resources(arch, head_dim, tokens):
    """No spills, wide accesses, tensor cores, and no more registers and memory than committed.

    On gfx942 the products leave four neighbouring channels in a thread: 64-bit stores.
    """
    launches = compiled(arch, Case(head_dim, HEADS[head_dim], tokens, BF16, batch=2))
    found = {name: inspect(launch) for name, launch in launches.items()}
    for name, (registers, kib) in zip(KERNELS, MOST[arch, head_dim, tokens], strict=True):
        kernel = found[name]
        assert kernel.spills == kernel.stack_bytes == 0, kernel
        assert kernel.registers <= registers, kernel
        assert kernel.shared_bytes <= 1024 * kib, kernel
        assert tensor_core_instructions(launches[name]) >= TENSOR_CORE[arch], kernel
        assert kernel.loads_wide > 0, kernel
        assert arch == "gfx942" or kernel.stores_wide >= head_dim // 16, kernel
    if head_dim == 72:
        assert found["attention_kernel"].registers <= 200


def check_any_head(arch: str, case: Case) -> None:
    """What holds for every head_dim, dtype and option."""
    for name, launch in compiled(arch, case).items():
        kernel = inspect(launch)
        assert kernel.spills == kernel.stack_bytes == 0, kernel
        if name in KERNELS:
            assert kernel.loads_wide > 0, kernel
            assert arch == "gfx942" or kernel.stores_wide > 0, kernel
            if arch == "gfx942" and case.dtype == FP32:  # its MFMA of float32 is IEEE's
                assert "_xf32" not in launch.compiled.asm["amdgcn"]
            else:
                assert (tensor_core_instructions(launch) > 0) == (case.dtype != FP32), kernel


# Another number of parts, another dtype; three parts fill sm_100's tensor memory.
SOME_HEADS = [
    ("sm_90", Case(24, 8, 250, FP16, batch=2)),
    ("sm_100", Case(112, 8, 250, BF16, batch=2)),
]


@pytest.mark.parametrize(("arch", "case"), SOME_HEADS, ids=str)
def test_other_heads(arch, case):
    check_any_head(arch, case)


PREPARED = {"qk_norm": "layer", "affine": True, "rope": "adjacent"}


@pytest.mark.slow  # an hour of compilation
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("options", [{}, PREPARED], ids=["plain", "norm-rope"])
def test_every_head(arch, head_dim, dtype, options):
    """Tokens that fill their tiles, that do not, and those of the tiles for few tokens."""
    check_any_head(arch, Case(head_dim, 8, 250 if options else 256, dtype, batch=2, **options))
    if not options and dtype == BF16:
        check_any_head(arch, Case(head_dim, 8, 64, dtype, batch=2))


@pytest.mark.parametrize("arch", ["sm_80", "gfx942"])
@pytest.mark.parametrize("rope", ["adjacent", "halves"])
def test_resources_of_qk_norm_and_rope(arch, rope):
    case = Case(72, 16, 256, BF16, batch=2, qk_norm="layer", affine=True, rope=rope)
    found = resources(arch, case)
    for name, registers in (("prepare_kernel", 56), ("prepare_backward_kernel", 122)):
        kernel = found[name]
        assert kernel.spills == kernel.stack_bytes == kernel.tensor_core == 0, kernel
        assert kernel.registers <= registers, kernel
        if rope == "adjacent" and arch != "gfx942":  # halves: 36 channels; gfx942: 4 a thread
            assert kernel.loads_wide >= 6, kernel
            assert kernel.stores_wide >= 2, kernel


def test_one_head_of_72_channels_is_loaded_128_bits_at_a_time():
    """Rows 216 elements apart: a multiple of 8, not of 16, which Triton would not notice."""
    found = resources("sm_80", Case(72, 1, 256, BF16))
    assert found["attention_kernel"].loads_narrow == 0
    assert found["attention_kernel"].loads_wide >= 25


SIMULATED = {
    # case: warp instructions of the forward, dq and dk/dv
    Case(64, 1, 64, FP16): (3436, 4228, 4208),
    Case(72, 1, 100, BF16, strided=True): (13416, 15416, 15120),
}


def check_errors(call, results) -> None:
    """Each output and gradient at most 1.25 times as far from float64 as eager's."""
    exact = eager(call.in_dtype(torch.float64))
    ours, theirs = errors(results, exact), errors(eager(call), exact)
    for name in ours:
        assert ours[name] <= 1.25 * theirs[name], name


@pytest.mark.parametrize("case", SIMULATED, ids=str)
def test_simulated_kernels(case):
    call = make(case)
    with VirtualGPU("sm_80", mode="simulate") as gpu:
        results = fused(call)
    check_errors(call, results)
    for launch in gpu.launches:
        simulation = launch.simulation
        assert simulation.shared.conflict_ratio < 1.5
        assert simulation.divergent_branches == 0
        columns = sum(width for _start, width in launch.arguments["PARTS"])
        products = {"attention_kernel": 2, "dq_kernel": 3, "dkv_kernel": 4}[launch.name]
        queries, keys = padded(case.tokens, launch.arguments)
        assert simulation.mma_flops == 2 * products * queries * keys * columns
        assert 128 in simulation.loads.widths
        assert set(simulation.stores.widths) <= {128, 32}  # 32: lse and delta
    counts = [launch.simulation.warp_instructions for launch in gpu.launches]
    hold_instructions(counts, SIMULATED[case])


def padded(tokens: int, arguments: dict) -> tuple[int, int]:
    return tuple(-(-tokens // arguments[b]) * arguments[b] for b in ("BLOCK_M", "BLOCK_N"))


def test_simulated_qk_norm_and_rope():
    case = Case(72, 1, 20, BF16, qk_norm="layer", affine=True, rope="adjacent")
    call = make(case)
    with VirtualGPU("sm_80", mode="simulate") as gpu:
        results = fused(call)
    check_errors(call, results)
    for launch in gpu.launches:
        if launch.name.startswith("prepare"):
            assert launch.simulation.shared.conflict_ratio < 1.5
            assert launch.simulation.divergent_branches == 0
            assert launch.simulation.stores.efficiency >= 0.9  # heads of 144 bytes end mid-sector


def test_simulated_float32():
    """IEEE products on the multiply-add units: exact to float32, no tensor core."""
    call = make(Case(24, 1, 33, FP32, batch=2))
    with VirtualGPU("sm_80", mode="simulate") as gpu:
        results = fused(call)
    check_errors(call, results)
    assert all(launch.simulation.mma_flops == 0 for launch in gpu.launches)
