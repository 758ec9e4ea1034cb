"""diffusion_step against its formula written out per sample, and its argument checks."""

from __future__ import annotations

import pytest
import torch
from op_cases import random, step_table

import fastdit
from fastdit import philox
from fastdit.ops import diffusion_step, unpatchify


def plain(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return random(*shape, dtype=dtype, seed=seed, grad=False)


def by_hand(x, output, row, noise, previous, clip, learned, guided):
    """One sample `(C, H, W)`; `output` is its conditional and, with guidance, its null output."""
    a, b, cx, c0, cp, sigma, low, high, scale = row.tolist()
    channels = x.shape[0]
    e = output[0].clone()
    for channel in range(guided):
        e[channel] = output[1][channel] + scale * (output[0][channel] - output[1][channel])
    x0 = a * x + b * e[:channels]
    if clip is not None:
        x0 = x0.clamp(-clip, clip)
    if learned:
        f = (e[channels:] + 1) / 2
        sigma = sigma * (0.5 * (f * high + (1 - f) * low)).exp()
    return cx * x + c0 * x0 + cp * previous + sigma * noise, x0


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("guided", [0, 3, 4, 8])
@pytest.mark.parametrize("per_sample", [False, True])
def test_formula(clip, learned, guided, per_sample):
    x, noise, previous = (plain(3, 4, 2, 5, seed=seed) for seed in (0, 1, 2))
    output, table = plain(6 if guided else 3, 8, 2, 5, seed=3), step_table(dtype=torch.float64)
    steps = [3, 0, 2] if per_sample else [2, 2, 2]
    step = torch.tensor(steps) if per_sample else torch.tensor(2)
    out, x0 = diffusion_step(
        x,
        output,
        table,
        step,
        noise=noise,
        x0_previous=previous,
        clip=clip,
        learned_range=learned,
        guided_channels=guided,
    )
    for i in range(3):
        halves = (output[i], output[i + 3]) if guided else (output[i],)
        expected = by_hand(
            x[i], halves, table[steps[i]], noise[i], previous[i], clip, learned, guided
        )
        torch.testing.assert_close((out[i], x0[i]), expected)


def test_absent_noise_and_history_leave_their_terms_out():
    x, output, table = plain(2, 4, 3, 3), plain(2, 4, 3, 3, seed=1), step_table()
    zero = torch.zeros_like(x)
    full = diffusion_step(x, output, table, 1, noise=zero, x0_previous=zero)
    torch.testing.assert_close(diffusion_step(x, output, table, 1), full)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_rounds_once(dtype):
    x, output = plain(2, 4, 3, 3, dtype=dtype), plain(2, 4, 3, 3, seed=1, dtype=dtype)
    table = step_table()
    out = diffusion_step(x, output, table, 1)
    exact = diffusion_step(x.double(), output.double(), table, 1)
    for low, high in zip(out, exact, strict=True):
        assert low.dtype == dtype
        torch.testing.assert_close(low, high.to(dtype), rtol=torch.finfo(dtype).eps, atol=0)


def test_model_outputs_of_lower_precision_and_other_shapes():
    table = step_table()
    x, output = plain(2, 4, 7, dtype=torch.float32), plain(2, 4, 7, seed=1).bfloat16()
    assert diffusion_step(x, output, table, 0)[0].dtype == torch.float32
    assert diffusion_step(x[:0], output[:0], table, 0)[0].shape == (0, 4, 7)
    flat = diffusion_step(x.flatten(1), output.flatten(1), table, 0)[0]
    assert torch.equal(flat.view(2, 4, 7), diffusion_step(x, output, table, 0)[0])


def test_nan_is_not_hidden_by_clipping():
    x = plain(1, 1, 2, 2)
    x[0, 0, 1, 1] = float("nan")
    out, x0 = diffusion_step(x, torch.zeros_like(x), step_table(), 0, clip=1.0)
    assert out.isnan().sum() == x0.isnan().sum() == 1


# ---- noise from a seed ---------------------------------------------------------------------------

JUST_NOISE = torch.zeros(6, 9).index_fill_(1, torch.tensor(5), 1.0)  # x' = noise


def drawn(seed, step=0, shape=(3, 2, 3, 5), dtype=torch.float32) -> torch.Tensor:
    x = torch.zeros(shape, dtype=dtype)
    return diffusion_step(
        x, x, JUST_NOISE.to(torch.promote_types(dtype, torch.float32)), step, seed=seed
    )[0]


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([2**32 - 1] * 4, [2**32 - 1] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_known_answers(counter, key, words):
    """The vectors of Random123's kat_vectors."""
    found = philox.philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert [word.item() for word in found] == words


@pytest.mark.parametrize("seed", [0, 7, -1, 2**63 - 1, -(2**63), torch.tensor(2**40 + 5)])
def test_every_backend_draws_the_same_noise(seed):
    found = drawn(seed)
    with fastdit.backend("reference"):
        assert (drawn(seed) - found).abs().max() <= 2e-6
    exact = drawn(seed, dtype=torch.float64)
    assert exact.dtype == torch.float64
    assert (exact - found).abs().max() <= 2e-6
    assert (drawn(seed, dtype=torch.bfloat16) - found).abs().max() <= 2**-7


def test_noise_is_that_of_its_sample_and_its_step_alone():
    alone, batch = drawn(5, shape=(1, 2, 3, 5)), drawn(5)
    assert torch.equal(batch[:1], alone)
    assert torch.equal(drawn(5, shape=(3, 30)).view(3, 2, 3, 5), batch)
    seeds = torch.tensor([5, 9, 5])
    each = drawn(seeds)
    assert torch.equal(each[0], alone[0])
    assert torch.equal(each[0], each[2])
    assert torch.equal(each[1:2], drawn(9, shape=(1, 2, 3, 5)))
    steps = drawn(5, torch.tensor([4, 4, 0]))
    assert torch.equal(steps[2], batch[2])
    everything = torch.stack([*batch, *each[1:2], *steps[:2], drawn(6)[0]])
    for i, one in enumerate(everything):
        assert all((one - other).abs().max() > 0.1 for other in everything[:i])


def test_drawn_noise_is_normal():
    z = drawn(1, shape=(4, 4, 64, 64)).double()
    assert z.mean().abs() < 0.02
    assert (z.var() - 1).abs() < 0.03
    assert (z.pow(4).mean() - 3).abs() < 0.2
    lagged = [
        (z.flatten()[lag:] * z.flatten()[: -lag or None]).mean().abs() for lag in (1, 2, 3, 64)
    ]
    assert max(lagged) < 0.02


@pytest.mark.parametrize("seed", [11, torch.tensor([3, 4])])
def test_a_seed_is_its_noise_given(seed):
    x, output, table = plain(2, 4, 2, 5), plain(4, 8, 2, 5, seed=1), step_table(dtype=torch.float64)
    options = {"clip": 0.5, "learned_range": True, "guided_channels": 3}
    seeds = torch.as_tensor(seed)
    noise = philox.normal(seeds, torch.tensor(3), x.shape)
    got = diffusion_step(x, output, table, 3, seed=seed, **options)
    torch.testing.assert_close(got, diffusion_step(x, output, table, 3, noise=noise, **options))


# ---- the model's output as token rows ------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    ("patch", "size"), [(2, (4, 6)), ((1, 3), (2, 9)), ([2], (6,)), (1, (5, 7)), ((4, 2), (4, 2))]
)
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("guided", [0, 2])
def test_token_rows_are_their_image(backend, patch, size, learned, guided):
    x, table = plain(2, 3, *size, dtype=torch.float32), step_table()
    axes = [patch] * len(size) if isinstance(patch, int) else list(patch)
    grid = [n // p for n, p in zip(size, axes, strict=True)]
    channels = 6 if learned else 3
    width = channels * torch.tensor(axes).prod().item()
    rows = plain(4 if guided else 2, x[0, 0].numel() * channels // width, width, dtype=x.dtype)
    options = {"seed": 3, "learned_range": learned, "guided_channels": guided, "clip": 1.0}
    with fastdit.backend(backend):
        got = diffusion_step(x, rows, table, 1, patch=patch, **options)
        image = unpatchify(rows, axes, grid, channels)
        for g, w in zip(got, diffusion_step(x, image, table, 1, **options), strict=True):
            assert torch.equal(g, w)


X, TABLE = torch.ones(2, 4, 3, 3), step_table()
WRONG = [
    (
        {"model_output": torch.ones(2, 5, 3, 3)},
        r"model_output: got \(2, 5, 3, 3\).*\(2, 4, 3, 3\) or",
    ),
    ({"learned_range": True}, r"model_output: .*allowed is \(2, 8, 3, 3\)"),
    ({"guided_channels": 3}, r"model_output: .*allowed is \(4, 4, 3, 3\)"),
    ({"guided_channels": 9}, "guided_channels: got 9, allowed is an int from 0 to 8"),
    ({"table": TABLE[:, :8]}, r"table: got \(4, 8\).*\(steps, 9\)"),
    ({"table": TABLE.bfloat16()}, "table: got .*bfloat16.*float32 or float64"),
    ({"step": 4}, "step: got 4, allowed is 0 to 3"),
    ({"step": torch.tensor(1, dtype=torch.int32)}, "step: got .*int32"),
    ({"step": torch.tensor([1, 2, 3])}, r"step: got \(3,\).*\(\) or \(2,\)"),
    ({"noise": torch.ones(2, 4, 3, 2)}, r"noise: got \(2, 4, 3, 2\)"),
    ({"noise": X.double()}, "noise: got .*float64"),
    ({"x0_previous": torch.ones(1, 4, 3, 3)}, "x0_previous: got"),
    ({"clip": 0.0}, "clip: got 0.0, allowed is None or a number > 0"),
    ({"x": torch.ones(2)}, r"x: got \(2,\)"),
    ({"seed": 1, "noise": X}, "seed: got a seed beside noise, allowed is one of noise and seed"),
    ({"seed": 2**63}, "seed: got 9223372036854775808, allowed is -9223372036854775808 to"),
    ({"seed": True}, "seed: got bool, allowed is an int, or an int64 tensor"),
    ({"seed": 1.5}, "seed: got float"),
    ({"seed": torch.tensor([1, 2, 3])}, r"seed: got \(3,\).*\(\) or \(2,\)"),
    ({"seed": torch.ones(2)}, r"seed: got \(2,\) float32"),
    ({"patch": 2}, r"patch: got 2, allowed is a positive int.*\(3, 3\), which it divides"),
    ({"patch": (3,)}, r"patch: got \(3,\)"),
    ({"patch": (3, 0)}, r"patch: got \(3, 0\)"),
    ({"patch": 3}, r"model_output: got \(2, 4, 3, 3\).*\(2, 1, 36\) or \(2, 1, 72\)"),
    ({"model_output": X.long()}, "model_output: got .*int64.*floating point"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_wrong_arguments_are_named(changes, message):
    arguments = {"x": X, "model_output": X, "table": TABLE, "step": 0}
    with pytest.raises(ValueError, match=message):
        diffusion_step(**{**arguments, **changes})


def test_a_wrong_type_is_named():
    with pytest.raises(TypeError, match="model_output: got list, allowed is a tensor"):
        diffusion_step(X, [1.0], TABLE, 0)
