"""Values as engines hold them in fewer bits: floats of 16 and 8 bits, and integers with a scale for some of them.

Every formula is the plain one, absolute maximum or minimum and maximum of a group: Q8_0 to Q5_1 are GGML's
(`quantize_row_*_ref`), int4 and q4_k `apr`'s own (`converters.formats.codecs`), NF4 that of bitsandbytes (Dettmers et
al. 2023, QLoRA), the rest what quantising runtimes do. `k_quants` has those that search for better scales.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import ml_dtypes
import numpy as np

from apr_jax.converters.formats import casts, codebooks, dtypes
from apr_jax.parity import k_quants

Values = np.ndarray

_FLOATS = {
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
}
_LARGEST = {"float8_e4m3": 448.0, "float8_e5m2": 57344.0}
_WHOLE = -1
"""A group that is as long as the row."""


def _grouped(values: Values, size: int, one: Callable[[Values], Values]) -> Values:
    """Applies `one` to groups [n, size] along rows, the last of a row filled up with zeros."""
    columns = values.shape[-1]
    size = columns if size == _WHOLE else size
    rows = np.pad(values.astype(np.float32).reshape(-1, columns), ((0, 0), (0, -columns % size)))
    with np.errstate(all="ignore"):
        made = one(rows.reshape(-1, size)).reshape(len(rows), -1)
    return made[:, :columns].reshape(values.shape).astype(np.float64)


def _in_float64(values: Values, size: int, one: Callable[[Values], Values]) -> Values:
    """The same without rounding to float32."""
    columns = values.shape[-1]
    groups = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, -columns % size)]).reshape(-1, size)
    return one(groups).reshape(*values.shape[:-1], -1)[..., :columns]


def _half(values: Values) -> Values:
    return values.astype(np.float16).astype(np.float32)


def _times_inverse(values: Values, step: Values) -> Values:
    """GGML multiplies with the inverse of a step, which rounds once more than dividing by it."""
    return values * np.where(step != 0, np.float32(1) / np.where(step != 0, step, 1), np.float32(0))


def _divided(values: Values, step: Values) -> Values:
    return np.where(step != 0, values / np.where(step != 0, step, 1), np.float32(0))


def _away(values: Values) -> Values:
    return np.trunc(values + np.copysign(np.float32(0.5), values))


def _largest(groups: Values) -> Values:
    return np.abs(groups).max(axis=-1, keepdims=True)


def _absmax(levels: int, rounded: Callable[[Values], Values] = _away) -> Callable[[Values], Values]:
    def one(groups: Values) -> Values:
        step = _largest(groups) / np.float32(levels)
        return np.clip(rounded(_divided(groups, step)), -levels, levels) * step

    return one


def _q8_0(groups: Values) -> Values:
    step = _largest(groups) / np.float32(127)
    return _away(_times_inverse(groups, step)) * _half(step)


def _signed_max(half: int) -> Callable[[Values], Values]:
    """GGML's: the value of the largest magnitude becomes the lowest code."""

    def one(groups: Values) -> Values:
        largest = np.take_along_axis(groups, np.abs(groups).argmax(-1)[:, None], -1)
        step = largest / np.float32(-half)
        codes = np.minimum(2 * half - 1, np.trunc(_times_inverse(groups, step) + np.float32(half + 0.5)))
        return (codes - half) * _half(step)

    return one


def _affine(levels: int) -> Callable[[Values], Values]:
    """GGML's: the smallest value and a step."""

    def one(groups: Values) -> Values:
        low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
        step = (high - low) / np.float32(levels)
        return np.minimum(levels, np.trunc(_times_inverse(groups - low, step) + np.float32(0.5))) * _half(step) + _half(
            low
        )

    return one


def _zero_point(levels: int) -> Callable[[Values], Values]:
    """A step, and the integer that stands for zero."""

    def one(groups: Values) -> Values:
        low, high = (f(groups, 0).min(-1, keepdims=True) for f in (np.minimum, lambda g, z: -np.maximum(g, z)))
        step = (-high - low) / np.float32(levels)
        zero = np.clip(np.rint(_divided(-low, step)), 0, levels)
        return (np.clip(np.rint(_divided(groups, step)) + zero, 0, levels) - zero) * step

    return one


def _codebook(levels: tuple[float, ...]) -> Callable[[Values], Values]:
    table = np.array(levels, np.float32)
    edges = (table[1:] + table[:-1]) / 2

    def one(groups: Values) -> Values:
        largest = _largest(groups)
        return table[np.searchsorted(edges, _divided(groups, largest))] * largest

    return one


def _float(name: str, values: Values) -> Values:
    return values.astype(np.float32).astype(_FLOATS[name]).astype(np.float32)


