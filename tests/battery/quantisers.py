"""Quantisation and back, for the battery: plain formulas, by the descriptions of the formats.

apr-v2-format section 2.4 for aprender's types; ggml-quants.c for GGML's; bitsandbytes' published code tables; ml_dtypes
for FP8. Written apart from converters.codecs and from the search for causes.
"""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
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


# --- types that are told by their grids: [groups, elements] -> the values that are left


def grouped(values: np.ndarray, group: int | str, one: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Quantises by the whole tensor, rows, blocks of 128 x 128 or groups of neighbours, which run on across rows."""
    if group == "128x128":
        out = np.empty_like(values, _F)
        for row in range(0, values.shape[0], 128):
            for column in range(0, values.shape[1], 128):
                part = values[row : row + 128, column : column + 128]
                out[row : row + 128, column : column + 128] = one(part.reshape(1, -1)).reshape(part.shape)
        return out
    width = {"tensor": values.size, "row": values.shape[-1]}.get(group, group)
    return one(values.reshape(-1, width).astype(_F)).astype(_F).reshape(values.shape)


def _largest(groups: np.ndarray) -> np.ndarray:
    found = np.abs(groups).max(1, keepdims=True)
    return np.where(found > 0, found, _F(1))


def symmetric(bits: int) -> Callable[[np.ndarray], np.ndarray]:
    """The largest magnitude is the largest code, as GPTQ's and compressed-tensors' symmetric types."""
    most = (1 << (bits - 1)) - 1

    def one(groups: np.ndarray) -> np.ndarray:
        scale = _largest(groups) / _F(most)
        return np.clip(np.rint(groups / scale), -most - 1, most) * scale

    return one


def asymmetric(bits: int) -> Callable[[np.ndarray], np.ndarray]:
    """A whole zero point between smallest and largest, as AWQ's and GPTQ's asymmetric types."""
    most = (1 << bits) - 1

    def one(groups: np.ndarray) -> np.ndarray:
        low = np.minimum(groups.min(1, keepdims=True), 0)
        high = np.maximum(groups.max(1, keepdims=True), 0)
        scale = np.where(high > low, (high - low) / _F(most), _F(1))
        zero = np.rint(-low / scale)
        return (np.clip(np.rint(groups / scale) + zero, 0, most) - zero) * scale

    return one


def real_zero(bits: int) -> Callable[[np.ndarray], np.ndarray]:
    """Steps from the smallest value to the largest, as HQQ begins."""
    most = (1 << bits) - 1

    def one(groups: np.ndarray) -> np.ndarray:
        low = groups.min(1, keepdims=True)
        scale = np.where(groups.max(1, keepdims=True) > low, (groups.max(1, keepdims=True) - low) / _F(most), _F(1))
        return np.rint((groups - low) / scale) * scale + low

    return one


def compensated(bits: int, group: int) -> Callable[[np.ndarray], np.ndarray]:
    """GPTQ: column after column is rounded, and what was lost is made up for in the columns behind it."""

    def one(values: np.ndarray) -> np.ndarray:
        most = (1 << (bits - 1)) - 1
        left, out = values.astype(np.float64), np.empty(values.shape)
        random = np.random.default_rng(values.size)
        share = random.uniform(-0.4, 0.4, values.shape[1])
        for column in range(values.shape[1]):
            if column % group == 0:
                scale = _largest(left[:, column : column + group]) / most
            out[:, column] = (np.clip(np.rint(left[:, column, None] / scale), -most - 1, most) * scale)[:, 0]
            lost = left[:, column] - out[:, column]
            left[:, column + 1 : column + 9] += lost[:, None] * share[column]
        return out

    return one


# bitsandbytes, functional.py: get_4bit_type("nf4") and ("fp4").
# fmt: off
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on
FP4 = (0.0, 0.0052083333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25)
FP4 = (*FP4, *(-value for value in FP4))
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _nearest(groups: np.ndarray, codes: np.ndarray) -> np.ndarray:
    codes = np.sort(codes)
    return codes[np.searchsorted((codes[1:] + codes[:-1]) / 2, groups)]


def codes_of_absmax(codes: tuple[float, ...], *, double: bool = False) -> Callable[[np.ndarray], np.ndarray]:
    """bitsandbytes' 4-bit types; `double`: the largest magnitudes kept as 8 bits, in blocks of 256 of them."""

    def one(groups: np.ndarray) -> np.ndarray:
        largest = _largest(groups).astype(np.float64)
        kept = largest
        if double:
            mean = largest.mean()
            blocks = np.pad((largest - mean).reshape(-1), (0, -largest.size % 256)).reshape(-1, 256)
            top = np.abs(blocks).max(1, keepdims=True)
            kept = (np.rint(blocks / top * 127) / 127 * top).reshape(-1)[: largest.size, None] + mean
        return _nearest(groups / largest, np.array(codes)) * kept

    return one


def float8(name: str) -> Callable[[np.ndarray], np.ndarray]:
    dtype = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}[name]

    def one(groups: np.ndarray) -> np.ndarray:
        scale = _largest(groups) / _F(ml_dtypes.finfo(dtype).max)
        return (groups / scale).astype(_F).astype(dtype).astype(_F) * scale

    return one


