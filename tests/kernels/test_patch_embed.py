"""The patch_embed kernels: numbers, each gradient, traffic, and the op that runs them."""

from __future__ import annotations

import patch_cases
import pytest
import torch
from patch_cases import (
    ALL,
    DTYPES,
    beats_eager,
    check_patch_gradients,
    error,
    patch_inputs,
    run,
    seeded,
)

import fastdit
from fastdit import reference
from fastdit.kernels import partials
from fastdit.kernels import patch_embed as kernels
from fastdit.kernels import patch_embed_backward as backward
from fastdit.kernels.patch_tiles import Tile
from fastdit.testing import count_traffic

# samples, channels, size, patch, D: DiT's patches; a deep one; odd, non-square, 1-D, one pixel.
CASES = [
    (2, 4, (8, 8), (2, 2), 128),
    (1, 4, (8, 16), (4, 4), 72),
    (2, 4, (16, 8), (8, 8), 64),
    (2, 3, (6, 10), (3, 5), 200),
    (3, 3, (12,), (4,), 24),
    (3, 1, (1, 7), (1, 1), 40),
    (5, 2, (3,), (1,), 17),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_numbers(case, dtype):
    args, dtokens = patch_inputs(case, dtype)
    tokens, _ = run(kernels.patch_embed, *args)
    exact = reference.patch_embed(*(a.double() for a in args))
    assert (tokens.shape, tokens.dtype, tokens.is_contiguous()) == (exact.shape, dtype, True)
    assert beats_eager(tokens, reference.patch_embed(*args), exact)
    got, _ = run(kernels.patch_embed_backward, dtokens, *args, ALL)
    check_patch_gradients(got, args, dtokens)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_positions_wider_than_x(dtype):
    """Autocast's mixture: the tokens and their gradient are float32, the products 16-bit."""
    args, dtokens = patch_inputs((2, 4, (8, 8), (2, 2), 96), dtype, torch.float32)
    tokens, _ = run(kernels.patch_embed, *args)
    exact = reference.patch_embed(*(a.double() for a in args))
    assert tokens.dtype == torch.float32
    # Nothing is rounded to 16 bits on the way, where eager rounds the product.
    assert error(tokens, exact) <= 2e-6 < error(reference.patch_embed(*args), exact)
    got, _ = run(kernels.patch_embed_backward, dtokens, *args, ALL)
    check_patch_gradients(got, args, dtokens)
    exact_tokens = reference.patch_embed_backward(
        dtokens.double(), *(a.double() for a in args), ALL
    )
    for gradient, t in zip(got[:2], exact_tokens[:2], strict=True):
        floor = patch_cases.rounding_floor(t, dtype)
        assert error(gradient, t) <= 1.02 * floor


def test_positions_narrower_than_x():
    args, dtokens = patch_inputs((2, 3, (4, 6), (2, 2), 40), torch.float32, torch.bfloat16)
    tokens, _ = run(kernels.patch_embed, *args)
    torch.testing.assert_close(tokens, reference.patch_embed(*args), rtol=0, atol=2e-6)
    got, _ = run(kernels.patch_embed_backward, dtokens, *args, ALL)
    check_patch_gradients(got, args, dtokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_rows_for_each_program(dtype):
    """Few programs: each sums several tiles of tokens, which are no multiple of a tile."""
    args, dtokens = patch_inputs((20, 1, (9, 14), (1, 2), 64), dtype)
    few = {n: Tile(32, 64, 16, 4, programs=16) for n in (2, 4)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backward, "ALL", few)
        got, launches = run(kernels.patch_embed_backward, dtokens, *args, ALL)
    # 4 spans of up to 16 tokens, 4 programs each; for dx 40 blocks of 32 tokens, or terms
    assert launches[0].grid == (16 + (40 if dtype == torch.float32 else 0), 1, 1)
    check_patch_gradients(got, args, dtokens, floor=False)


def test_without_bias_and_positions():
    (x, weight, _bias, _pos), dtokens = patch_inputs(CASES[0], torch.float32)
    tokens, _ = run(kernels.patch_embed, x, weight, None, None)
    torch.testing.assert_close(tokens, reference.patch_embed(x, weight, None, None))
    got, launches = run(
        kernels.patch_embed_backward, dtokens, x, weight, None, None, [True, True, False, False]
    )
    want = reference.patch_embed_backward(
        dtokens, x, weight, None, None, [True, True, False, False]
    )
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)
    assert [launch.name for launch in launches] == ["gradients_kernel"]


@pytest.mark.parametrize("wanted", range(4))
def test_only_what_is_asked_for_is_computed(wanted):
    args, dtokens = patch_inputs(CASES[0], torch.float32)
    mask = [index == wanted for index in range(4)]
    got, launches = run(kernels.patch_embed_backward, dtokens, *args, mask)
    everything, _ = run(kernels.patch_embed_backward, dtokens, *args, ALL)
    assert len(launches) == 1
    assert [g.numel() > 0 for g in got] == mask
    torch.testing.assert_close(got[wanted], everything[wanted], rtol=1e-6, atol=1e-6)
    nothing, launches = run(kernels.patch_embed_backward, dtokens, *args, [False] * 4)
    assert launches == []
    assert all(g.numel() == 0 for g in nothing)


def test_strided_inputs():
    (x, weight, bias, pos), dtokens = patch_inputs((2, 4, (8, 6), (2, 3), 40), torch.float32)
    views = (
        x.to(memory_format=torch.channels_last),
        weight.to(memory_format=torch.channels_last),
        torch.stack([bias, bias], 1)[:, 0],
        pos.mT.contiguous().mT,
    )
    tokens, (launch,) = run(kernels.patch_embed, *views)
    assert launch.arguments["x_ptr"].data_ptr() == views[0].data_ptr()
    assert torch.equal(tokens, run(kernels.patch_embed, x, weight, bias, pos)[0])
    got, _ = run(kernels.patch_embed_backward, dtokens.mT.contiguous().mT, *views, ALL)
    want, _ = run(kernels.patch_embed_backward, dtokens, x, weight, bias, pos, ALL)
    assert all(map(torch.equal, got, want))
    crop = seeded(2, 5, 12, 9, seed=5)[:, 1:, 2:10, 3:]
    torch.testing.assert_close(
        run(kernels.patch_embed, crop, weight, bias, pos)[0],
        reference.patch_embed(crop, weight, bias, pos),
    )


def test_offsets_beyond_32_bits():
    """Samples 2^30 + 3 elements apart: the third begins beyond 2^31."""
    args, dtokens = patch_inputs((3, 4, (4, 4), (2, 2), 32), torch.bfloat16)
    far = torch.empty(2**31 + 2**10, dtype=torch.bfloat16)
    far = far.as_strided((3, 4, 4, 4), (2**30 + 3, 16, 4, 1))
    far.copy_(args[0])
    mask = [False, True, True, False]
    with patch_cases.VirtualGPU("sm_90", trace=False):
        tokens = kernels.patch_embed(far, *args[1:])
        assert torch.equal(tokens, kernels.patch_embed(*args))
        got = kernels.patch_embed_backward(dtokens, far, *args[1:], mask)
        want = kernels.patch_embed_backward(dtokens, *args, mask)
    assert all(map(torch.equal, got, want))


def test_what_the_kernels_leave_to_eager():
    (x, weight, bias, pos), dtokens = patch_inputs(CASES[0], torch.bfloat16)
    assert kernels._unsupported(x, weight, bias, pos) is None
    wide = torch.empty(1, 2**15 + 1, 2**8, 2**8, device="meta")
    kernel = torch.empty(8, 2**15 + 1, 2, 2, device="meta")
    assert "one sample of x spans 2^31" in kernels._unsupported(wide, kernel, None, None)
    rows = torch.empty(2**20, 1, 2**11, device="meta")
    thin = torch.empty(8, 1, 1, device="meta")
    assert "2^31 patches" in kernels._unsupported(rows, thin, None, None)
    half = dtokens.half()
    assert "float16 beside" in kernels._unsupported_backward(half, x, weight, bias, pos, ALL)


@pytest.mark.parametrize(("samples", "width"), [(0, 8), (2, 0)])
def test_empty(samples, width):
    args, dtokens = patch_inputs((2, 3, (4, 4), (2, 2), 8), torch.float32)
    x, weight, bias, pos = args[0][:samples], *(a[..., :width] for a in args[1:])
    weight = args[1][:width]
    dtokens = dtokens[:samples, :, :width]
    tokens, launches = run(kernels.patch_embed, x, weight, bias, pos)
    assert tokens.shape == (samples, 4, width)
    got, more = run(kernels.patch_embed_backward, dtokens, x, weight, bias, pos, ALL)
    want = reference.patch_embed_backward(dtokens, x, weight, bias, pos, ALL)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)
    assert launches == more == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_traffic_is_the_least(dtype):
    """The tokens cross once each way. The latents are gathered once by each program of a row of
    tokens: here the 4 tiles of D have one each, and their repeats stay in the cache."""
    args, dtokens = patch_inputs((2, 4, (8, 8), (2, 2), 256), dtype)
    tokens, (forward,) = run(kernels.patch_embed, *args)
    assert forward.trace.stored == {"out_ptr": tokens.nbytes}
    assert forward.grid == (1, 4, 1)
    assert forward.trace.loaded["x_ptr"] == 4 * args[0].nbytes
    unique = forward.trace.unique_loaded
    assert unique == {
        f"{name}_ptr": a.nbytes
        for name, a in zip(("x", "weight", "bias", "pos"), args, strict=True)
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "FORWARD", {n: Tile(32, 64, 16, 4, programs=1) for n in (2, 4)})
        _, (alone,) = run(kernels.patch_embed, *args)
    assert alone.grid == (1, 1, 1)
    assert alone.trace.loaded["x_ptr"] == args[0].nbytes
    assert alone.trace.stored == {"out_ptr": tokens.nbytes}
    _, launches = run(kernels.patch_embed_backward, dtokens, *args, ALL)
    once, *gather = (launch.trace for launch in launches)
    assert once.unique_loaded["dtokens_ptr"] == dtokens.nbytes
    for name, like in zip(("dweight", "dbias", "dpos"), args[1:], strict=True):
        assert once.stored[f"{name}_ptr"] == like.nbytes
    if dtype == torch.bfloat16:
        assert once.loaded["dtokens_ptr"] == dtokens.nbytes
        assert gather[0].loaded == {"terms_ptr": once.stored["terms_ptr"]}
        assert gather[0].stored == {"dx_ptr": args[0].nbytes}
    else:
        assert once.loaded["dtokens_ptr"] == 2 * dtokens.nbytes  # the second time from the L2 cache
        assert once.stored["dx_ptr"] == args[0].nbytes


