"""Quantisation and back, for the battery: plain loops over blocks, by the descriptions of the formats.

apr-v2-format section 2.4 for aprender's types; ggml-quants.c for GGML's. Written apart from converters.codecs and from
the search for causes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

_F = np.float32


def _half_away(values: np.ndarray) -> np.ndarray:
    """Rounds to the nearest integer, halves away from zero."""
    size = np.floor(np.abs(values.astype(np.float64)) + 0.5)
    # Codes are integers: there is no -0.
    return np.where(values < 0, 0 - size, size)


def _f16(value: float | np.ndarray) -> np.ndarray:
    return np.asarray(value).astype(np.float16).astype(np.float32)


def _by_block(values: np.ndarray, size: int, one: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    flat = values.reshape(-1).astype(_F)
    parts = [one(flat[begin : begin + size]) for begin in range(0, flat.size, size)]
    return np.concatenate(parts).astype(_F).reshape(values.shape)


def apr_q8(values: np.ndarray) -> np.ndarray:
    scale = _F(np.abs(values).max()) / _F(127)
    return (np.clip(_half_away(values / scale), -127, 127).astype(_F) * scale).astype(_F)


def apr_q4(values: np.ndarray) -> np.ndarray:
    def one(block: np.ndarray) -> np.ndarray:
        scale = np.abs(block).max() / _F(7)
        if scale == 0:
            return block
        return np.clip(_half_away(block / scale), -8, 7).astype(_F) * _f16(scale)

    return _by_block(values, 32, one)


def q8_0(values: np.ndarray) -> np.ndarray:
    def one(block: np.ndarray) -> np.ndarray:
        scale = np.abs(block).max() / _F(127)
        if scale == 0:
            return block
        return _half_away(block * (_F(1) / scale)).astype(_F) * _f16(scale)

    return _by_block(values, 32, one)


def q4_0(values: np.ndarray) -> np.ndarray:
    def one(block: np.ndarray) -> np.ndarray:
        scale = block[np.abs(block).argmax()] / _F(-8)
        if scale == 0:
            return block
        codes = np.minimum(15, np.floor(block * (_F(1) / scale) + _F(8.5)))
        return (codes - 8).astype(_F) * _f16(scale)

    return _by_block(values, 32, one)


def q4_1(values: np.ndarray) -> np.ndarray:
    def one(block: np.ndarray) -> np.ndarray:
        low = block.min()
        scale = (block.max() - low) / _F(15)
        if scale == 0:
            return np.full_like(block, _f16(low))
        codes = np.minimum(15, np.floor((block - low) * (_F(1) / scale) + _F(0.5)))
        return codes.astype(_F) * _f16(scale) + _f16(low)

    return _by_block(values, 32, one)


def _q4_k_group(group: np.ndarray) -> np.ndarray:
    """256 values, as `apr` does it: plain minimum and maximum, floors on the scales, no search."""
    floor = _F(6.1e-5)
    blocks = group.reshape(8, 32)
    low, high = blocks.min(1), blocks.max(1)
    scales = np.where(high - low > floor, (high - low) / _F(15), floor).astype(_F)
    mins = np.maximum(_F(0), -low).astype(_F)
    d = scales.max() / _F(63) if scales.max() > floor else floor
    dmin = mins.max() / _F(63) if mins.max() > floor else floor
    scale_codes = np.clip(_half_away(scales / d), 0, 63).astype(_F)
    min_codes = np.clip(_half_away(mins / dmin), 0, 63).astype(_F)
    out = np.zeros_like(blocks)
    for index, block in enumerate(blocks):
        step, shift = d * scale_codes[index], dmin * min_codes[index]
        codes = np.clip(_half_away((block + shift) / step), 0, 15) if step > 0 else np.zeros(32)
        out[index] = _f16(d) * scale_codes[index] * codes.astype(_F) - _f16(dmin) * min_codes[index]
    return out.reshape(-1)


def q4_k(values: np.ndarray) -> np.ndarray:
    """Rows are filled up with zeros to whole groups of 256."""
    rows = values.reshape(-1, values.shape[-1])
    padded = np.zeros((len(rows), -(-rows.shape[1] // 256) * 256), _F)
    padded[:, : rows.shape[1]] = rows
    out = np.concatenate([_q4_k_group(group) for group in padded.reshape(-1, 256)]).reshape(padded.shape)
    return out[:, : rows.shape[1]].reshape(values.shape)


def q6_k(values: np.ndarray) -> np.ndarray:
    """16 groups of 16 in 256 values, with 8-bit scales; the plain choice of scales, llama.cpp searches around it."""

    def one(group: np.ndarray) -> np.ndarray:
        group = np.pad(group, (0, -group.size % 256)).reshape(16, 16)
        largest = np.take_along_axis(group, np.abs(group).argmax(1)[:, None], 1)[:, 0]
        scales = largest / _F(-32)
        top = scales[np.abs(scales).argmax()]
        if top == 0:
            return np.zeros(256, _F)
        d = _f16(top / _F(-128))
        codes = np.minimum(127, _half_away(scales / d))
        steps = (d * codes.astype(_F))[:, None]
        with np.errstate(all="ignore"):
            q = np.clip(np.where(steps != 0, np.rint(group / steps), 0), -32, 31)
        return (steps * q).reshape(-1)

    flat = values.reshape(-1).astype(_F)
    parts = [one(flat[begin : begin + 256]) for begin in range(0, flat.size, 256)]
    return np.concatenate(parts)[: flat.size].astype(_F).reshape(values.shape)


QUANTISERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "apr_q8": apr_q8,
    "apr_q4": apr_q4,
    "q4_k": q4_k,
    "q8_0": q8_0,
    "q4_0": q4_0,
    "q4_1": q4_1,
    "q6_k": q6_k,
}
