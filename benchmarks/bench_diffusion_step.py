"""One step of ancestral sampling: the published arithmetic in eager PyTorch against diffusion_step.

    pytest benchmarks/bench_diffusion_step.py --benchmark-group-by=param:shape
    python benchmarks/bench_diffusion_step.py [--threads 2] [--rounds 31]

The second form prints a table. All candidates of a shape take turns, so that a slow moment of the
machine falls on each, and a figure is the median of its turns. With one thread a turn is timed in
the process's own CPU time, which other processes disturb little; with more it is wall time, and
turns during which other processes ran are thrown away (one busy neighbour costs two-thread eager a
factor of ten): it waits for an idle machine.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import pytest
import torch
from timing import timed
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastdit
from fastdit.diffusion import tables
from fastdit.ops import diffusion_step

SHAPES = [(1, 4, 32, 32), (8, 4, 32, 32), (64, 4, 32, 32), (1, 3, 256, 256)]
CANDIDATES = ("published", "noise given", "randn_like", "seed", "seed, token rows", "randn alone")


class Published:
    """DDPM's step with a learned variance as the published code computes it: every coefficient is
    copied from a float64 array, indexed, and expanded to the shape of x, also those of the true
    posterior's variance, which it returns beside the mean."""

    def __init__(self, diffusion) -> None:
        self.diffusion = diffusion
        row = diffusion.posterior_log_variance_clipped
        self.arrays = {"min_log": row, "max_log": torch.tensor(diffusion.betas).log().numpy()}
        for name in (
            "posterior_variance",
            "sqrt_recip_alphas_cumprod",
            "sqrt_recipm1_alphas_cumprod",
            "posterior_mean_coef1",
            "posterior_mean_coef2",
        ):
            self.arrays[name] = getattr(diffusion, name)

    def coefficient(self, name: str, t: Tensor, x: Tensor) -> Tensor:
        value = torch.from_numpy(self.arrays[name]).to(x.device)[t].float()
        while value.dim() < x.dim():
            value = value[..., None]
        return value + torch.zeros(x.shape, device=x.device)

    def __call__(self, x: Tensor, output: Tensor, t: Tensor, noise: Tensor | None) -> Tensor:
        epsilon, v = torch.split(output, x.shape[1], dim=1)
        low, high = self.coefficient("min_log", t, x), self.coefficient("max_log", t, x)
        fraction = (v + 1) / 2
        log_variance = fraction * high + (1 - fraction) * low
        variance = torch.exp(log_variance)
        x0 = (
            self.coefficient("sqrt_recip_alphas_cumprod", t, x) * x
            - self.coefficient("sqrt_recipm1_alphas_cumprod", t, x) * epsilon
        ).clamp(-1, 1)
        mean = (
            self.coefficient("posterior_mean_coef1", t, x) * x0
            + self.coefficient("posterior_mean_coef2", t, x) * x
        )
        posterior = [self.coefficient(name, t, x) for name in ("posterior_variance", "min_log")]
        assert all(value.shape == x.shape for value in (mean, variance, x0, *posterior))
        noise = torch.randn_like(x) if noise is None else noise
        not_last = (t != 0).float().view(-1, *[1] * (x.dim() - 1))
        return mean + not_last * torch.exp(0.5 * log_variance) * noise


def candidates(shape: tuple[int, ...]) -> dict[str, Callable[[], object]]:
    """Functions of no arguments by name, once all of them agree."""
    diffusion = fastdit.create_diffusion("")
    published = Published(diffusion)
    table = tables.ddpm(diffusion, diffusion.model_mean_type, diffusion.model_var_type)
    table = torch.as_tensor(table, dtype=torch.float32)
    batch, channels, height, width = shape
    x, noise = torch.randn(shape), torch.randn(shape)
    output, seed = torch.randn(batch, 2 * channels, height, width), torch.tensor(1)
    rows = torch.randn(batch, height * width // 4, 8 * channels)
    t = torch.full((batch,), 500)
    options = {"clip": 1.0, "learned_range": True}
    want = published(x, output, t, noise)
    got, _ = diffusion_step(x, output, table, t, noise=noise, **options)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    return {
        "published": lambda: published(x, output, t, None),
        "noise given": lambda: diffusion_step(x, output, table, t, noise=noise, **options),
        "randn_like": lambda: diffusion_step(
            x, output, table, t, noise=torch.randn_like(x), **options
        ),
        "seed": lambda: diffusion_step(x, output, table, t, seed=seed, **options),
        "seed, token rows": lambda: diffusion_step(
            x, rows, table, t, seed=seed, patch=(2, 2), **options
        ),
        "randn alone": lambda: torch.randn_like(x),
    }


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("candidate", CANDIDATES)
def test_step(benchmark, candidate, shape):
    with torch.no_grad():
        benchmark(candidates(shape)[candidate])


class _Count(TorchDispatchMode):
    calls = kernels = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += 1
        self.kernels += not function.is_view
        return function(*args, **(kwargs or {}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=31)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = "CPU time" if options.threads == 1 else "wall time"
    print(f"torch {torch.__version__}, {options.threads} threads, µs of {clock}, median [min..max]")
    with torch.no_grad():
        with _Count() as count:
            candidates(SHAPES[0])["published"]()
        for shape in SHAPES:
            functions = candidates(shape)
            with _Count() as count:
                functions["published"]()
            print(f"\n{shape}: published, {count.calls} calls of which {count.kernels} kernels")
            found = timed(functions, options.rounds)
            for name, times in found.items():
                times = [1e6 * value for value in times]
                pairs = zip(found["published"], found[name], strict=True)
                ratio = statistics.median(a / b for a, b in pairs)
                print(
                    f"  {name:18} {statistics.median(times):9.1f} "
                    f"[{min(times):.1f}..{max(times):.1f}]  {ratio:6.1f}x"
                )


if __name__ == "__main__":
    main()