def test_partial_sums_add_up_to_the_least_traffic():
    args, dtokens = patch_inputs((8, 1, (8, 8), (2, 2), 64), torch.float32)
    _, launches = run(kernels.patch_embed_backward, dtokens, *args, [False, True, True, False])
    once, dweight, dbias = (launch.trace for launch in launches)
    assert once.loaded["dtokens_ptr"] == dtokens.nbytes
    for trace, name, like in ((dweight, "dweight", args[1]), (dbias, "dbias", args[2])):
        assert once.stored[f"{name}_ptr"] == 4 * like.nbytes  # of 4 programs, a tile each
        assert trace.loaded == {"rows_ptr": 4 * like.nbytes}
        assert trace.stored == {"out_ptr": like.nbytes}


class Moved:
    """In a kernel's place: counts the bytes of the tensors of each launch, and runs nothing."""

    def __init__(self) -> None:
        self.bytes = 0

    def __getitem__(self, _grid):
        return self.launch

    def launch(self, *args, **_options) -> None:
        tensors = {id(arg): arg for arg in args if isinstance(arg, torch.Tensor)}
        self.bytes += sum(tensor.nbytes for tensor in tensors.values())


# Of x, weight, bias and pos.
WANTED = {
    "all": ALL,
    "positions": [False, True, True, True],
    "trained": [False, True, True, False],
    "fixed positions": [True, True, True, False],
}


