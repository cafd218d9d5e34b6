"""Finds causes that leave most elements alone or wipe them out: zeros, cut tails, NaN and infinities, flipped bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from apr_jax.converters.verify.diagnosis import pair as pairs
from apr_jax.converters.verify.diagnosis.causes import Found
from apr_jax.converters.verify.diagnosis.pair import Pair

_LISTED = 8


def zeros(pair: Pair) -> Iterator[Found]:
    """All zero, a zero tail, zero rows or columns, zeros elsewhere."""
    # Zeros of either sign: a factor of 0 leaves the signs.
    sample = pair.y[pair.sample] & _magnitude(pair)
    # The cut of a tail may fall inside an element.
    if not sample.size or np.count_nonzero(sample) > 1:
        return
    if not np.any(pair.x[pair.sample] & _magnitude(pair)):
        changed = _scan(pair, lambda part: pair.differs[part] & ((pair.x | pair.y)[part] & _magnitude(pair) != 0))
        if not changed.any():
            yield Found("zero-signs", {"elements": pair.differing}, 1.0, "only the signs of zeros differ", 0.0)
            return
    y = pair.y & _magnitude(pair)
    lost = np.flatnonzero(_scan(pair, lambda part: pair.differs[part] & (y[part] != 0)))
    if lost.size > 1:
        return
    end = _nonzero_end(y)
    if not lost.size and not end:
        yield Found("zeroed", {"elements": "all"}, 1.0, "every element is zero")
        return
    tail = list(_tail(pair, lost, end))
    yield from tail
    if not lost.size:
        yield from (found for found in _lines(pair, y) if not tail or found.cause != "zeroed")


def _scan(pair: Pair, test: Any) -> np.ndarray:
    return np.concatenate([test(part) for part in pair.chunks(pair.size, 1)])


def _nonzero_end(bits: np.ndarray) -> int:
    """Returns the index after the last element that is not zero."""
    step = 1 << 20
    for stop in range(bits.size, 0, -step):
        found = np.flatnonzero(bits[max(0, stop - step) : stop])
        if found.size:
            return max(0, stop - step) + int(found[-1]) + 1
    return 0


def _tail(pair: Pair, lost: np.ndarray, end: int) -> Iterator[Found]:
    first = int(np.argmax(pair.differs))
    cut_bytes = 0
    if lost.size:
        if first != lost[0] or end != lost[0] + 1:
            return
        left, right = (bits[first : first + 1].view("u1") for bits in (pair.x, pair.y))
        cut_bytes = int(np.flatnonzero(right)[-1]) + 1
        if not np.array_equal(left[:cut_bytes], right[:cut_bytes]):
            return
    elif first < end:
        return
    # Zeros of the original just before the first difference belong to the tail or not: nobody can say.
    begin = end - 1 if lost.size else end
    width = int(pair.y.itemsize)
    parameters = {"zero_elements": pair.size - begin - bool(cut_bytes)}
    if cut_bytes:
        parameters["zero_bytes"] = (pair.size - begin) * width - cut_bytes
    evidence = f"everything from element {begin} on is zero, everything before is equal"
    yield Found("truncated", parameters, 1.0, evidence)


def _magnitude(pair: Pair) -> Any:
    """Returns the bits of an element that are not its sign."""
    bits = 8 * pair.y.itemsize
    return pair.y.dtype.type((1 << bits) - 1 >> int(pair.suspect.dtype.is_float))


def _lines(pair: Pair, y: np.ndarray) -> Iterator[Found]:
    rows, columns = pair.shape
    differs = pair.differs.reshape(rows, columns)
    rows_hit = np.flatnonzero(differs.any(axis=1))
    matrix = y.reshape(rows, columns)
    if not matrix[rows_hit].any():
        parameters = {"axis": 0, "rows": len(rows_hit), "ranges": ranges(rows_hit)}
        yield Found("zeroed-rows", parameters, 1.0, f"{len(rows_hit)} of {rows} rows are zero")
        return
    columns_hit = np.flatnonzero(differs.any(axis=0))
    if not matrix[:, columns_hit].any():
        parameters = {"axis": 1, "rows": len(columns_hit), "ranges": ranges(columns_hit)}
        yield Found("zeroed-rows", parameters, 1.0, f"{len(columns_hit)} of {columns} columns are zero")
        return
    evidence = f"{pair.differing} elements are zero, the others are equal"
    yield Found("zeroed", {"elements": pair.differing, "first": int(np.argmax(pair.differs))}, 1.0, evidence)


def ranges(indices: np.ndarray) -> list[list[int]]:
    """Returns ascending indices as [first, last] of each run; of many runs the first few."""
    breaks = np.flatnonzero(np.diff(indices) != 1)
    first = indices[np.concatenate(([0], breaks + 1))]
    last = indices[np.concatenate((breaks, [len(indices) - 1]))]
    return [[int(low), int(high)] for low, high in zip(first[:_LISTED], last[:_LISTED], strict=True)]


def non_finite(pair: Pair) -> Iterator[Found]:
    """NaN or infinities where the original has numbers."""
    if not pair.suspect.dtype.is_float:
        return

    def finite(bits: np.ndarray) -> np.ndarray:
        return np.isfinite(pairs.values_of(bits, pair.type))

    select = pair.sample
    if np.count_nonzero(finite(pair.y[select])) > (1 - pairs.ACCEPTED) * select.size:
        return
    nan = positive = negative = 0
    first = -1
    for part in pair.chunks(pair.size, 1):
        values = pairs.values_of(pair.y[part], pair.type)
        broken = pair.differs[part] & ~np.isfinite(values) & finite(pair.x[part])
        if first < 0 and broken.any():
            first = part.start + int(np.argmax(broken))
        values = values[broken]
        nan += int(np.count_nonzero(np.isnan(values)))
        positive += int(np.count_nonzero(values == np.inf))
        negative += int(np.count_nonzero(values == -np.inf))
    explained = (nan + positive + negative) / pair.differing
    if explained < pairs.ACCEPTED:
        return
    counts = {"nan": nan, "inf": positive, "-inf": negative}
    parameters = {name: count for name, count in counts.items() if count}
    evidence = f"{nan} NaN, {positive} inf and {negative} -inf in place of numbers, the first at {where(pair, first)}"
    yield Found("non-finite", parameters | {"first": where(pair, first)}, explained, evidence)


def where(pair: Pair, index: int) -> list[int]:
    """Returns a flat index as the suspect's coordinates, or as the number of a byte."""
    if pair.as_bytes:
        return [index]
    return [int(axis) for axis in np.unravel_index(index, pair.b.shape or (1,))]


