"""bfloat16 in numpy, which has no such type: bit patterns are uint16."""

from __future__ import annotations

import numpy as np


def bfloat16_to_float(bits: np.ndarray) -> np.ndarray:
    """fp32 values of bfloat16 bit patterns held as uint16; exact."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def float_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """bfloat16 bit patterns of fp32 values, rounded to nearest even."""
    values = np.ascontiguousarray(values, np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)