@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_backward_moves_no_more_bytes_than_eagers(monkeypatch, dtype, wanted):
    """Of every DiT at batch 32, partial sums and terms counted as if they left the chip.

    Eager's convolution counts as one pass over dtokens, though it sums the bias in another, and
    dpos as one more: where dpos is not wanted, the bias's is added here.
    """
    mask = WANTED[wanted]
    for patch in (2, 4, 8):
        for width in patch_cases.WIDTHS.values():
            tokens = (32 // patch) ** 2
            shapes = (32, 4, 32, 32), (width, 4, patch, patch), (width,), (1, tokens, width)
            args = [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]
            dtokens = torch.empty(32, tokens, width, dtype=dtype, device="meta")
            moved = Moved()
            for module, kernel in (
                (backward, "gradients_kernel"),
                (backward, "gather_kernel"),
                (partials, "sum_rows_kernel"),
            ):
                monkeypatch.setattr(module, kernel, moved)
            kernels.patch_embed_backward(dtokens, *args, mask)
            leaves = [arg.requires_grad_(want) for arg, want in zip(args, mask, strict=True)]
            out = reference.patch_embed(*leaves)
            with count_traffic() as eager:
                torch.autograd.grad(out, [leaf for leaf in leaves if leaf.requires_grad], dtokens)
            bias_pass = 0 if mask[3] else dtokens.nbytes
            assert moved.bytes <= eager.total_bytes + bias_pass, (patch, width)
            assert moved.bytes >= dtokens.nbytes


def test_a_nan_stays_with_its_token():
    args, dtokens = patch_inputs(CASES[0], torch.bfloat16)
    dtokens[0, 3, 5] = float("inf")
    got, _ = run(kernels.patch_embed_backward, dtokens, *args, ALL)
    assert got[3].isinf().sum() == got[2].isinf().sum() == 1
    assert not got[3].isnan().any()


def test_second_run_is_bit_equal():
    args, dtokens = patch_inputs((4, 4, (16, 16), (2, 2), 64), torch.bfloat16)
    first, launches = run(kernels.patch_embed_backward, dtokens, *args, ALL)
    second, _ = run(kernels.patch_embed_backward, dtokens, *args, ALL)
    assert launches[0].grid[0] > 1
    assert all(map(torch.equal, first, second))


def test_the_op_runs_the_kernels():
    args, dtokens = patch_inputs((2, 3, (4, 6), (2, 2), 24), torch.float32)
    leaves = [a.requires_grad_() for a in args]
    torch.compiler.reset()
    compiled = torch.compile(fastdit.ops.patch_embed, fullgraph=True, backend="aot_eager")
    with patch_cases.on_the_cpu("patch_embed") as gpu:
        assert fastdit.explain("patch_embed", *leaves)[0].runs == "triton"
        tokens = fastdit.ops.patch_embed(*leaves)
        got = torch.autograd.grad(tokens, leaves, dtokens)
        assert len(gpu.launches) == 2
        report = torch.library.opcheck(torch.ops.fastdit.patch_embed.default, tuple(leaves))
        assert set(report.values()) == {"SUCCESS"}
        again = compiled(*leaves)
        assert torch.equal(again, tokens)
        assert all(map(torch.equal, torch.autograd.grad(again, leaves, dtokens), got))
        with pytest.raises(fastdit.BackendError, match="x is float64, the Triton kernels take"):
            fastdit.ops.patch_embed(*(a.double() for a in args))
    for gradient, want in zip(
        got, patch_cases.gradients("patch_embed", args, dtokens, None), strict=True
    ):
        torch.testing.assert_close(gradient, want, rtol=1e-5, atol=1e-5)


def test_the_op_under_autocast():
    (x, weight, bias, pos), _ = patch_inputs((2, 3, (4, 6), (2, 2), 24), torch.float32)
    weight.requires_grad_()
    with patch_cases.on_the_cpu("patch_embed"), torch.autocast("cpu", torch.bfloat16):
        assert fastdit.ops.patch_embed(x, weight, bias).dtype == torch.bfloat16
        tokens = fastdit.ops.patch_embed(x, weight, bias, pos)
        (gradient,) = torch.autograd.grad(tokens.sum(), weight)
    assert tokens.dtype == gradient.dtype == torch.float32
    exact = reference.patch_embed(x, weight, bias, pos)
    assert (tokens - exact).abs().max() < 0.05
