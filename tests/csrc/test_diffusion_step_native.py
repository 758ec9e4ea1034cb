"""diffusion_step of the compiled library as an op: its own checks, layouts, threads, tracing."""

from __future__ import annotations

import pytest
import torch

import fastdit
from fastdit import backends, reference
from fastdit.ops import diffusion_step


@pytest.fixture(scope="module", autouse=True)
def library():
    if not any(k.name == "csrc" for k in backends.kernels_for("diffusion_step", "cpu")):
        pytest.skip("the compiled library is not built")


def native(*args):
    return torch.ops.fastdit_native.diffusion_step.default(*args)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def arguments(shape=(2, 4, 6, 8), **changes):
    """Schema arguments by name, all options on."""
    batch, channels, *size = shape
    table = random(4, 9, seed=9).abs() * torch.tensor([1.0] * 6 + [-1, -1, 1])
    return {
        "x": random(*shape),
        "model_output": random(2 * batch, 2 * channels, *size, seed=1),
        "table": table,
        "step": torch.arange(batch) % 4,
        "noise": random(*shape, seed=2),
        "x0_previous": random(*shape, seed=3),
        "clip": 0.8,
        "learned_range": True,
        "guided_channels": 3,
        "seed": None,
        "patch": None,
    } | changes


def close_to_definition(args: dict, rtol: float = 2e-6) -> None:
    exact = [
        a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
        for a in args.values()
    ]
    for got, want in zip(native(*args.values()), reference.diffusion_step(*exact), strict=True):
        assert got.is_contiguous()
        assert ((got - want).abs() <= rtol * want.abs().clamp(min=1)).all()


def test_strided_and_expanded_arguments():
    args = arguments()
    args |= {
        "x": args["x"].transpose(2, 3).contiguous().transpose(2, 3),
        "model_output": random(8, 16, 6, 8, seed=5)[::2, ::2],
        "table": random(9, 4, seed=9).abs().T,
        "step": torch.tensor([3]).expand(2),
        "noise": random(2, 4, 6, 16, seed=2)[..., ::2],
        "x0_previous": random(1, 4, 6, 8, seed=3).expand(2, 4, 6, 8),
    }
    close_to_definition(args)
    close_to_definition(args | {"noise": None, "seed": torch.arange(6)[::3]})


@pytest.mark.parametrize(
    "shape", [(0, 4, 6, 8), (2, 4, 0, 8), (3, 5), (2, 3, 7), (2, 3, 2, 3, 4)], ids=str
)
def test_other_shapes(shape):
    close_to_definition(arguments(shape))


