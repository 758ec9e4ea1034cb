"""The virtual driver: what its modes run, what it refuses, what it leaves behind."""

import subprocess
import sys

import pytest
import sample_kernels as kernels
import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from fastdit.testing import VirtualGPU, gpu_of, inspect

ARCHITECTURES = ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"]


def test_importing_fastdit_does_not_import_triton():
    code = "import sys, fastdit, fastdit.testing; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compile_mode_compiles_for_the_target_from_meta_tensors(arch):
    x = torch.empty(1000, device="meta")
    with VirtualGPU(arch, mode="compile") as gpu:
        compiled = kernels.vector_add[(2,)](x, x, x, 1000, BLOCK=512)
    (launch,) = gpu.launches
    assert launch.compiled is compiled
    assert (launch.name, launch.arch, launch.grid) == ("vector_add", arch, (2, 1, 1))
    assert compiled.metadata.target.arch == gpu_of(arch).triton_arch
    assert {"ttir", "ttgir", "llir"} <= set(compiled.asm)
    assert ("amdgcn" if arch == "gfx942" else "cubin") in compiled.asm


def test_interpret_mode_runs_on_cpu_tensors_and_compiles_nothing():
    x, y, out = torch.randn(1000), torch.randn(1000), torch.zeros(1000)
    with VirtualGPU("sm_90") as gpu:
        returned = kernels.vector_add[lambda meta: (triton.cdiv(meta["n"], meta["BLOCK"]),)](
            x, y, out, 1000, BLOCK=256
        )
    assert returned is None
    assert gpu.launches[0].compiled is None
    assert gpu.launches[0].grid == (4, 1, 1)
    assert torch.equal(out, x + y)


def test_simulate_mode_runs_the_compiled_code():
    x, y, out = torch.randn(1000), torch.randn(1000), torch.zeros(1000)
    with VirtualGPU(80, mode="simulate") as gpu:
        kernels.vector_add[(4,)](x, y, out, 1000, BLOCK=256)
    assert torch.equal(out, x + y)
    assert gpu.launches[0].simulation.blocks == 4


def test_warmup_compiles_without_a_launch():
    with VirtualGPU("sm_80") as gpu:
        compiled = kernels.vector_add.warmup(
            torch.float32, torch.float32, torch.float32, 1000, BLOCK=256, grid=(1,)
        )
    assert ".target sm_80" in compiled.asm["ptx"]
    assert gpu.launches == []


def test_too_much_shared_memory_is_refused_as_on_the_device():
    a, b, out = (torch.empty(s, device="meta") for s in ((128, 256), (256, 128), (128, 128)))
    with (
        VirtualGPU("sm_120", mode="compile"),
        pytest.raises(triton.runtime.errors.OutOfResources, match="shared memory"),
    ):
        kernels.tile_product[(1,)](a, b, out, M=128, N=128, K=256, PRECISION="tf32")


@pytest.mark.parametrize("mode", ["interpret", "compile", "simulate"])
def test_autotuned_kernels_run_and_take_the_first_configuration(mode):
    x, out = torch.randn(200), torch.zeros(200)
    with VirtualGPU("sm_80", mode=mode):
        kernels.tuned_double[lambda meta: (triton.cdiv(200, meta["BLOCK"]),)](x, out, 200)
    assert kernels.tuned_double.best_config.kwargs == {"BLOCK": 64}
    assert torch.equal(out, 2 * x) == (mode != "compile")
    kernels.tuned_double.cache.clear()


def test_the_blocks_nest_and_leave_triton_as_it_was():
    before = triton.runtime.driver._active, triton.runtime.jit.JITFunction.run
    x = torch.empty(64, device="meta")
    with VirtualGPU("sm_80", mode="compile") as outer:
        with VirtualGPU("sm_90", mode="compile") as inner:
            kernels.unmasked_copy[(1,)](x, x, BLOCK=64)
        kernels.unmasked_copy[(1,)](x, x, BLOCK=64)
    assert [inspect(gpu.launches[0]).arch for gpu in (outer, inner)] == ["sm_80", "sm_90"]
    assert (triton.runtime.driver._active, triton.runtime.jit.JITFunction.run) == before


def test_a_failing_launch_leaves_the_language_as_it_was():
    language = tl.load, tl.arange, tl.tensor.__add__, tl.dtype.to_ir, libdevice.tanh
    with VirtualGPU("sm_90"), pytest.raises(AttributeError):
        kernels.vector_add[(1,)](torch.zeros(4), None, torch.zeros(4), 4, BLOCK=4)
    with pytest.raises(RuntimeError, match="outside of the scope of a kernel"):
        kernels.centre_and_scale(1, 2, 3)
    after = tl.load, tl.arange, tl.tensor.__add__, tl.dtype.to_ir, libdevice.tanh
    assert after == language
    assert not triton.knobs.runtime.interpret


def test_wrong_arguments_say_what_is_allowed():
    with pytest.raises(ValueError, match="sm_90 \\(H100\\)"):
        VirtualGPU("sm_75")
    with pytest.raises(ValueError, match="'interpret', 'compile', 'simulate'"):
        VirtualGPU("sm_90", mode="run")
    with pytest.raises(ValueError, match="no PTX"):
        VirtualGPU("gfx942", mode="simulate")
    x = torch.empty(64, device="meta")
    with VirtualGPU("sm_90"), pytest.raises(ValueError, match="x_ptr: got a tensor on meta"):
        kernels.unmasked_copy[(1,)](x, x, BLOCK=64)
    with pytest.raises(ValueError, match="mode='compile'"):
        inspect(None)


def test_a_kernel_runs_under_a_custom_op_with_torch_compile():
    @torch.library.custom_op("fastdit_testing::double", mutates_args=())
    def double(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        kernels.vector_add[(1,)](x, x, out, x.numel(), BLOCK=64)
        return out

    double.register_fake(torch.empty_like)
    with VirtualGPU("sm_90"):
        x = torch.randn(64)
        compiled = torch.compile(double, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), 2 * x)
