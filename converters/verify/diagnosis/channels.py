"""Finds rows and columns that were treated by themselves: a few scaled ones, or each by a factor of its own, or both.

A factor for each channel is what moves a norm's weights, or smoothing scales (SmoothQuant, AWQ), into the next
matrices. Whether the model still computes the same, `story` says, which sees both sides.
"""

from __future__ import annotations

import dataclasses
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
# Rows and columns of the part that shows whether factors on both sides are worth looking at the whole matrix.
_PART = 64
# Elements that are fitted at once; the columns' factors need no more to be known.
_FITTED = 1 << 20
# Sweeps over rows and columns: with every element told, two are enough.
_SWEEPS = 6
# Both factors rounded to the stored type, one after the other, take an element so many half steps away.
_WITHIN = 2.5
# Factors of a side are such if they vary by so many half steps.
_VARY = 8.0


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
            yield Found("rescaled-channels", {"axis": axis}, explained, evidence, factors={axis: factors})
            return
    yield from _rescaled_both(pair)


def _rescaled_both(pair: Pair) -> Iterator[Found]:
    """A factor for each row and one for each column: b = row * a * column.

    Only their products are known: the columns' have the geometric mean 1.
    """
    rows, columns = pair.shape
    if min(rows, columns) < _ENOUGH:
        return
    part = _Ratios.of(pair, _spread(rows, _PART), _spread(columns, _PART))
    if part is None or part.explained_by(*part.factors()) < ACCEPTED:
        return
    # Of a matrix that was only moved a little, no factors are nearly all there is.
    step = float(np.median(part.reach[part.told]))
    if min(np.log(np.abs(factors)).std() for factors in part.factors()) < _VARY * step:
        return
    part = _Ratios.of(pair, _spread(rows, max(_PART, _FITTED // columns)), np.arange(columns))
    if part is None:
        return
    _, of_columns = part.factors()
    of_rows, explained = np.empty(rows), 0.0
    step = max(1, _FITTED // columns)
    for begin in range(0, rows, step):
        lines = np.arange(begin, min(begin + step, rows))
        part = _Ratios.of(pair, lines, np.arange(columns))
        if part is None:
            return
        of_rows[lines] = part.rows_beside(of_columns)
        explained += part.explained_by(of_rows[lines], of_columns) * len(lines) / rows
    if explained < ACCEPTED:
        return
    (low, high), (least, most) = (np.quantile(np.abs(f), (0.05, 0.95)) for f in (of_rows, of_columns))
    evidence = (
        f"a factor for each row, most of them between {low:.3g} and {high:.3g}, times one for each column, between "
        f"{least:.3g} and {most:.3g}, gives these values"
    )
    yield Found("rescaled-channels", {"axis": "both"}, explained, evidence, factors={0: of_rows, 1: of_columns})


def _spread(count: int, most: int) -> np.ndarray:
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(int))


@dataclasses.dataclass(frozen=True)
class _Ratios:
    """What a part of a matrix was multiplied by, element by element, all [rows, columns].

    Attributes:
      told: Where both sides have a finite number other than zero.
      logs, signs: Of the ratios; 0 where they are not told.
      reach: Half a step of the suspect's type, relative to the element.
      equal: Where nothing is told, and both are the same.
    """

    told: np.ndarray
    logs: np.ndarray
    signs: np.ndarray
    reach: np.ndarray
    equal: np.ndarray

    @classmethod
    def of(cls, pair: Pair, rows: np.ndarray, columns: np.ndarray) -> _Ratios | None:
        """Takes these rows and columns; None where too few ratios are told."""
        index = rows[:, None] * pair.shape[1] + columns
        before, after = (
            pairs.values_of(bits[index], name).astype("<f8")
            for bits, name in ((pair.original.bits, pair.original.dtype.name), (pair.y, pair.type))
        )
        told = np.isfinite(before) & np.isfinite(after) & (before != 0) & (after != 0)
        equal = ~told & (before == after)
        if np.count_nonzero(told | equal) < ACCEPTED * told.size or not told.any():
            return None
        after = np.where(told, after, 1)
        ratio = after / np.where(told, before, 1)
        reach = np.where(told, pairs.half_ulp(after, pair.type) / np.abs(after), 0)
        return cls(told, np.where(told, np.log(np.abs(ratio)), 0), np.where(told, np.sign(ratio), 0), reach, equal)

    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns factors of rows and columns whose products are these ratios, by least squares of the logarithms."""
        of_columns = np.zeros(self.logs.shape[1])
        for _ in range(_SWEEPS):
            of_rows = self._means(self.logs - of_columns, 1)
            of_columns = self._means(self.logs - of_rows[:, None], 0)
        middle = of_columns.mean()
        signs = _signs(self.signs)
        return signs[0] * np.exp(of_rows + middle), signs[1] * np.exp(of_columns - middle)

    def rows_beside(self, of_columns: np.ndarray) -> np.ndarray:
        """Returns the factors of the rows, where those of the columns are known."""
        signs = np.where((self.signs * np.sign(of_columns)).sum(1) < 0, -1.0, 1.0)
        return signs * np.exp(self._means(self.logs - np.log(np.abs(of_columns)), 1))

    def _means(self, values: np.ndarray, axis: int) -> np.ndarray:
        return np.where(self.told, values, 0).sum(axis) / np.maximum(self.told.sum(axis), 1)

    def explained_by(self, of_rows: np.ndarray, of_columns: np.ndarray) -> float:
        """Returns the share of the elements that the factors take to within rounding."""
        logs = np.log(np.abs(of_rows))[:, None] + np.log(np.abs(of_columns))
        near = np.abs(self.logs - logs) <= _WITHIN * self.reach
        fits = near & (self.signs == np.sign(of_rows)[:, None] * np.sign(of_columns))
        return float(np.count_nonzero(np.where(self.told, fits, self.equal))) / self.told.size


def _signs(signs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns a sign for each row and each column whose products are those of the elements, where there are such."""
    first = signs[:, np.abs(signs).sum(0).argmax()]
    of_columns = np.where(first @ signs < 0, -1.0, 1.0)
    return np.where(signs @ of_columns < 0, -1.0, 1.0), of_columns


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
