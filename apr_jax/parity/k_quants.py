"""K-quants as llama.cpp makes them of weights without an importance matrix: scales are searched for, not just computed.

ggml-quants.c of ggml (MIT): `quantize_row_{q2,q3,q4,q5,q6}_K_ref` with `make_qx_quants`, `make_q3_quants` and
`make_qkx2_quants`, whose order of float32 operations is kept, sums included: which scale is taken may hang on it. What
an importance matrix leads to cannot be replayed without that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

Values = np.ndarray
_Each = Callable[[Values], Values]
_F = np.float32
BLOCK = 256
"""Values that share what scales are multiples of."""
_SMALLEST = _F(1e-15)
_SWEEPS = 5
# Blocks: some twenty arrays of this size are needed beside them.
_AT_ONCE = 1 << 10


def _sum(values: Values) -> Values:
    """Adds up along the last axis in float32, one after the other."""
    return np.add.accumulate(values, axis=-1, dtype=np.float32)[..., -1]


def _divided(values: Values, by: Values) -> Values:
    return np.where(by != 0, values / np.where(by != 0, by, 1), _F(0)).astype(np.float32)


def _half(values: Values) -> Values:
    return values.astype(np.float16).astype(np.float32)


def _signed_largest(groups: Values) -> Values:
    """Returns the value of the largest magnitude of each group, the first of those that are as large."""
    return np.take_along_axis(groups, np.abs(groups).argmax(-1)[..., None], -1)[..., 0]


# --- a group's scale


def _symmetric(groups: Values, half: int) -> Values:
    """`make_qx_quants`, weights x²: returns the scale of each group, [n]."""
    largest = _signed_largest(groups)
    weights = groups * groups

    def fitted(nmax: np.float32) -> tuple[Values, Values]:
        levels = np.clip(np.rint((-nmax / largest)[:, None] * groups), -half, half - 1).astype(np.float32)
        return _sum(weights * groups * levels), _sum(weights * levels * levels)

    top, below = fitted(_F(half))
    scale = _divided(top, below)
    best = scale * top
    for step in (*range(-9, 0), *range(1, 10)):
        top, below = fitted(_F(half) + _F(0.1) * _F(step))
        better = (below > 0) & (top * top > best * below)
        scale = np.where(better, _divided(top, below), scale)
        best = np.where(better, scale * top, best)
    return np.where(np.abs(largest) < _SMALLEST, _F(0), scale)


def _symmetric_by_level(groups: Values, half: int) -> Values:
    """`make_q3_quants`: levels are moved one by one while that makes the fit better."""
    largest = _signed_largest(groups)
    weights = groups * groups
    levels = np.clip(np.rint((_F(-half) / largest)[:, None] * groups), -half, half - 1).astype(np.float32)
    top, below = _sum(weights * groups * levels), _sum(weights * levels * levels)
    going = np.ones(len(groups), bool)
    for _ in range(_SWEEPS):
        changed = np.zeros(len(groups), bool)
        for at in range(groups.shape[1]):
            value, weight, level = groups[:, at], weights[:, at], levels[:, at]
            without = top - weight * value * level
            rest = below - weight * level * level
            new = np.clip(np.rint(value * rest / np.where(without != 0, without, 1)), -half, half - 1).astype(
                np.float32
            )
            over, under = without + weight * value * new, rest + weight * new * new
            better = going & (without > 0) & (new != level) & (under > 0) & (over * over * below > top * top * under)
            levels[:, at] = np.where(better, new, level)
            top, below = np.where(better, over, top), np.where(better, under, below)
            changed |= better
        going &= changed
        if not going.any():
            break
    return np.where(np.abs(largest) < _SMALLEST, _F(0), _divided(top, below))


@dataclasses.dataclass(frozen=True)
class _Search:
    """What `make_qkx2_quants` tries: so many steps from `first` on, 0.1 each; errors are absolute or squares."""

    first: float
    steps: int
    absolute: bool


def _affine(groups: Values, weights: Values, most: int, search: _Search) -> tuple[Values, Values]:
    """`make_qkx2_quants`: returns the scale of each group, and what is taken off it, both [n]."""
    low, high = np.minimum(groups.min(-1), _F(0)), groups.max(-1)
    of_weights, of_values = _sum(weights), _sum(weights * groups)

    def levels_by(factor: np.float32, minimum: Values) -> Values:
        inverse = factor / (high - minimum)
        return np.clip(np.rint(inverse[:, None] * (groups - minimum[:, None])), 0, most).astype(np.float32)

    def error(scale: Values, minimum: Values, levels: Values) -> Values:
        difference = scale[:, None] * levels + minimum[:, None] - groups
        return _sum(weights * (np.abs(difference) if search.absolute else difference * difference))

    flat = high == low
    scale, minimum = _F(1) / (_F(most) / (high - low)), low
    best = error(scale, minimum, levels_by(_F(most), minimum))
    for step in range(search.steps + 1):
        levels = levels_by(_F(search.first) + _F(0.1) * _F(step) + _F(most), minimum)
        weighted = weights * levels
        once, twice, crossed = _sum(weighted), _sum(weighted * levels), _sum(weighted * groups)
        determinant = of_weights * twice - once * once
        this = (of_weights * crossed - of_values * once) / determinant
        lowest = (twice * of_values - once * crossed) / determinant
        above = lowest > 0
        this, lowest = np.where(above, crossed / twice, this), np.where(above, _F(0), lowest)
        wrong = error(this, lowest, levels)
        better = (determinant > 0) & (wrong < best)
        scale, minimum, best = (
            np.where(better, new, old) for new, old in ((this, scale), (lowest, minimum), (wrong, best))
        )
    return np.where(flat, _F(0), scale), np.where(flat, -low, -minimum)


# --- a block of 256


def _with_minima(bits: int, size: int, most: int, weigh: _Each, search: _Search) -> _Each:
    """Q2_K, Q4_K, Q5_K: value = d * scale * q - dmin * minimum, scales and minima whole numbers up to `most`."""

    def one(blocks: Values) -> Values:
        groups = blocks.reshape(-1, size)
        scale, minimum = (
            part.reshape(len(blocks), -1) for part in _affine(groups, weigh(groups), (1 << bits) - 1, search)
        )
        scale, minimum = (_whole_multiples(part, most)[..., None] for part in (scale, minimum))
        values = blocks.reshape(len(blocks), -1, size)
        levels = np.clip(np.rint(_divided(values + minimum, scale)), 0, (1 << bits) - 1).astype(np.float32)
        return (scale * levels - minimum).reshape(blocks.shape)

    return one


def _whole_multiples(numbers: Values, most: int) -> Values:
    """Returns numbers >= 0, [blocks, groups], as multiples of what each block's largest is `most` times of."""
    largest = numbers.max(-1, keepdims=True)
    inverse = _divided(np.full_like(largest, most), largest)
    return _half(largest / _F(most)) * np.minimum(np.rint(inverse * numbers), most).astype(np.float32)


