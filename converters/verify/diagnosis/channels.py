"""Finds rows and columns that were treated by themselves: a few scaled ones, or each by a factor of its own.

A factor for each channel is what moves a norm's weights, or smoothing scales (SmoothQuant, AWQ), into the next
matrices. Whether the model still computes the same, `story` says, which sees both sides.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from apr_jax.converters.verify.diagnosis import elementwise, sparse
from apr_jax.converters.verify.diagnosis import pair as pairs
from apr_jax.converters.verify.diagnosis.causes import Found
from apr_jax.converters.verify.diagnosis.pair import ACCEPTED, Bits, Pair, Select

# Lines that are looked at first, and how many of all may differ to be called single ones.
_PROBED, _FEW = 6, 0.25
# Elements that a line needs to have before they prove a factor.
_ENOUGH = 8


def single_lines(pair: Pair) -> tuple[int, np.ndarray] | None:
    """Returns the axis and numbers of the lines that differ, if they are few and the others are equal."""
    rows, columns = pair.shape
    if len(pair.b.shape) != 2 or not 0 < pair.differing <= _FEW * pair.size:
        return None
    for axis, count in ((0, rows), (1, columns)):
        hit = np.unique(pair.sample // columns if axis == 0 else pair.sample % columns)
        if count < 8 or len(hit) > _FEW * count:
            continue
        hit = np.flatnonzero(pair.differs.reshape(rows, columns).any(1 - axis))
        # A few scattered elements are not a line.
        if len(hit) <= _FEW * count and pair.differing >= 0.5 * len(hit) * (columns if axis == 0 else rows):
            return axis, hit
    return None


def scaled_lines(pair: Pair) -> Iterator[Found]:
    """One factor for a few rows or columns; the others are equal."""
    lines = single_lines(pair)
    if lines is None or not (pair.original.dtype.is_float and pair.suspect.dtype.is_float):
        return
    axis, hit = lines
    rows, columns = pair.shape
    inside = np.zeros(columns if axis else rows, bool)
    inside[hit] = True

    def where(select: Select) -> np.ndarray:
        index = np.arange(select.start, select.stop) if isinstance(select, slice) else select
        return inside[index % columns if axis else index // columns]

    for found in elementwise.scaled(pair, where):
        parameters = {"axis": axis, "rows": len(hit), "ranges": sparse.ranges(hit)} | found.parameters
        yield Found("scaled-rows", parameters, found.explained, found.evidence)


def rescaled(pair: Pair) -> Iterator[Found]:
    """A factor of its own for each row or column."""
    if len(pair.b.shape) != 2 or pair.a.shape != pair.b.shape:
        return
    if not (pair.original.dtype.is_float and pair.suspect.dtype.is_float) or pair.differing < pair.size // 4:
        return
    for axis, count in enumerate(pair.shape):
        if pair.shape[1 - axis] < _ENOUGH or count < 2:
            continue
        some = np.unique(np.linspace(0, count - 1, _PROBED).astype(int))
        _, fits = _factors(pair, axis, some)
        if np.count_nonzero(fits) < 0.8 * len(some):
            continue
        factors, fits = _factors(pair, axis, np.arange(count))
        if np.count_nonzero(fits) < ACCEPTED * count:
            continue
        explained = pair.explained(_times(pair, axis, factors), pair.shape[1])
        if explained:
            low, high = np.quantile(np.abs(factors), (0.05, 0.95))
            kind = "column" if axis else "row"
            evidence = f"a factor for each {kind}, most of them between {low:.3g} and {high:.3g}, gives these values"
            yield Found("rescaled-channels", {"axis": axis}, explained, evidence, factors=factors)
            return


def _factors(pair: Pair, axis: int, lines: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the factor of each of some lines, and whether one takes every element into its rounding interval."""
    rows, columns = pair.shape
    found, fits = np.ones(len(lines)), np.zeros(len(lines), bool)
    step = max(1, (1 << 19) // (rows if axis else columns))
    for begin in range(0, len(lines), step):
        part = lines[begin : begin + step]
        before, after = (
            pairs.values_of(np.ascontiguousarray(_lines(bits, pair.shape, axis, part)), name).astype("<f8")
            for bits, name in ((pair.original.bits, pair.original.dtype.name), (pair.y, pair.type))
        )
        reach = pairs.half_ulp(after, pair.type) * 1.01
        told = np.isfinite(before) & np.isfinite(after) & (before != 0)
        divisor = np.where(told, before, 1)
        ends = (after - reach) / divisor, (after + reach) / divisor
        low = np.where(told, np.minimum(*ends), -np.inf).max(1)
        high = np.where(told, np.maximum(*ends), np.inf).min(1)
        zeros = np.where(before == 0, np.abs(after), 0).max(1) == 0
        found[begin : begin + step] = np.where(np.isfinite(low), (low + high) / 2, 1)
        fits[begin : begin + step] = (low <= high) & zeros
    return found, fits


def _lines(bits: Bits, shape: tuple[int, int], axis: int, lines: np.ndarray) -> Bits:
    matrix = bits.reshape(shape)
    return matrix[:, lines].T if axis else matrix[lines]


def _times(pair: Pair, axis: int, factors: np.ndarray) -> pairs.Predict:
    columns = pair.shape[1]

    def predict(select: Select) -> Bits:
        index = np.arange(select.start, select.stop) if isinstance(select, slice) else select
        values = pairs.values_of(pair.original.bits[select], pair.original.dtype.name).astype("<f8")
        return pairs.bits_of(values * factors[index % columns if axis else index // columns], pair.type)

    return predict
