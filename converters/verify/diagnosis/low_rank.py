"""Finds changes of low rank: adapters (LoRA) merged into the weights, a direction taken out of them.

The difference of two matrices is such a change plus what rounding to the stored type made of it; the singular values
of rounding alone are known, and those above them count.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from apr_jax.converters.verify.diagnosis import pair as pairs
from apr_jax.converters.verify.diagnosis.causes import Found
from apr_jax.converters.verify.diagnosis.pair import Pair

# A part of the matrix shows whether the rest is worth its time; larger ones are for the ranks that it cannot tell.
_PROBES = (96, 384)
_LARGE = 1 << 23
_OVERSAMPLED = 10
# A singular value is a change's, and not rounding's, from so many times the largest one that rounding makes.
_ABOVE = 1.5
# More of the singular values of a part than this, and nothing shows that there is an end to them.
_MOST = 0.8
# The last singular value of a change over the first of rounding; of noise they go down evenly.
_GAP = 1.3
# Singular values from eigenvalues are known to so much of the largest one.
_EIGENVALUES = 3e-8
# Energy beyond the rank, in that of rounding.
_LEFT_OVER = 2.0
# Roundings that an element may be away from the change of low rank.
_WITHIN = 2.5


def low_rank(pair: Pair) -> Iterator[Found]:
    """A change of low rank, rounded to the suspect's type."""
    if len(pair.b.shape) != 2 or pair.a.shape != pair.b.shape or min(pair.shape) < 8:
        return
    if not (pair.original.dtype.is_float and pair.suspect.dtype.is_float) or pair.differing < pair.size // 50:
        return
    rank = None
    for probe in _PROBES[: 1 + (pair.size >= _LARGE)]:
        rank = _probed(pair, probe)
        if rank is not None:
            break
    if rank is None:
        return
    yield from _whole(pair, rank)


def _probed(pair: Pair, size: int) -> int | None:
    # Longer one way: of a square of noise the smallest singular values are next to nothing, too.
    sizes = (size, 3 * size) if pair.shape[0] <= pair.shape[1] else (3 * size, size)
    rows, columns = (
        np.unique(np.linspace(0, length - 1, min(most, length)).astype(int))
        for length, most in zip(pair.shape, sizes, strict=True)
    )
    index = rows[:, None] * pair.shape[1] + columns
    change, error = _change(pair, index)
    return _rank(change, error)


def _change(pair: Pair, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the difference at flat indices, and how far rounding may have moved it."""
    before = pairs.values_of(pair.original.bits[index], pair.original.dtype.name).astype("<f8")
    after = pairs.values_of(pair.y[index], pair.type).astype("<f8")
    # NaN and infinities change nothing here, and are known to within nothing.
    finite = np.isfinite(after - before)
    after = np.where(finite, after, 0)
    error = np.maximum(pairs.half_ulp(after, pair.type), np.abs(after) * 2.0**-23)
    return np.where(finite, after - before, 0), error


def _levelled(error: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns factors of rows and columns that make rounding the same everywhere; they leave the rank as it is."""
    rows = 1 / np.sqrt((error**2).mean(1, keepdims=True))
    return rows, 1 / np.sqrt(((error * rows) ** 2).mean(0, keepdims=True))


def _rank(change: np.ndarray, error: np.ndarray) -> int | None:
    """Returns how many singular values are above rounding; None if there are none, or nearly all are."""
    rows, columns = _levelled(error)
    level = change * rows * columns
    # Eigenvalues of the smaller product: a tenth of the time of singular values, several threads at once.
    product = level @ level.T if len(level) <= level.shape[1] else level.T @ level
    if not np.isfinite(product).all():
        return None
    values = np.sqrt(np.maximum(np.linalg.eigvalsh(product)[::-1], 0))
    noise = _largest_of_rounding(error * rows * columns)
    rank = int(np.count_nonzero(values > max(_ABOVE * noise, _EIGENVALUES * values[0])))
    if not rank or rank > _MOST * len(values) or values[rank - 1] < _GAP * values[rank]:
        return None
    left, rounding = float((values[rank:] ** 2).sum()), float(((error * rows * columns) ** 2).sum()) / 3
    return rank if left <= _LEFT_OVER * rounding + len(values) * (_EIGENVALUES * values[0]) ** 2 else None


def _largest_of_rounding(error: np.ndarray) -> float:
    """Returns the largest singular value of rounding errors: that of independent numbers of this size."""
    return float(np.sqrt((error**2).mean() / 3)) * (np.sqrt(error.shape[0]) + np.sqrt(error.shape[1]))


def _whole(pair: Pair, probed: int) -> Iterator[Found]:
    """Projects the whole change on few directions, and looks at what they leave."""
    rows, columns = pair.shape
    change, error = _change(pair, np.arange(pair.size).reshape(rows, columns))
    down, across = _levelled(error)
    level = change * down * across
    random = np.random.default_rng(0).standard_normal((columns, min(columns, rows, probed + _OVERSAMPLED)))
    basis, _ = np.linalg.qr(level @ random)
    basis, _ = np.linalg.qr(level @ (level.T @ basis))
    left, values, right = np.linalg.svd(basis.T @ level, full_matrices=False)
    noise = _largest_of_rounding(error * down * across)
    rank = int(np.count_nonzero(values > _ABOVE * noise))
    if not rank or rank > min(rows, columns) // 2:
        return
    one, two = basis @ left[:, :rank] * values[:rank] / down, right[:rank] / across
    # The directions have a little of the rounding of all elements in them.
    taken = noise / (np.sqrt(rows) + np.sqrt(columns)) * np.sqrt(rank * (1 / rows + 1 / columns))
    rest = np.abs(change - one @ two) * down * across
    explained = float(np.mean(rest <= _WITHIN * (error * down * across + taken)))
    if explained < pairs.ACCEPTED:
        return
    basis, upper = np.linalg.qr(one)
    left, values, _ = np.linalg.svd(upper @ two, full_matrices=False)
    parameters: dict[str, Any] = {"rank": rank}
    if rank == 1 and _removed(pair, basis @ left[:, 0]):
        parameters["removes"] = "one direction of the output"
    shown = ", ".join(f"{value:.3g}" for value in values[: min(rank, 4)])
    more = ", ..." if rank > 4 else ""
    rounding = float(np.sqrt((error**2).mean() / 3)) * (np.sqrt(rows) + np.sqrt(columns))
    counted = f"singular value{'s' if rank > 1 else ''} of the change"
    evidence = f"{rank} {counted}, {shown}{more}; rounding makes none above {rounding:.2g}"
    yield Found("low-rank", parameters, explained, evidence)


def _removed(pair: Pair, direction: np.ndarray) -> bool:
    """Whether the suspect gives nothing in a direction of the output in which the original gave something."""
    shape = pair.shape
    before, after = (
        pairs.values_of(bits, name).reshape(shape)
        for bits, name in ((pair.original.bits, pair.original.dtype.name), (pair.y, pair.type))
    )
    lengths = [float(np.linalg.norm(direction @ matrix)) for matrix in (before, after)]
    return lengths[1] < 0.05 * lengths[0]
