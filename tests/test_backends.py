"""The choice of implementation: what is asked for runs, or says why not."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch

import fastdit
from fastdit import backends, reference

X, S = torch.randn(2, 3, 8), torch.randn(2, 8)


@pytest.fixture
def kernel():
    """A kernel for adaln on the CPU that says it ran, for widths up to 8."""

    def run(x, *rest):
        _out, *statistics = reference.adaln_saving(x, *rest)
        return torch.full_like(x, 7.0), *statistics

    def unsupported(x, *_rest):
        return None if x.shape[-1] <= 8 else f"width {x.shape[-1]} is over 8"

    kernel = backends.Kernel("adaln", "cpu", "sevens", run, unsupported)
    with backends.replaced("adaln", "cpu", [kernel]):
        yield kernel


def sevens(out: torch.Tensor) -> bool:
    return bool((out == 7).all())


def test_auto_runs_a_kernel_where_one_supports_the_call(kernel):
    assert sevens(fastdit.ops.adaln(X, S, S))
    wide = torch.randn(2, 3, 9)
    torch.testing.assert_close(
        fastdit.ops.adaln(wide), torch.nn.functional.layer_norm(wide, (9,), eps=1e-6)
    )


def test_reference_is_kept_to(kernel):
    with fastdit.backend("reference"):
        assert not sevens(fastdit.ops.adaln(X, S, S))
        assert not sevens(torch.ops.fastdit.adaln(X, S, S, None, None, 1e-6, "layer", True)[0])
    assert sevens(fastdit.ops.adaln(X, S, S))


def test_native_never_falls_back(kernel):
    with fastdit.backend("native"):
        assert sevens(fastdit.ops.adaln(X, S, S))
        with pytest.raises(fastdit.BackendError, match="adaln on cpu: sevens: width 9 is over 8"):
            fastdit.ops.adaln(torch.randn(2, 3, 9))
        with pytest.raises(fastdit.BackendError, match=r"sevens.*backend\('auto'\)"):
            torch.ops.fastdit.adaln(
                torch.randn(1, 1, 9), None, None, None, None, 1e-6, "layer", True
            )


def test_a_slower_kernel_is_passed_over_by_auto_alone(kernel):
    slow = dataclasses.replace(kernel, name="slow sevens", slower=lambda x, *_: "eager is faster")
    backends._kernels["adaln", "cpu"] = [slow]
    assert not sevens(fastdit.ops.adaln(X, S, S))
    (choice,) = fastdit.explain("adaln", X, S, S)
    assert choice.runs == "reference"
    assert choice.rejected == (("slow sevens", "eager is faster"),)
    with fastdit.backend("native"):
        assert sevens(fastdit.ops.adaln(X, S, S))
        assert fastdit.explain("adaln", X, S, S)[0].runs == "slow sevens"
        with pytest.raises(fastdit.BackendError, match="slow sevens: width 9 is over 8"):
            fastdit.ops.adaln(torch.randn(2, 3, 9))
    backends._kernels["adaln", "cpu"] = [slow, kernel]
    assert fastdit.explain("adaln", X, S, S)[0].runs == "sevens"


def test_native_without_any_kernel_says_so():
    x = torch.empty(2, 3, 8, device="meta")
    with (
        fastdit.backend("native"),
        pytest.raises(fastdit.BackendError, match="adaln on meta: no kernel is registered"),
    ):
        fastdit.ops.adaln(x)


def test_blocks_nest_and_restore_on_errors():
    assert fastdit.current_backend() == "auto"
    with fastdit.backend("reference"):
        with pytest.raises(RuntimeError, match="inside"), fastdit.backend("native"):
            raise RuntimeError("inside")
        assert fastdit.current_backend() == "reference"
    assert fastdit.current_backend() == "auto"
    with pytest.raises(ValueError, match="backend: got 'cuda', allowed are 'auto', 'reference'"):
        fastdit.backend("cuda").__enter__()


def test_explain(kernel):
    (choice,) = fastdit.explain("adaln", X, S, scale=S)
    assert (choice.op, choice.device, choice.runs) == ("adaln", "cpu", "sevens")
    (choice,) = fastdit.explain("adaln", torch.randn(1, 2, 9))
    assert choice.runs == "reference"
    assert choice.rejected == (("sevens", "width 9 is over 8"),)
    assert "not sevens: width 9 is over 8" in str(choice)
    with fastdit.backend("reference"):
        assert "asked for" in str(fastdit.explain("adaln", X))
    with fastdit.backend("native"):
        assert fastdit.explain("adaln", torch.randn(1, 2, 9))[0].runs == "an error"
    assert {c.op for c in fastdit.explain()} == set(backends.OPS)
    with pytest.raises(ValueError, match="op: got 'softmax', allowed are adaln"):
        fastdit.explain("softmax")
    with pytest.raises(ValueError, match="op: got None with arguments"):
        fastdit.explain(None, X)
    with pytest.raises(ValueError, match="shift: got"):
        fastdit.explain("adaln", X, torch.ones(3))


def test_gradients_flow_through_a_kernel(kernel):
    """A kernel's forward is differentiated by adaln_backward, here the reference's."""
    x = X.clone().requires_grad_()
    fastdit.ops.adaln(x, S, S).square().sum().backward()
    with fastdit.backend("reference"):
        y = X.clone().requires_grad_()
        fastdit.ops.adaln(y, S, S).backward(torch.full_like(y, 14.0))
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-4)


def test_import_is_light():
    """`import fastdit` brings neither triton nor diffusers nor the tools of single commands."""
    code = "import sys, fastdit; print(*sorted(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = set(out.stdout.split())
    without = subprocess.run(
        [sys.executable, "-c", code.replace(", fastdit", ", torch")],
        capture_output=True,
        text=True,
        check=True,
    )
    new = modules - set(without.stdout.split())
    heavy = {"triton", "diffusers", "matplotlib", "sklearn", "rich", "PIL", "tqdm", "safetensors"}
    assert not heavy & {name.partition(".")[0] for name in new}
