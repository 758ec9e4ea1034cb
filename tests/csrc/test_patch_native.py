"""The compiled CPU kernels of patch_embed and unpatchify: exactness, layouts, threads, errors."""

from __future__ import annotations

import pytest
import torch
from compilers import QUICK, SANITIZERS, run_host
from op_cases import random

import fastdit
from fastdit import backends, reference
from fastdit._build.sources import ISAS
from fastdit.ops import patch_embed, unpatchify

HALVES = (torch.bfloat16, torch.float16)
STORED = (torch.float32, *HALVES)


@pytest.fixture(scope="module", autouse=True)
def library():
    if not any(k.name == "csrc" for k in backends.kernels_for("patch_embed", "cpu")):
        pytest.skip("the compiled library is not built")


@pytest.fixture
def isas():
    """The instruction sets of this machine; the best is chosen again after the test."""
    native = torch.ops.fastdit_native
    names = list(ISAS)[: list(ISAS).index(native.cpu_isa()) + 1]
    yield names
    native.set_cpu_isa("")


def plain(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return random(*shape, dtype=dtype, seed=seed, grad=False)


def doubled(*tensors):
    return [t if t is None else t.double() for t in tensors]


def native(name: str, *args):
    return getattr(torch.ops.fastdit_native, name).default(*args)


# ---- patch_embed ---------------------------------------------------------------------------------

# (x, patch, D): tails in D, K, tokens and blocks of tokens; sums over many samples and outputs.
SHAPES = [
    ((2, 4, 8, 8), (2, 2), 96),
    ((3, 3, 6, 4), (3, 2), 70),
    ((19, 1, 4, 4), (1, 1), 33),
    ((2, 3, 12), (4,), 40),
    ((2, 4, 12, 24), (2, 2), 300),
    ((1, 4, 16, 16), (8, 8), 50),
]
every_shape = pytest.mark.parametrize(("shape", "patch", "width"), SHAPES, ids=str)


def inputs(shape, patch, width, dtype, *, bias=True, pos=None):
    tokens = 1
    for size, p in zip(shape[2:], patch, strict=True):
        tokens *= size // p
    return (
        plain(*shape, dtype=dtype),
        plain(width, shape[1], *patch, seed=1, dtype=dtype),
        plain(width, seed=2, dtype=dtype) if bias else None,
        None if pos is None else plain(1, tokens, width, seed=3, dtype=pos),
    )


def no_less_exact(got, eager, truth) -> None:
    """The error is at most eager's, or half a unit in the last place of the largest value."""
    assert (got.shape, got.dtype) == (eager.shape, eager.dtype)
    assert got.is_contiguous()
    floor = torch.finfo(torch.float32).eps / 2 * truth.abs().max()
    assert (got.double() - truth).abs().max() <= (eager.double() - truth).abs().max() + floor


@every_shape
@pytest.mark.parametrize("dtype", STORED, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("pos", [None, *STORED], ids=str)
def test_forward_is_no_less_exact_than_eager(shape, patch, width, dtype, bias, pos):
    args = inputs(shape, patch, width, dtype, bias=bias, pos=pos)
    truth = reference.patch_embed(*doubled(*args))
    no_less_exact(native("patch_embed", *args), reference.patch_embed(*args), truth)


@every_shape
@pytest.mark.parametrize("dtype", STORED, ids=str)
@pytest.mark.parametrize("pos", [None, torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_no_less_exact_than_eager(shape, patch, width, dtype, pos):
    args = inputs(shape, patch, width, dtype, bias=pos is not torch.float32, pos=pos)
    leaves = [None if a is None else a.clone().requires_grad_() for a in args]
    tokens = reference.patch_embed(*leaves)
    dtokens = plain(*tokens.shape, seed=4, dtype=tokens.dtype)
    present = [a for a in leaves if a is not None]
    eager = torch.autograd.grad(tokens, present, dtokens)
    mask = [a is not None for a in args]
    got = native("patch_embed_backward", dtokens, *args, *mask)
    truth = reference.patch_embed_backward(dtokens.double(), *doubled(*args), mask)
    assert [g.numel() > 0 for g in got] == mask
    found = [pair for pair, m in zip(zip(got, truth, strict=True), mask, strict=True) if m]
    for (g, t), e in zip(found, eager, strict=True):
        no_less_exact(g, e, t)


def test_long_sums_are_exact():
    """The sums over 2048 tokens, 300 samples and 1152 outputs that gradients take."""
    for shape, width in (((300, 1, 2, 2), 40), ((8, 4, 32, 32), 40), ((1, 4, 4, 4), 1152)):
        args = inputs(shape, (2, 2), width, torch.float32, pos=torch.float32)
        dtokens = plain(shape[0], shape[2] * shape[3] // 4, width, seed=4) + 1
        got = native("patch_embed_backward", dtokens, *args, *[True] * 4)
        truth = reference.patch_embed_backward(dtokens.double(), *doubled(*args), [True] * 4)
        for g, t in zip(got, truth, strict=True):
            assert (g - t).abs().max() <= 2.5e-7 * t.abs().max()


@pytest.mark.parametrize("mask", range(16))
def test_only_the_gradients_asked_for_are_computed(mask):
    args = inputs((3, 4, 8, 8), (2, 2), 40, torch.float32, pos=torch.float32)
    wanted = [bool(mask >> i & 1) for i in range(4)]
    dtokens = plain(3, 16, 40, seed=4)
    got = native("patch_embed_backward", dtokens, *args, *wanted)
    truth = reference.patch_embed_backward(dtokens, *args, wanted)
    for g, t in zip(got, truth, strict=True):
        assert g.shape == t.shape
        torch.testing.assert_close(g, t, rtol=1e-5, atol=1e-5)


def test_strided_arguments():
    x = plain(6, 24, 8, 4)[::2, :, ::2].permute(0, 3, 2, 1)  # (3, 4, 4, 24)
    weight = plain(4, 2, 2, 40, seed=1).permute(3, 0, 1, 2)
    bias, pos = plain(80, seed=2)[::2], plain(40, 24, seed=3).T
    want = reference.patch_embed(*doubled(x, weight, bias, pos))
    torch.testing.assert_close(
        native("patch_embed", x, weight, bias, pos), want.float(), rtol=1e-6, atol=3e-6
    )
    padded = plain(24, 80, seed=3)[:, 40:]  # rows with a gap
    torch.testing.assert_close(
        native("patch_embed", x, weight, None, padded),
        reference.patch_embed(*doubled(x, weight, None, padded)).float(),
        rtol=1e-6,
        atol=3e-6,
    )
    for dtokens in (
        plain(1, 24, 40, seed=4).expand(3, 24, 40),
        plain(24, 3, 40, seed=4).transpose(0, 1),
        plain(3, 40, 24, seed=4).mT,
    ):
        for mask in ([True] * 4, [True, True, True, False]):
            got = native("patch_embed_backward", dtokens, x, weight, bias, pos, *mask)
            truth = reference.patch_embed_backward(
                dtokens.double(), *doubled(x, weight, bias, pos), mask
            )
            for g, t in zip(got, truth, strict=True):
                torch.testing.assert_close(g, t.float(), rtol=1e-6, atol=1e-5)
                assert g.is_contiguous()


def test_infinity_and_nan_go_where_they_belong():
    x, weight, bias, pos = inputs((9, 4, 8, 8), (2, 2), 40, torch.float32, pos=torch.float32)
    dtokens = plain(9, 16, 40, seed=4)
    dtokens[0, 3, 7] = float("inf")
    _dx, dweight, dbias, dpos = native(
        "patch_embed_backward", dtokens, x, weight, bias, pos, *[True] * 4
    )
    assert torch.equal(dbias.isinf(), torch.arange(40) == 7)
    assert dpos.isinf().sum() == 1
    assert torch.equal(dweight.flatten(1).isfinite().all(1), torch.arange(40) != 7)
    x[2, 1, 5, 3] = float("nan")
    tokens = native("patch_embed", x, weight, bias, pos)
    assert torch.equal(tokens.isnan().all(2), tokens.isnan().any(2))
    assert tokens.isnan().any(2).nonzero().tolist() == [[2, 2 * 4 + 1]]


def results_of_threads(run):
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            yield run()
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("pos", [None, torch.float32], ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(pos):
    args = inputs((3, 4, 20, 28), (2, 2), 420, torch.float32, pos=pos)
    dtokens, mask = plain(3, 140, 420, seed=4), [True, True, True, pos is not None]
    rows, image = plain(4, 64 * 48, 32), plain(4, 8, 128, 96)

    def run():
        return (
            native("patch_embed", *args),
            *native("patch_embed_backward", dtokens, *args, *mask),
            native("unpatchify", rows, [2, 2], [64, 48], 8),
            native("unpatchify_backward", image, [2, 2], [64, 48], 8),
        )

    first, *others = results_of_threads(run)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_every_instruction_set_agrees(isas):
    args = inputs((2, 3, 10, 8), (2, 4), 100, torch.bfloat16, pos=torch.float32)
    dtokens = plain(2, 10, 100, seed=4)
    truth = [
        reference.patch_embed(*doubled(*args)),
        *reference.patch_embed_backward(dtokens.double(), *doubled(*args), [True] * 4),
    ]
    for isa in isas:
        torch.ops.fastdit_native.set_cpu_isa(isa)
        got = (
            native("patch_embed", *args),
            *native("patch_embed_backward", dtokens, *args, *[True] * 4),
        )
        for g, t in zip(got, truth, strict=True):
            tolerance = torch.finfo(g.dtype).eps
            assert (g - t).abs().max() <= max(tolerance, 4e-7) * t.abs().max()


# ---- as ops --------------------------------------------------------------------------------------


def test_empty_batches():
    weight, pos = plain(8, 3, 2, 2), plain(4, 8)
    assert patch_embed(torch.zeros(0, 3, 4, 4), weight, None, pos).shape == (0, 4, 8)
    args = torch.zeros(0, 4, 8), torch.zeros(0, 3, 4, 4), weight, plain(8), pos, *[True] * 4
    gradients = native("patch_embed_backward", *args)
    assert gradients[0].shape == (0, 3, 4, 4)
    assert all(g.abs().sum() == 0 for g in gradients)
    assert unpatchify(torch.zeros(0, 4, 12), 2, (2, 2), 3).shape == (0, 3, 4, 4)


OPERATIONS = {
    "patch_embed": lambda: inputs((2, 3, 4, 6), (2, 2), 20, torch.bfloat16, pos=torch.float32),
    "patch_embed_backward": lambda: (
        plain(2, 6, 20),
        *inputs((2, 3, 4, 6), (2, 2), 20, torch.float32, bias=False, pos=torch.float32),
        *(True, False, False, True),
    ),
    "unpatchify": lambda: (plain(2, 6, 24), [2, 4], [3, 2], 3),
    "unpatchify_backward": lambda: (plain(2, 3, 6, 8), [2, 4], [3, 2], 3),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_opcheck(name):
    op = getattr(torch.ops.fastdit_native, name).default
    assert set(torch.library.opcheck(op, OPERATIONS[name]()).values()) == {"SUCCESS"}


X, WEIGHT, ROWS = torch.ones(2, 3, 4, 4), torch.ones(8, 3, 2, 2), torch.ones(2, 4, 12)
WRONG = [
    ("patch_embed", (torch.ones(2, 3), WEIGHT, None, None), "x: wrong shape"),
    ("patch_embed", (X.double(), WEIGHT.double(), None, None), "x: got Double"),
    ("patch_embed", (torch.ones(2, 3, 5, 4), WEIGHT, None, None), "x: its sizes"),
    ("patch_embed", (X, torch.ones(8, 4, 2, 2), None, None), "weight: wrong shape"),
    ("patch_embed", (X, WEIGHT.half(), None, None), "weight: wrong dtype"),
    ("patch_embed", (X, WEIGHT, torch.ones(7), None), "bias: wrong shape"),
    ("patch_embed", (X, WEIGHT, torch.ones(8).half(), None), "bias: wrong dtype"),
    ("patch_embed", (X, WEIGHT, None, torch.ones(5, 8)), "pos: wrong shape"),
    ("patch_embed", (X, WEIGHT, None, torch.ones(2, 4, 8)), "pos: wrong shape"),
    ("patch_embed", (X, WEIGHT, None, torch.ones(4, 8).double()), "pos: got Double"),
    (
        "patch_embed_backward",
        (torch.ones(2, 4, 7), X, WEIGHT, None, None, *[True] * 2, *[False] * 2),
        "dtokens: wrong shape",
    ),
    (
        "patch_embed_backward",
        (torch.ones(2, 4, 8), X, WEIGHT, None, None, False, False, True, False),
        "bias: its gradient is asked for",
    ),
    (
        "patch_embed_backward",
        (torch.ones(2, 4, 8), X, WEIGHT, None, None, False, False, False, True),
        "pos: its gradient is asked for",
    ),
    ("unpatchify", (ROWS[0], [2, 2], [2, 2], 3), "tokens: wrong shape"),
    ("unpatchify", (ROWS, [2, 2], [2, 3], 3), "tokens: wrong shape"),
    ("unpatchify", (ROWS, [2], [2, 2], 3), "patch: allowed is one for each"),
    ("unpatchify", (ROWS, [2, 2, 1], [2, 2, 1], 3), "grid: allowed are one or two"),
    ("unpatchify", (ROWS, [2, 0], [2, 2], 3), "positive"),
    ("unpatchify", (ROWS, [2, 2], [2, 2], 0), "channels: got 0"),
    ("unpatchify", (ROWS.to(torch.complex128), [2, 2], [2, 2], 3), "numbers of 16 bytes"),
    ("unpatchify_backward", (torch.ones(2, 3, 4, 5), [2, 2], [2, 2], 3), "dimage: wrong shape"),
    ("unpatchify_backward", (torch.ones(2, 3, 4), [2, 2], [2, 2], 3), "dimage: wrong shape"),
]


@pytest.mark.parametrize(("name", "args", "message"), WRONG)
def test_the_library_checks_its_arguments_itself(name, args, message):
    with pytest.raises(RuntimeError, match=message):
        native(name, *args)


def test_what_the_kernel_leaves_to_the_reference():
    x, weight, bias, pos = inputs((2, 4, 8, 8), (2, 2), 24, torch.float32, pos=torch.float32)
    assert fastdit.explain("patch_embed", x, weight, bias, pos)[0].runs == "csrc"
    for args, reason in {
        (x.double(), weight.double(), None, pos): "x is torch.float64",
        (x, weight, None, pos.double()): "pos is torch.float64",
        (torch.ones(1, 5, 8, 8), torch.ones(8, 5, 8, 8)): "a patch has 320 numbers; above 256",
        (x.half(), torch.ones(8, 4, 8, 4).half()): "a patch has 128 numbers; above 64",
    }.items():
        choice = fastdit.explain("patch_embed", *args)[0]
        assert choice.runs == "reference"
        assert choice.rejected[0][1].startswith(reason)


def test_gradients_pass_through_the_kernels():
    args = inputs((2, 4, 8, 8), (2, 2), 24, torch.float32, pos=torch.float32)
    leaves = [a.requires_grad_() for a in args]

    def gradients():
        image = unpatchify(patch_embed(*leaves), 2, (4, 4), 6)
        return torch.autograd.grad((image * plain(*image.shape, seed=9)).sum(), leaves)

    with fastdit.backend("native"):
        found = gradients()
    with fastdit.backend("reference"):
        expected = gradients()
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("widest", [False, True], ids=["baseline", "widest"])
def test_kernels_stay_inside_their_buffers(widest, isas):
    isa = isas[-1] if widest else isas[0]
    flags = (f"-DFASTDIT_ISA={isa}", *ISAS[isa])
    assert run_host("patch_kernels.cpp", *SANITIZERS, *QUICK, *flags) == "exact\n"