def bit_flips(pair: Pair) -> Iterator[Found]:
    """One bit flipped in each differing element."""
    if pair.original.decoded or pair.suspect.decoded:
        return
    changed = pair.x[pair.sample] ^ pair.y[pair.sample]
    if not changed.size or np.count_nonzero(np.bitwise_count(changed) == 1) < pairs.ACCEPTED * changed.size:
        return
    width = pair.y.itemsize * 8
    counts = np.zeros(width, np.int64)
    single = 0
    for part in pair.chunks(pair.size, 1):
        if not pair.differs[part].any():
            continue
        changed = (pair.x[part] ^ pair.y[part])[pair.differs[part]]
        changed = changed[np.bitwise_count(changed) == 1]
        single += changed.size
        for bit in range(width):
            counts[bit] += int(np.count_nonzero(changed == changed.dtype.type(1 << bit)))
    explained = single / pair.differing
    bits = [int(bit) for bit in np.flatnonzero(counts)]
    # Noise in the last places can look like flips of several bits, but not in nearly every element.
    if explained < pairs.ACCEPTED or (len(bits) > 1 and pair.differing > max(8, pair.size // 8)):
        return
    parameters: dict[str, Any] = {"bits": bits, "flips": single}
    if single <= _LISTED:
        parameters["at"] = [where(pair, int(index)) for index in np.sort(pair.sample)]
    names = ", ".join(f"bit {bit} ({counts[bit]} times)" for bit in bits)
    yield Found("bit-flips", parameters, explained, f"one bit flipped in each of {single} elements: {names}")