def _scaled_float(name: str) -> Callable[[Values], Values]:
    def one(groups: Values) -> Values:
        step = _largest(groups) / np.float32(_LARGEST[name])
        return _float(name, _divided(groups, step)) * step

    return one


def _of_apr(name: str) -> Callable[[Values], Values]:
    """As `apr import --quantize` leaves a weight."""

    def one(values: Values) -> Values:
        dtype, payload = dtypes.by_name(name), casts.quantise(values.astype(np.float32), name, values.shape)
        columns = dtype.padded_columns(values.shape, len(payload))
        width = values.shape[-1] if columns is None else columns + -columns % dtype.block_elements
        out = np.empty(values.size // values.shape[-1] * width, np.float32)
        dtype.codec.decode(payload, out)
        return out.reshape(-1, width)[:, : values.shape[-1]].reshape(values.shape).astype(np.float64)

    return one


def _by_group(size: int, one: Callable[[Values], Values]) -> Callable[[Values], Values]:
    return lambda values: _grouped(values, size, one)


def _by_tensor(one: Callable[[Values], Values]) -> Callable[[Values], Values]:
    return lambda values: one(values.astype(np.float32).reshape(1, -1)).reshape(values.shape).astype(np.float64)


def _k_quant(name: str) -> Callable[[Values], Values]:
    return lambda values: k_quants.quantised(values, name).astype(np.float64)


def fits(codec: str, columns: int) -> bool:
    """Whether rows can be held so: of what is no multiple of their blocks, llama.cpp makes no K-quants."""
    return codec not in k_quants.NAMES or columns % k_quants.BLOCK == 0


def _cast(name: str) -> Callable[[Values], Values]:
    return lambda values: _float(name, values).astype(np.float64)


CODECS: Mapping[str, Callable[[Values], Values]] = {
    "fp16": _cast("float16"),
    "bf16": _cast("bfloat16"),
    "int8": _of_apr("apr_q8"),
    "int4": _of_apr("apr_q4"),
    "q4_k": _of_apr("q4_k"),
    "q8_0": _by_group(32, _q8_0),
    "q4_0": _by_group(32, _signed_max(8)),
    "q4_1": _by_group(32, _affine(15)),
    "q5_0": _by_group(32, _signed_max(16)),
    "q5_1": _by_group(32, _affine(31)),
    **{name: _k_quant(name) for name in k_quants.NAMES},
    "int8 by row": _by_group(_WHOLE, _absmax(127)),
    "fp8_e4m3": _cast("float8_e4m3"),
    "fp8_e5m2": _cast("float8_e5m2"),
    "fp8_e4m3 by tensor": _by_tensor(_scaled_float("float8_e4m3")),
    "fp8_e4m3 by row": _by_group(_WHOLE, _scaled_float("float8_e4m3")),
    "nf4 by 64": _by_group(64, _codebook(codebooks.NF4)),
    **{f"int4 by {size}": _by_group(size, _absmax(7)) for size in (32, 64, 128)},
    **{f"int4 with zero points by {size}": _by_group(size, _zero_point(15)) for size in (32, 64, 128)},
}
"""What weights are quantised by: float values [out, in] -> the values that are left, float64."""
WAYS: Mapping[str, Callable[[Values], Values]] = {
    "int8 by row": _by_group(_WHOLE, _absmax(127, np.rint)),
    **{f"int4 by {size}": _by_group(size, _absmax(7, np.rint)) for size in (32, 64, 128)},
}
"""The same with ties to even: bfloat16 weights have many."""

_HEADED: Mapping[str, Callable[[Values], Values]] = {
    **{name: _cast(name) for name in _FLOATS},
    "q8_0": CODECS["q8_0"],
    "q4_0": CODECS["q4_0"],
}
FLOATS = tuple(_FLOATS)
"""What scores and shares of attention may be computed in."""
CACHES = tuple(_HEADED)
"""What caches of keys and values are held in."""


Q8_K = 256
"""Values that a block of Q8_K holds."""


def _q8_k(groups: Values) -> Values:
    """GGML's Q8_K, as engines round what they multiply with K-quants."""
    step = _largest(groups) / 127
    return np.rint(_divided(groups, step)) * step


ACTIVATIONS: Mapping[str, Callable[[Values], Values]] = {
    "q8_k": lambda values: _in_float64(values, Q8_K, _q8_k),
    "int8 by row": CODECS["int8 by row"],
    "q8_0": CODECS["q8_0"],
    "fp8_e4m3": CODECS["fp8_e4m3"],
    "fp8_e4m3 by row": CODECS["fp8_e4m3 by row"],
}
"""What activations are rounded to before a product: a row is a position."""


def rounded(values: Values, name: str) -> Values:
    """Returns values as one of `CACHES` holds them, float64."""
    with np.errstate(over="ignore"):
        return _HEADED[name](values)