@pytest.mark.parametrize(
    "changes", [{}, {"noise": None, "seed": torch.tensor(3)}], ids=["given", "seed"]
)
def test_bits_do_not_depend_on_the_number_of_threads(changes):
    args = arguments((5, 3, 96, 97), **changes)  # 136 chunks, the last of each sample short
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(native(*args.values()))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("output_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_mixture_of_dtypes(dtype, output_dtype):
    args = arguments()
    for name in ("x", "noise", "x0_previous"):
        args[name] = args[name].to(dtype)
    args["model_output"] = args["model_output"].to(output_dtype)
    close_to_definition(args, 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps)


def test_nan_and_infinity_stay():
    args = arguments()
    args["x"][0, 0, 0, :2] = torch.tensor([float("nan"), float("inf")])
    args["model_output"][1, 5, 0, 0] = float("nan")
    next_, x0 = native(*args.values())
    assert x0.isnan().sum() == 1
    assert next_.isnan().sum() == 2
    assert next_.isinf().sum() == 1


WRONG = [
    ({"x": torch.ones(2)}, r"x: got \(2,\) float32 on cpu, allowed is \(B, C, ...\) of 2 to 5 axes"),
    (
        {"x": random(2, 4, 6, 8).double()},
        "x: got .*float64 on cpu, allowed is float32, bfloat16 or",
    ),
    ({"model_output": random(2, 8, 6, 8)}, r"model_output: got \(2, 8, 6, 8\) .*\(4, 8, 6, 8\)"),
    ({"model_output": random(4, 4, 6, 8)}, r"allowed is \(4, 8, 6, 8\) on"),
    (
        {"model_output": random(4, 5, 6, 8), "learned_range": False},
        r"\(4, 4, 6, 8\) or \(4, 8, 6, 8\)",
    ),
    ({"guided_channels": 9}, "guided_channels: got 9, allowed is 0 to 8"),
    ({"table": torch.ones(4, 8)}, r"table: got \(4, 8\) .*\(steps, 9\) float32"),
    ({"table": torch.ones(4, 9).double()}, "table: got .*float64"),
    ({"step": torch.tensor([0, 4])}, "step: got 4, allowed is 0 to 3"),
    ({"step": torch.tensor(-1)}, "step: got -1, allowed is 0 to 3"),
    ({"step": torch.zeros(3, dtype=torch.int64)}, r"step: got \(3,\) int64.*\(\) or \(2,\)"),
    ({"step": torch.zeros(2)}, "step: got .*float32.*int64"),
    ({"noise": torch.ones(2, 4, 6, 7)}, r"noise: got \(2, 4, 6, 7\).*allowed is \(2, 4, 6, 8\)"),
    ({"noise": random(2, 4, 6, 8).half()}, "noise: got .*float16.*float32"),
    ({"x0_previous": torch.ones(2, 4)}, "x0_previous: got"),
    ({"seed": torch.tensor(1)}, "seed: got a seed and a noise, allowed is one of them"),
    ({"noise": None, "seed": torch.tensor(1.0)}, "seed: got .*float32"),
    ({"clip": 0.0}, "clip: got 0.0"),
    ({"patch": [4, 2]}, r"patch: got \(4, 2\), allowed is one or two positive ints"),
    ({"patch": [2]}, r"patch: got \(2,\)"),
    ({"patch": [2, 2]}, r"model_output: .*\(4, 12, 32\)"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_the_library_checks_its_arguments_itself(changes, message):
    with pytest.raises(RuntimeError, match=message):
        native(*arguments(**changes).values())


@pytest.mark.parametrize("patch", [None, [2, 2]], ids=["image", "tokens"])
def test_opcheck_and_compile(patch):
    args = arguments(noise=None, seed=torch.tensor([1, 2]), patch=patch)
    if patch:
        args["model_output"] = random(4, 12, 32, seed=1)
    op = torch.ops.fastdit_native.diffusion_step.default
    assert set(torch.library.opcheck(op, tuple(args.values())).values()) == {"SUCCESS"}
    torch.compiler.reset()
    compiled = torch.compile(diffusion_step, fullgraph=True, backend="aot_eager", dynamic=True)
    expected = diffusion_step(**args)
    for got, want in zip(compiled(**args), expected, strict=True):
        assert torch.equal(got, want)


def test_what_the_kernel_leaves_to_the_reference():
    args = arguments()
    x, output, table, step = (args[name] for name in ("x", "model_output", "table", "step"))
    assert fastdit.explain("diffusion_step", x, output[:2], table, step)[0].runs == "csrc"
    for name, tensors in {
        "x": (x.double(), output[:2], table),
        "model_output": (x, output[:2].double(), table),
        "table": (x, output[:2], table.double()),
    }.items():
        choice = fastdit.explain("diffusion_step", *tensors, step)[0]
        assert choice.runs == "reference"
        assert choice.rejected[0][1].startswith(f"{name} is torch.float64")


def test_gradients_pass_through_the_kernel():
    args = arguments(noise=None, seed=torch.tensor(4))
    leaves = [args[name].requires_grad_() for name in ("x", "model_output", "x0_previous")]
    result = sum(out.sum() for out in diffusion_step(**args))
    found = torch.autograd.grad(result, leaves)
    with fastdit.backend("reference"):
        result = sum(out.sum() for out in diffusion_step(**args))
    for got, want in zip(found, torch.autograd.grad(result, leaves), strict=True):
        torch.testing.assert_close(got, want)