def _around_zero(half: int, most: int, scales: Callable[[Values, int], Values]) -> _Each:
    """Q3_K, Q6_K: value = d * scale * q, groups of 16, scales whole numbers of either sign."""

    def one(blocks: Values) -> Values:
        scale = scales(blocks.reshape(-1, 16), half).reshape(len(blocks), 16)
        largest = _signed_largest(scale)[:, None]
        inverse = _divided(np.full_like(largest, -most), largest)
        steps = np.clip(np.rint(inverse * scale), -most, most - 1).astype(np.float32)
        step = (_half(_divided(np.ones_like(inverse), inverse)) * steps)[..., None]
        values = blocks.reshape(len(blocks), 16, 16)
        levels = np.clip(np.rint(_divided(values, step)), -half, half - 1).astype(np.float32)
        return (step * levels).reshape(blocks.shape)

    return one


def _around_mean(groups: Values) -> Values:
    return np.sqrt(_sum(groups * groups) / _F(groups.shape[-1]))[:, None] + np.abs(groups)


_BLOCKS: Mapping[str, _Each] = {
    "q2_k": _with_minima(2, 16, 15, np.abs, _Search(-0.5, 15, absolute=True)),
    "q3_k": _around_zero(4, 32, _symmetric_by_level),
    "q4_k of llama.cpp": _with_minima(4, 32, 63, _around_mean, _Search(-1.0, 20, absolute=False)),
    "q5_k": _with_minima(5, 32, 63, _around_mean, _Search(-0.5, 15, absolute=False)),
    "q6_k": _around_zero(32, 128, _symmetric),
}
NAMES = tuple(_BLOCKS)


def quantised(values: Values, name: str) -> Values:
    """Returns what a K-quant leaves of values [..., a multiple of 256], float32."""
    blocks = np.ascontiguousarray(values, np.float32).reshape(-1, BLOCK)
    out = np.empty_like(blocks)
    with np.errstate(all="ignore"):
        for begin in range(0, len(blocks), _AT_ONCE):
            out[begin : begin + _AT_ONCE] = _BLOCKS[name](blocks[begin : begin + _AT_ONCE])
    return out.reshape(values.shape)