def mxfp4(groups: np.ndarray) -> np.ndarray:
    """OCP MX: the scale is a power of two, from the exponent of the largest magnitude."""
    scale = np.exp2(np.floor(np.log2(_largest(groups))) - 2)
    return _nearest(groups / scale, np.array(E2M1)) * scale


def nvfp4(groups: np.ndarray) -> np.ndarray:
    """Groups of 16 with E4M3 scales, which have one float32 scale for the tensor."""
    largest = _largest(groups) * groups.any(1, keepdims=True)
    whole = _F(largest.max() / (448 * 6))
    scale = (largest / 6 / whole).astype(ml_dtypes.float8_e4m3fn).astype(_F) * whole
    with np.errstate(all="ignore"):
        return np.where(scale > 0, _nearest(groups / scale, np.array(E2M1)) * scale, 0)


def unknown(count: int) -> Callable[[np.ndarray], np.ndarray]:
    """So many values of their own for each group: quantiles, as k-means would begin."""

    def one(groups: np.ndarray) -> np.ndarray:
        codes = np.quantile(groups, (np.arange(count) + 0.5) / count, axis=1).T
        return np.take_along_axis(codes, np.abs(groups[..., None] - codes[:, None]).argmin(-1), 1)

    return one


def _shared(numbers: np.ndarray, most: int) -> np.ndarray:
    """Stores each row of numbers >= 0 as whole multiples of one half-precision step."""
    step = _f16(numbers.max(1, keepdims=True) / most)
    with np.errstate(all="ignore"):
        return np.where(step > 0, np.clip(np.rint(numbers / step), 0, most) * step, 0)


def k_affine(bits: int, group: int, most: int) -> Callable[[np.ndarray], np.ndarray]:
    """q2_k, q4_k, q5_k: [n, 256]; value = d * scale * q - dmin * minimum, scales and minima in few bits."""
    top = (1 << bits) - 1

    def one(groups: np.ndarray) -> np.ndarray:
        blocks = groups.reshape(len(groups), -1, group)
        low = np.maximum(-blocks.min(2), 0)
        scale = _shared((blocks.max(2) + low) / top, most)[..., None]
        minimum = _shared(low, most)[..., None]
        with np.errstate(all="ignore"):
            q = np.clip(np.where(scale > 0, np.rint((blocks + minimum) / scale), 0), 0, top)
        return (scale * q - minimum).reshape(groups.shape)

    return one


def k_symmetric(bits: int, group: int, most: int, codes: tuple[float, ...] = ()) -> Callable[[np.ndarray], np.ndarray]:
    """q3_k, q6_k, iq4_xs: [n, 256]; value = d * scale * q (or a code of q)."""
    half = 1 << (bits - 1)

    def one(groups: np.ndarray) -> np.ndarray:
        blocks = groups.reshape(len(groups), -1, group)
        scale = _shared(np.abs(blocks).max(2) / (max(codes) if codes else half - 1), most)[..., None]
        with np.errstate(all="ignore"):
            levels = np.where(scale > 0, blocks / scale, 0)
        q = _nearest(levels, np.array(codes)) if codes else np.clip(np.rint(levels), -half, half - 1)
        return (scale * q).reshape(groups.shape)

    return one


def iq4_nl(groups: np.ndarray) -> np.ndarray:
    scale = _f16(_largest(groups) / 113)
    return _nearest(groups / scale, np.array(IQ4_NL)) * scale


# name -> (elements that have to follow each other, quantiser)
FIXED: dict[str, tuple[int, Callable[[np.ndarray], np.ndarray]]] = {
    "q2_k": (256, k_affine(2, 16, 15)),
    "q3_k": (256, k_symmetric(3, 16, 31)),
    "q4_k": (256, k_affine(4, 32, 63)),
    "q5_k": (256, k_affine(5, 32, 63)),
    "q6_k": (256, k_symmetric(6, 16, 127)),
    "iq4_xs": (256, k_symmetric(4, 32, 31, IQ4_NL)),
    "mxfp4": (32, mxfp4),
    "nvfp4": (16, nvfp4),
}
