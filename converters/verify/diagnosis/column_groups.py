"""Finds columns that share a scale in every row though they are no neighbours, as GPTQ's act-order leaves them.

In one row, the values of a group are whole multiples of its scale. An anchor tells the scales that there may be: its
own value is one of few multiples. The right one makes whole numbers of all other members, where chance makes some of
those of few columns only; so rows are looked at until it is plain who belongs to whom.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Floats = np.ndarray[Any, np.dtype[np.float64]]
# (rows, columns) -> values and how far each may have been rounded, both [rows, columns].
Read = Callable[[np.ndarray, np.ndarray], tuple[Floats, Floats]]

# The most steps that a value is from zero, with 8 bits and a zero point at one end.
_STEPS = 255
# Steps that an anchor may be from zero, and of which columns the others are: of few, all can be asked.
_TRIED = ((15, 1), (_STEPS, 4))
# Columns and rows by which an anchor's scales are found, and how many rows show whether there is anything to find.
_COLUMNS, _ROWS, _PROBED = 1024, 24, 3
# How much of a row a group is thought to be, before anything is known.
_PART = 0.04
# Logarithms: how much likelier than chance a scale makes a row, rows make a member; what one row counts that speaks
# against it.
_PLAIN, _MEMBER, _MISS = 6.0, 12.0, 4.0
# How much better a scale is known by all members than by one; in a row of the right scale, most members agree.
_REFINED, _AGREED = 2.0, 0.9
# Columns that may or may not be members, in members.
_UNDECIDED = 0.1
# Groups to find, and what is too small for one; anchors that are tried, and how many where none has told anything.
_GROUPS, _SMALLEST = 3, 12
_ATTEMPTS, _WITHOUT = 6, 2


def column_groups(shape: tuple[int, int], read: Read) -> list[np.ndarray]:
    """Returns the columns of some groups, the surest of each first; nothing where no columns share scales."""
    rows, columns = shape
    if columns < 2 * _SMALLEST or rows < _PROBED:
        return []
    found: list[np.ndarray] = []
    left = np.arange(columns)
    # Some anchors say too little.
    for attempt in range(_ATTEMPTS):
        if len(left) < _SMALLEST or len(found) == _GROUPS or (attempt == _WITHOUT and not found):
            break
        anchor, members = _members(rows, left, read)
        if len(members) >= _SMALLEST:
            found.append(members)
        left = np.setdiff1d(left, [anchor, *members])
    return found


def _members(rows: int, columns: np.ndarray, read: Read) -> tuple[int, np.ndarray]:
    """Returns one of the columns, and which share its scales, the surest first; none if it does not tell."""
    some = columns[np.unique(np.linspace(0, len(columns) - 1, min(len(columns), _COLUMNS)).astype(int))]
    lines = np.unique(np.linspace(0, rows - 1, min(rows, 4 * _ROWS)).astype(int))
    values, error = read(lines, some)
    # The anchor is seldom zero.
    anchor = int(np.count_nonzero(np.abs(values) > error, 0).argmax())
    place = int(some[anchor])
    usable = np.flatnonzero(np.abs(values[:, anchor]) > 4 * error[:, anchor])[:_ROWS]
    steps, plain = np.zeros(len(usable)), np.zeros(len(usable))
    for at, line in enumerate(usable):
        if at == _PROBED and plain.sum() < _PROBED * _PLAIN:
            return place, columns[:0]
        steps[at], plain[at] = _scale(values[line], error[line], anchor)
    kept = plain >= _PLAIN
    if np.count_nonzero(kept) < _PROBED:
        return place, columns[:0]
    values, error = read(lines[usable[kept]], columns)
    own = int(np.searchsorted(columns, place))
    hit, share, zero = _told(values, error, steps[kept], error[:, own] / np.abs(values[:, own]) / _REFINED)
    gain = np.where(zero, 0, np.where(hit, -np.log(share), -_MISS))
    # Of some rows the wrong scale was taken: those that most of the likeliest members miss.
    members = np.argsort(-gain.sum(0), kind="stable")[:_SMALLEST]
    right = hit[:, members].mean(1) >= _AGREED
    gains = gain[right].sum(0)
    gains[own] = np.inf
    undecided = np.count_nonzero((gains > 0) & (gains < _MEMBER))
    found = columns[np.argsort(-gains, kind="stable")[: np.count_nonzero(gains >= _MEMBER)]]
    return place, found if undecided <= _UNDECIDED * len(found) else columns[:0]


def _scale(row: Floats, error: Floats, anchor: int) -> tuple[float, float]:
    """Returns the likeliest scale of the anchor's group in a row, and by how much it is likelier than chance."""
    best = 0.0, -np.inf
    for most, every in _TRIED:
        steps = np.abs(row[anchor]) / np.arange(1, most + 1)
        known = np.full(most, error[anchor] / np.abs(row[anchor]))
        some, its = row[::every], error[::every]
        hit, share, zero = _told(np.broadcast_to(some, (most, len(some))), its, steps, known)
        gain = np.where(hit, np.log(1 - _PART + _PART / share), np.log(1 - _PART))
        gain[zero | (some == row[anchor])] = 0
        gains = gain.sum(1)
        at = int(gains.argmax())
        # All that it fits say more of it than the anchor alone.
        levels = np.rint(np.abs(some) / steps[at]) * hit[at]
        best = max(
            best, (float((np.abs(some) * levels).sum() / (levels**2).sum()), float(gains[at])), key=lambda b: b[1]
        )
        if best[1] >= _PLAIN:
            break
    return best


def _told(values: Floats, error: Floats, steps: Floats, known: Floats) -> tuple[np.ndarray, Floats, np.ndarray]:
    """Holds rows against a scale each.

    Args:
      values, error: [rows, columns]
      steps, known: [rows]: the scales, and how far they may be off, relatively.

    Returns:
      Where a whole number of steps gives the value, within what is not known of both; in what share of all values
      that would be so by chance; where it is none, which says nothing. All [rows, columns].
    """
    units = np.abs(values) / steps[:, None]
    levels = np.rint(units)
    reach = error / steps[:, None] + units * known[:, None]
    hit = (np.abs(units - levels) <= reach) & (levels <= _STEPS)
    return hit, np.clip(2 * reach, 1e-9, 1), (levels == 0) & hit
