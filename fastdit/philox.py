"""Normal noise that belongs to (seed, sample, step), whatever the batch, the device or the backend.

Element e of a sample's noise, in the order of the sample's own layout `(C, ...)`, is

    counter = (low 32 bits of e/4, high 32 bits of e/4, sample, step)     key = seed
    (w0, w1, w2, w3) = Philox4x32-10(counter, key)
    u = (w0 + ½)·2⁻³² rounded to float32          θ = 2π·w1·2⁻³²
    normals 0, 1 = √(−2·log u)·(cos θ, sin θ)     and normals 2, 3 likewise of w2, w3

and e's is number e mod 4. u is rounded so that float32 code, which cannot do without, starts from
the same number. Philox is Salmon et al. 2011; in curand's names the offset is e/4 and the
subsequence step·2³² + sample. csrc/philox.h is the same on CPUs and GPUs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def _product(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """The high and the low word of a product, in halves: int64 holds no 64-bit product."""
    low = constant * (word & 0xFFFF)
    middle = constant * (word >> 16) + (low >> 16)
    return middle >> 16, (middle & 0xFFFF) << 16 | low & 0xFFFF


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four words of `counter` and two of `key` to four words, all int64 tensors."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _product(_MULTIPLIERS[0], c0)
        high1, low1 = _product(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + _KEY_STEPS[0] & _WORD, k1 + _KEY_STEPS[1] & _WORD
    return c0, c1, c2, c3


def _normal_pair(radius: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    u = ((radius.double() + 0.5) * 2**-32).float().double()
    length, theta = (-2 * u.log()).sqrt(), angle.double() * (2 * math.pi * 2**-32)
    return length * theta.cos(), length * theta.sin()


def normal(seed: Tensor, step: Tensor, shape: torch.Size) -> Tensor:
    """The noise of a batch of samples, in float64.

    Args:
        seed: int64 `()`, the samples are then numbered by their place in the batch, or `(B,)`, a
            seed for each sample, whose number is then 0.
        step: int64 `()` or `(B,)`.
        shape: `(B, ...)`.
    """
    size = math.prod(shape[1:])
    group = torch.arange((size + 3) // 4, device=seed.device)
    sample = torch.arange(shape[0], device=seed.device).unsqueeze(1) * (seed.dim() == 0)
    seed, step = seed.reshape(-1, 1), step.reshape(-1, 1)
    counter = (group & _WORD, group >> 32, sample, step & _WORD)
    w0, w1, w2, w3 = philox(counter, (seed & _WORD, seed >> 32 & _WORD))
    z = torch.stack([*_normal_pair(w0, w1), *_normal_pair(w2, w3)], -1)
    return z.flatten(1)[:, :size].reshape(shape)
