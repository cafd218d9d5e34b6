"""Values of which k_quants.npz has what ggml makes: a weight, and rows that are hard for quantisers."""

from __future__ import annotations

import numpy as np

BLOCK_BYTES = {"q2_k": 84, "q3_k": 110, "q4_k": 144, "q5_k": 176, "q6_k": 210}


def weight() -> np.ndarray:
    """Returns float32 [64, 256], the same on every machine: sums of three uniform numbers, some far out."""
    raw = np.random.PCG64(6).random_raw(3 * 64 * 256).reshape(3, 64, 256) >> np.uint64(40)
    values = (raw.astype(np.float64) / 2**23 - 1).sum(0) / 32
    values[::7, ::31] *= 8
    return values.astype(np.float32)


def hard() -> np.ndarray:
    """Returns float32 [8, 256]: zeros, one number, one sign, hardly anything, ties, an outlier, half of it zeros."""
    values = weight()[:8].copy()
    values[0] = 0
    values[1], values[2] = 0.5, np.abs(values[2])
    values[3] = -np.abs(values[3])
    values[4] *= np.float32(2.0**-60)
    values[5] = np.rint(values[5] * 256) / 128
    values[6, 100] = 64
    values[7, :128] = 0
    return values
