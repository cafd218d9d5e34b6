"""Values that are hard for quantisers, and what the genuine `apr` 0.72.3 made of them."""

from __future__ import annotations

import numpy as np

# What `apr import --quantize` calls a type, and what `--cast` and the registry do.
KINDS = {"int8": ("q8", "apr_q8"), "int4": ("q4", "apr_q4"), "q4k": ("q4k", "q4_k")}

# SHA-256 of the payload that `apr import --quantize` gave for `hard_values()`, put into the checkpoint `odd_sizes` as
# the embedding (tests/reference/genuine_quantised_test.py does it again where $APR_BIN names `apr`).
HARD_SHA256 = {
    "int8": "e18bbba6c7e73abaed0f0a994c5bea8d65346c6e0f95769cb5ea27df936bcafb",
    "int4": "ab628358e3fd211f5844843c2a78dc3f13437b2f8058133d4cec1ca2161aaae3",
    "q4k": "4edc91f1c1dbeff67e96b1bc1ed362261ec05a68257d1665c66468c441c950ae",
}
# SHA-256 of all quantised payloads, in name order, that it gave for the checkpoint `odd_sizes` itself: rows and tensors
# that are no multiple of 32, and a head of its own.
ODD_SIZES_SHA256 = {
    "int8": "54b113960a186471f0ef96b23cc38f21e84529863cb34d8684c0517857b67104",
    "int4": "13b03b89387eeb0ed23e85502456e795954d05749d78cd573271530e0bd4776e",
    "q4k": "c5536b7d600933461efde97c2ab2cd3559595aa863a1e30469b3d2033b595d82",
}

HARD_SHAPE = (283, 66)


def hard_values(shape: tuple[int, int] = HARD_SHAPE) -> np.ndarray:
    """Returns float32 values, the same on every machine: raw bits, and products with powers of two only.

    Row after row: zeros, constants, one sign only, ties of the rounding, an outlier, half a row of zeros, groups of
    very different size, and every magnitude from 2^-60 to 8.
    """
    raw = np.random.PCG64(4).random_raw(shape[0] * shape[1]) >> np.uint64(40)
    values = (raw.astype(np.float64) / 2**23 - 1).reshape(shape)
    for number, row in enumerate(values):
        kind, power = number % 11, number // 11
        if kind == 0:
            row[:] = 0.0
        elif kind in (1, 2):
            row[:] = (0.5 if kind == 1 else -0.5) * 2.0**-power
        elif kind in (3, 4):
            row[:] = np.abs(row) * (1 if kind == 3 else -1) * 2.0**-power
        elif kind == 5:
            row[:] = np.rint(row * 2 ** (power % 9)) / 64
        elif kind == 6:
            row[power % shape[1]] = 8.0
        elif kind == 7:
            row[: shape[1] // 2] = 0.0
        elif kind == 8:
            row *= np.repeat(2.0 ** -(np.arange(-(-shape[1] // 32)) * power % 31), 32)[: shape[1]]
        elif kind == 9:
            row *= 2.0**-power
        else:
            row *= 2.0 ** (-power - 20 if power > 30 else 3 - power)
    return values.astype(np.float32)
