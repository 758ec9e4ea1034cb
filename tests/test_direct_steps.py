"""Direct calls of diffusion_step and unpatchify: the op's bits, and None for what is not theirs."""

from __future__ import annotations

import pytest
import torch
from op_cases import random
from torch.utils._python_dispatch import TorchDispatchMode

from fastdit import backends, native, ops

STORED = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = {2: (3, 4), 3: (3, 4, 6), 4: (3, 4, 6, 4), 5: (3, 4, 2, 3, 5)}


def plain(*shape: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    return random(*shape, dtype=dtype, seed=seed, grad=False)


@pytest.fixture(scope="module", autouse=True)
def library():
    try:
        native.load()
    except native.NativeError as error:
        pytest.skip(f"no compiled library: {error}")
    backends.kernels_for("diffusion_step", "cpu")
    if backends.direct_calls["diffusion_step"] is backends._no_direct_call:
        pytest.skip("this PyTorch or this Python allows no direct call")


def step_arguments(
    dims=4, dtype=torch.float32, *, guided=0, noise=True, previous=True, step=None, **changed
) -> dict:
    """Arguments of diffusion_step's schema, by name, in its order."""
    shape = SHAPES[dims]
    output = (shape[0] * (2 if guided else 1), 2 * shape[1], *shape[2:])
    found = {
        "x": plain(*shape, dtype=dtype),
        "model_output": plain(*output, dtype=dtype, seed=1),
        "table": plain(5, 9, seed=2),
        "step": torch.tensor([1, 4, 0]) if step is None else step,
        "noise": plain(*shape, dtype=dtype, seed=3) if noise else None,
        "x0_previous": plain(*shape, dtype=dtype, seed=4) if previous else None,
        "clip": 1.0,
        "learned_range": True,
        "guided_channels": guided,
        "seed": None,
        "patch": None,
    }
    return found | changed


def direct(arguments: dict):
    return backends.direct_calls["diffusion_step"](*arguments.values())


TOKENS = {"patch": [2, 2], "model_output": plain(3, 6, 32, seed=5), "noise": None}
CASES = {
    "noise given": {},
    "signals": {"dims": 3},
    "vectors": {"dims": 2},
    "volumes": {"dims": 5},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "guided": {"guided": 3},
    "no noise": {"noise": False, "previous": False, "learned_range": False, "clip": None},
    "an int as step and seed": {"step": 2, "noise": False, "seed": -7},
    "a tensor as step and seed": {"step": torch.tensor(2), "noise": False, "seed": torch.tensor(3)},
    "a seed each": {"noise": False, "seed": torch.tensor([1, 2, 3])},
    "token rows": TOKENS,
    "token rows of one size": TOKENS | {"patch": 2},
    "rows of a signal": {
        "dims": 3,
        "patch": (3,),
        "noise": None,
        "model_output": plain(3, 2, 24, seed=5),
    },
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_the_ops(case):
    arguments = step_arguments(**CASES[case])
    schema = dict(arguments)
    for name in ("step", "seed"):
        if isinstance(schema[name], int):
            schema[name] = torch.tensor(schema[name])
    if isinstance(schema["patch"], int):
        schema["patch"] = [schema["patch"]] * 2
    got = direct(arguments)
    want = torch.ops.fastdit_native.diffusion_step(*schema.values())
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)
        assert g.dtype == arguments["x"].dtype
        assert g.is_contiguous()


REFUSED = {
    "x": [plain(3, 4, 6, 4).double(), plain(3), plain(0, 4, 6, 4), plain(3, 4, 4, 6).mT, None],
    "model_output": [plain(3, 4, 6, 4), plain(2, 8, 6, 4), plain(3, 8, 6, 5), plain(3, 8, 24)],
    "table": [plain(5, 8), plain(5, 9).double(), plain(9, 5).mT, plain(9)],
    "step": [
        5,
        -1,
        True,
        1.0,
        torch.tensor([0, 5, 0]),
        torch.tensor([0, 1]),
        torch.tensor(1).int(),
    ],
    "noise": [plain(3, 4, 6), plain(3, 4, 6, 4).half(), plain(3, 4, 4, 6).mT, 0.0],
    "x0_previous": [plain(3, 4, 6), plain(3, 4, 6, 4).requires_grad_()],
    "clip": [0.0, -1.0, float("nan"), "one"],
    "learned_range": [None, 1],
    "guided_channels": [-1, 9, 1, True, None, 3.0],
    "seed": [1, torch.tensor(1)],
    "patch": [[2, 2], 0, [2], "ab", [2.0, 2]],
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_step_refuses(name):
    arguments = step_arguments()
    assert direct(arguments) is not None
    for value in REFUSED[name]:
        assert direct(arguments | {name: value}) is None, value
    assert backends.direct_calls["diffusion_step"](*list(arguments.values())[:-1]) is None


def test_a_steps_token_rows_are_checked():
    arguments = step_arguments(**TOKENS)
    assert direct(arguments) is not None
    for patch in ([3, 2], [4, 2], [-2, -2], [1, 4], [2, 3], [2, 2, 1], []):
        fits = patch in ([1, 4],)  # of as many numbers as [2, 2]
        assert (direct(arguments | {"patch": patch}) is not None) == fits, patch
    for shape in ((3, 6, 16), (3, 6, 33), (3, 5, 32), (6, 6, 32)):
        assert direct(arguments | {"model_output": plain(*shape)}) is None, shape


@pytest.mark.parametrize("dtype", STORED, ids=str)
@pytest.mark.parametrize(
    ("patch", "grid", "channels"),
    [(2, (3, 2), 4), ([2, 1], [3, 2], 8), ((4,), (6,), 4), (4, 6, 4), (1, (2, 3), 16)],
)
def test_unpatchify_is_the_ops(dtype, patch, grid, channels):
    tokens = plain(3, 7, 18, dtype=dtype)[:, 1:, 1:17]
    got = backends.direct_calls["unpatchify"](tokens, patch, grid, channels)
    grids = [grid] if isinstance(grid, int) else list(grid)
    patches = [patch] * len(grids) if isinstance(patch, int) else list(patch)
    assert torch.equal(got, torch.ops.fastdit_native.unpatchify(tokens, patches, grids, channels))
    assert got.is_contiguous()
    assert got.dtype == dtype


@pytest.mark.parametrize(
    "wrong",
    [
        (plain(3, 6, 16).double(), 2, (3, 2), 4),
        (plain(3, 16, 6).mT, 2, (3, 2), 4),
        (plain(0, 6, 16), 2, (3, 2), 4),
        (plain(6, 16), 2, (3, 2), 4),
        (plain(3, 6, 16).requires_grad_(), 2, (3, 2), 4),
        (plain(3, 6, 16), 2, (2, 2), 4),
        (plain(3, 6, 16), 2, (3, 2), 5),
        (plain(3, 6, 16), 2, (3, 2), True),
        (plain(3, 6, 16), (2,), (3, 2), 4),
        (plain(3, 6, 16), (2, 2.0), (3, 2), 4),
        (plain(3, 6, 16), (-2, -2), (3, 2), 4),
        (plain(3, 6, 16), 2, (-3, -2), 4),
        (plain(3, 6, 16), 2, (3, 2, 1), 4),
        (plain(3, 6, 16), 2, (), 4),
        (plain(3, 6, 16), 2, None, 4),
        (plain(3, 6, 16), 2**40, (3, 2), 4),
        (plain(3, 6, 16), 2, (2**63, 2), 4),
        (plain(3, 6, 16), 2, (3, 2)),
    ],
    ids=lambda wrong: str(
        [w if not isinstance(w, torch.Tensor) else tuple(w.shape) for w in wrong]
    ),
)
def test_unpatchify_refuses(wrong):
    assert backends.direct_calls["unpatchify"](*wrong) is None


class _See(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_a_mode_is_told():
    with _See():
        assert direct(step_arguments()) is None
        assert backends.direct_calls["unpatchify"](plain(3, 6, 16), 2, (3, 2), 4) is None


def test_they_compile_without_graph_breaks():
    torch.compiler.reset()
    tokens = plain(3, 6, 16)
    compiled = torch.compile(
        lambda t: ops.unpatchify(t, 2, (3, 2), 4), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(tokens), ops.unpatchify(tokens, 2, (3, 2), 4))
    x, output, table, step, noise, *_ = step_arguments().values()
    compiled = torch.compile(
        lambda x: ops.diffusion_step(x, output, table, step, noise=noise),
        fullgraph=True,
        backend="aot_eager",
    )
    for got, want in zip(
        compiled(x), ops.diffusion_step(x, output, table, step, noise=noise), strict=True
    ):
        assert torch.equal(got, want)
