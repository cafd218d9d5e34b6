"""Grids: the few values that a group of elements can take behind a quantised type, and the search for a group's scale.

A grid is a list of levels; a group's values are scale * level, or scale * level + minimum. Scale and minimum are
solved from the suspect's own values, so that it does not matter how somebody's quantiser chose them or what it rounded
to what (GPTQ and AWQ do not take the nearest level of the original). A group lies on a grid only if one scale brings
every level into the interval that rounds to the value found there.

With fine steps and few bits anything lies on any grid: `Solved.chance` says how likely it was for other values.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import ml_dtypes
import numpy as np

from apr_jax.converters.formats import codebooks
from apr_jax.converters.verify.diagnosis import pair as pairs

Floats = np.ndarray[Any, np.dtype[np.float64]]

# Elements of each group that a candidate for its scale is tried on: first a few, at last all.
_STAGES = (6, 24, 96)
_CANDIDATES_AT_ONCE = 1 << 17


@dataclasses.dataclass(frozen=True)
class Grid:
    """The values that one group can have, in units of its scale.

    Attributes:
      levels: Ascending.
      span: The most steps between the lowest and the highest level in use, 0 among them; None: all levels.
      affine: Whether each group has a minimum of its own that is no multiple of its scale.
      either_sign: Whether scales are negative as well.
    """

    levels: tuple[float, ...]
    span: int | None = None
    affine: bool = False
    either_sign: bool = False

    @functools.cached_property
    def book(self) -> Floats:
        return np.array(self.levels)

    @property
    def values(self) -> int:
        """The most different values that one group can hold."""
        return len(self.levels) if self.span is None else self.span + 1

    @functools.cached_property
    def _middles(self) -> Floats:
        return (self.book[1:] + self.book[:-1]) / 2

    @functools.cached_property
    def _uniform(self) -> bool:
        return bool(np.all(np.diff(self.book) == 1))

    @functools.cached_property
    def gaps(self) -> Floats:
        """The distance of each level to its neighbours, the mean of both."""
        steps = np.diff(self.book)
        return (np.concatenate((steps[:1], steps)) + np.concatenate((steps, steps[-1:]))) / 2

    def nearest(self, values: Floats) -> tuple[Floats, Floats]:
        """Returns the nearest levels and their gaps."""
        if self._uniform:
            return np.clip(np.rint(values), self.book[0], self.book[-1]), np.ones(())
        index = np.searchsorted(self._middles, values)
        return self.book[index], self.gaps[index]

    @functools.cached_property
    def anchors(self) -> Floats:
        """The levels that a group's largest magnitude may stand for, the likelier first.

        Of whole numbers the smallest that does (the coarsest grid), else the largest (a quantiser's choice).
        """
        found = self.book[self.book != 0]
        return found[np.argsort(np.abs(found) if self._uniform else -np.abs(found), kind="stable")]


def integers(low: int, high: int, **arguments: Any) -> Grid:
    """Returns the grid of the whole numbers from `low` to `high`."""
    return Grid(tuple(map(float, range(low, high + 1))), **arguments)


def float8(dtype: Any) -> Grid:
    """Returns the grid of the finite values of an 8-bit floating-point type."""
    with np.errstate(all="ignore"):
        values = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float64)
    return Grid(tuple(np.unique(values[np.isfinite(values)]).tolist()))


FP8_E4M3 = float8(ml_dtypes.float8_e4m3fn)
FP8_E5M2 = float8(ml_dtypes.float8_e5m2)
# OCP Microscaling Formats 1.0, E2M1.
E2M1 = Grid((-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6))
# bitsandbytes, functional.py (create_fp4_map with its 4-bit table), in twelfths of the largest magnitude.
FP4 = Grid((-12, -8, -6, -4, -3, -2, -0.0625, 0, 0.0625, 2, 3, 4, 6, 8, 12))
NF4 = Grid(codebooks.NF4)
IQ4_NL = Grid(codebooks.IQ4_NL, either_sign=True)


@dataclasses.dataclass(frozen=True)
class Solved:
    """Groups held against a grid, one entry for each group.

    Attributes:
      fits: Whether one scale (and minimum) reproduces every value.
      told: Whether that says something: a group of zeros, or of one value, lies on every grid.
      scale, minimum: What reproduces them.
      reach: How far the scale may be from that.
      highest: The largest magnitude of a level in use.
      chance: Natural logarithm of how likely as many other values would have fitted.
    """

    fits: np.ndarray
    told: np.ndarray
    scale: Floats
    minimum: Floats
    reach: Floats
    highest: Floats
    chance: Floats

    def steps(self, values: Floats, grid: Grid) -> Floats:
        """Returns how far apart the neighbouring levels are at the values of these groups."""
        scale = self.scale[:, None]
        return np.abs(scale) * grid.nearest((values - self.minimum[:, None]) / scale)[1]


def solve(values: Floats, error: Floats, grid: Grid) -> Solved:
    """Looks for the scale of each group.

    Args:
      values: [groups, elements].
      error: [groups, elements] How far each may lie from what the grid gives.
      grid: The grid.
    """
    count = len(values)
    order, new, counts = _distinct(values, grid.values + 1)
    different = np.take_along_axis(values, order, 1)
    scale, minimum, reach, highest, chance = np.zeros((5, count))
    found = Solved(np.zeros(count, bool), counts > 1, scale, minimum, reach, highest, chance)
    if not grid.affine:
        np.logical_or(found.told, different[:, 0] != 0, out=found.told)
    found.fits[:] = ~found.told
    # More values than levels, and no scale will do.
    rows = np.flatnonzero(found.told & (counts <= grid.values))
    most = int(counts[rows].max(initial=1))
    error = np.take_along_axis(error[rows], order[rows, :most], 1)
    _solve(found, rows, different[rows, :most], error, new[rows, :most], grid)
    return found


def _distinct(values: Floats, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns where the different values of each group are, then others; which are which; how many there are."""
    order = np.argsort(values, 1)
    ordered = np.take_along_axis(values, order, 1)
    new = np.ones(ordered.shape, bool)
    np.not_equal(ordered[:, 1:], ordered[:, :-1], out=new[:, 1:])
    counts = np.count_nonzero(new, 1)
    width = min(most, int(counts.max(initial=1)))
    first = np.argsort(~new, 1, kind="stable")[:, :width]
    return np.take_along_axis(order, first, 1), np.take_along_axis(new, first, 1), counts


def _solve(found: Solved, rows: np.ndarray, values: Floats, error: Floats, new: np.ndarray, grid: Grid) -> None:
    count, width = values.shape
    if not count:
        return
    every = np.arange(count)
    if grid.affine:
        low, high = values.argmin(1), values.argmax(1)
        start, start_error = values[every, low], error[every, low]
        anchor, anchor_error = values[every, high] - start, error[every, high] + start_error
        levels = np.arange(1.0, grid.book[-1] + 1)
    else:
        high = np.abs(values).argmax(1)
        start = start_error = np.zeros(count)
        anchor, anchor_error = values[every, high], error[every, high]
        levels = grid.anchors
    # Every group with every level that its largest value may stand for.
    group, which = (index.reshape(-1) for index in np.indices((count, len(levels))))
    if not grid.either_sign:
        possible = anchor[group] * levels[which] > 0
        group, which = group[possible], which[possible]
    begin = 0
    for end in (*(stage for stage in _STAGES if stage < width), width):
        columns = _order(width)[begin:end]
        level, scale = levels[which], anchor[group] / levels[which]
        offsets = values[group[:, None], columns] - start[group, None]
        nearest, _ = grid.nearest(offsets / scale[:, None])
        slack = error[group[:, None], columns] + start_error[group, None]
        slack += np.abs(nearest) * (anchor_error[group] / np.abs(level))[:, None]
        fits = (np.abs(offsets - nearest * scale[:, None]) <= slack).all(1)
        group, which = group[fits], which[fits]
        begin = end
    _refine(found, rows, (values, error, new), start, anchor[group] / levels[which], group, grid)
    found.chance[rows] = np.minimum(found.chance[rows] + np.log(len(levels)), 0)


@functools.lru_cache
def _order(width: int) -> np.ndarray:
    """Returns in which order the elements of groups are looked at: neighbours are alike."""
    return np.random.default_rng(width).permutation(width)


def _refine(
    found: Solved,
    rows: np.ndarray,
    groups: tuple[Floats, Floats, np.ndarray],
    start: Floats,
    step: Floats,
    group: np.ndarray,
    grid: Grid,
) -> None:
    """Narrows candidates for scales down (`step`, those of each `group` in turn), and keeps the first that fits."""
    at_once = max(1, _CANDIDATES_AT_ONCE // max(1, groups[0].shape[1]))
    for begin in range(0, len(group), at_once):
        chosen = group[begin : begin + at_once]
        values, error, new = (part[chosen] for part in groups)
        good, *numbers = _narrowed(values, error, new, start[chosen], step[begin : begin + at_once], grid)
        good &= ~found.fits[rows[chosen]]
        some, first = np.unique(chosen[good], return_index=True)
        found.fits[rows[some]] = True
        for target, source in zip(
            (found.scale, found.minimum, found.reach, found.highest, found.chance), numbers, strict=True
        ):
            target[rows[some]] = source[good][first]


def _narrowed(
    values: Floats, error: Floats, new: np.ndarray, start: Floats, step: Floats, grid: Grid
) -> tuple[np.ndarray, ...]:
    """Returns of each group whether it fits, its scale and minimum, the scale's reach, highest level and chance."""
    scale, minimum, reach = (_line if grid.affine else _proportion)(values, error, start, step, grid)
    level, gap = grid.nearest((values - minimum[:, None]) / scale[:, None])
    off = np.abs(values - scale[:, None] * level - minimum[:, None])
    # A line is only the best of many; a proportion has been narrowed down to what no value rules out.
    good = np.asarray((off <= (1.6 if grid.affine else 1.0001) * error).all(1))
    if grid.span is not None:
        good &= np.maximum(level.max(1), 0) - np.minimum(level.min(1), 0) <= grid.span
    share = 2 * (error + np.abs(level) * reach[:, None]) / (gap * np.abs(scale)[:, None])
    # What is told twice proves nothing, nor what the scale (and minimum) was taken from.
    logs = np.sort(np.where(new, np.log(np.clip(share, 1e-12, 1)), 0), 1)
    chance = logs[:, (2 if grid.affine else 1) :].sum(1)
    return good, scale, minimum, reach, np.abs(level).max(1), chance


def _proportion(values: Floats, error: Floats, start: Floats, step: Floats, grid: Grid) -> tuple[Floats, ...]:
    """Narrows scales down to those that no value rules out, beginning with values that can be of one level only."""
    del start
    scale, reach = step, np.abs(step) * (error / np.maximum(np.abs(values), 1e-300)).min(1)
    for _ in range(3):
        level, gap = grid.nearest(values / scale[:, None])
        told = (error + np.abs(level) * reach[:, None] < 0.4 * gap * np.abs(scale)[:, None]) & (level != 0)
        ends = (values - error) / np.where(told, level, 1), (values + error) / np.where(told, level, 1)
        low = np.where(told, np.minimum(*ends), -np.inf).max(1)
        high = np.where(told, np.maximum(*ends), np.inf).min(1)
        narrower = np.isfinite(low) & (low <= high)
        scale = np.where(narrower, (low + high) / 2, scale)
        reach = np.where(narrower, (high - low) / 2, reach)
    return scale, np.zeros(len(values)), reach


def _line(values: Floats, error: Floats, start: Floats, step: Floats, grid: Grid) -> tuple[Floats, ...]:
    """Fits scale and minimum by least squares, assigns the levels anew, and fits again."""
    scale, minimum = step, start
    weights = np.square(error.min(1, keepdims=True) / error)
    weights /= weights.sum(1, keepdims=True)
    middle = (weights * values).sum(1, keepdims=True)
    for _ in range(2):
        level, _ = grid.nearest((values - minimum[:, None]) / scale[:, None])
        mean = (weights * level).sum(1, keepdims=True)
        spread = np.maximum((weights * (level - mean) ** 2).sum(1), 1e-300)
        scale = (weights * (level - mean) * (values - middle)).sum(1) / spread
        minimum = (middle - scale[:, None] * mean)[:, 0]
    return scale, minimum, 2 * error.max(1) / np.sqrt(values.shape[1] * spread)


def rounding_error(values: Floats, name: str, *, affine: bool) -> Floats:
    """Returns how far rounding may have taken values [groups, elements] in a type from what a codec computed.

    A codec may compute in half precision before a last rounding to bfloat16, and in float32 with a rounding more; where
    a minimum is added, errors are those of the largest value.
    """
    slack = {"bf16": 1.13, "f16": 1.02}.get(name, 1.02)
    error = slack * pairs.half_ulp(values, name)
    largest = np.abs(values).max(1, keepdims=True)
    error = error + largest * (2.0**-22 if name in ("f32", "f64") else 2.0**-23)
    if affine and name in ("f16", "bf16"):
        return error + pairs.half_ulp(largest, "f16")
    return error
