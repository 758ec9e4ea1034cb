"""diffusion_step against its formula written out per sample, and its argument checks."""

from __future__ import annotations

import pytest
import torch
from op_cases import random, step_table

from fastdit.ops import diffusion_step


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
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_wrong_arguments_are_named(changes, message):
    arguments = {"x": X, "model_output": X, "table": TABLE, "step": 0}
    with pytest.raises(ValueError, match=message):
        diffusion_step(**{**arguments, **changes})
