"""What may happen to some heads, channels, pairs or positions of any stage: scaled, zero, exchanged with others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from apr_jax.parity import round_numbers
from apr_jax.parity.faults.record import Fault, Instead, Mistakes, Region
from apr_jax.parity.question import Question
from apr_jax.parity.replay import FORMULAS, At, Value

_ZERO = 1e-6
"""Relative to the right values; what is less is none of them."""
_MOST_COMPARED = 64
"""Positions by which heads and channels are told from each other."""


def _taken(value: Value, at: At, those: tuple[int, ...], places: tuple[int, ...], width: int, first: int) -> Value:
    """Heads (of stages of pairs [B, N, T, S] too) or channels [..., C] in the places of others.

    Args:
      value: The right values.
      at: The place.
      those: Which heads or channels stand there.
      places: The places, in the same order.
      width: Channels of each.
      first: What both are counted from.
    """
    moved = value.copy()
    if value.ndim == 4:
        moved[:, list(places)] = value[:, list(those)]
        return moved
    (to, of) = ((np.array(index)[:, None] + first) * width + np.arange(width) for index in (places, those))
    moved[..., to.ravel()] = value[..., of.ravel()]
    return moved


def scaled(question: Question, region: Region) -> Iterator[Mistakes]:
    """The factor between theirs and the right values in a region, least squares."""
    ours, theirs = _inside(question, region)
    power = float((ours * ours).sum())
    if not power:
        return
    factor = float((ours * theirs).sum()) / power
    if abs(factor) < _ZERO and float(np.abs(theirs).max(initial=0.0)) <= _ZERO * power**0.5:
        yield (ZEROED.made(),)
        return
    # To the digits that the values tell: what they leave is its error.
    doubt = 3 * float(np.linalg.norm(theirs - factor * ours)) / (power * ours.size) ** 0.5
    near = [float(np.copysign(value, factor)) for value in round_numbers.near(abs(factor))] if factor else []
    yield from ((SCALED.made(factor=value),) for value in near if abs(value - factor) <= doubt)


def factor_of(question: Question) -> float:
    """Returns the factor between theirs and the right values of a whole stage, least squares; 0 where there is none."""
    counted, values = question.counted(), (question.value(()), question.their_rows())
    ours, theirs = (np.where(counted, each, 0.0) for each in values)
    power = float((ours * ours).sum())
    return float((ours * theirs).sum()) / power if power else 0.0


def _whole(question: Question) -> Iterator[Mistakes]:
    if question.only:
        return
    factor = factor_of(question)
    near = round_numbers.near(abs(factor)) if abs(factor) > _ZERO else []
    yield from ((STAGE_SCALED.made(factor=float(np.copysign(value, factor))),) for value in near)


def exchanged(question: Question, region: Region) -> Iterator[Mistakes]:
    """Heads or channels in a region that hold the right values of others."""
    if region.kind not in ("heads", "channels") or len(region.indices) < 1:
        return
    per_pair, width = question.theirs.ndim == 4, 1
    if region.kind == "heads" and not per_pair:
        width = question.replay.config.head_dim
    ours, theirs = (_blocks(question, values, width) for values in (question.right, question.theirs))
    first = region.start // width
    candidates = np.arange(first, first + region.of) if region.kind == "heads" else np.arange(len(ours))
    if region.kind == "channels" and len(region.indices) > _MOST_COMPARED:
        return
    length = np.linalg.norm(ours[candidates], axis=1)
    those = []
    for index in region.indices:
        likeness = ours[candidates] @ theirs[first + index] / np.where(length > 0, length, 1)
        those.append(int(np.argmax(likeness)))
    if tuple(those) != region.indices:
        yield (EXCHANGED.made(those=tuple(those), places=region.indices, width=width, first=first),)


def _blocks(question: Question, values: np.ndarray, width: int) -> Value:
    """A row for each head or channel, of some of their positions."""
    few = np.argwhere(question.tokens)
    few = few[np.unique(np.linspace(0, len(few) - 1, _MOST_COMPARED).astype(int))]
    if values.ndim == 4:
        shown = np.where(question.replay.visible(question.layer)[:, None], values, 0.0)
        return np.ascontiguousarray(shown[few[:, 0], :, few[:, 1]].swapaxes(0, 1)).reshape(values.shape[1], -1)
    rows = np.asarray(values[few[:, 0], few[:, 1]], np.float64)
    return np.ascontiguousarray(rows.reshape(len(rows), -1, width).swapaxes(0, 1)).reshape(-1, len(rows) * width)


def _inside(question: Question, region: Region) -> tuple[Value, Value]:
    """The right values and theirs that are in a region and count, flat."""
    right, theirs = question.right, question.theirs
    chosen = region.chosen(right, np.arange(right.shape[2 if right.ndim == 4 else 1]), question.replay.config.head_dim)
    counted = (
        question.replay.visible(question.layer)[:, None] & question.tokens[:, None, :, None]
        if right.ndim == 4
        else None
    )
    chosen = np.broadcast_to(chosen, right.shape) & (question.tokens[..., None] if counted is None else counted)
    return right[chosen], np.asarray(theirs[chosen], np.float64)


def _none(question: Question, node: Any) -> Iterator[dict[str, Any]]:
    """Nothing is tried unless a part of the stage was found to be wrong."""
    yield from ()


_EVERY = tuple(FORMULAS)
SCALED = Fault(
    "part-scaled",
    "{where} scaled by {factor:.6g}",
    _EVERY,
    {"result": lambda value, at, factor: factor * value},
    variants=_none,
    formula=Instead("{factor:.6g} · y", "y"),
)
ZEROED = Fault(
    "part-zeroed",
    "{where} {be} zero",
    _EVERY,
    {"result": lambda value, at: np.zeros_like(value)},
    variants=_none,
    formula=Instead("0", "y"),
)
EXCHANGED = Fault(
    "part-exchanged",
    "{where} {be} exchanged: there stand {those}",
    _EVERY,
    {"result": _taken},
    variants=_none,
    formula=Instead("y of {those}", "y"),
)
_NAMED_APART = ("attn_scores", "logits")
"""What a factor of the whole stage has its own name at."""
STAGE_SCALED = Fault(
    "stage-scaled",
    "all values are {factor:.6g} times the right ones",
    tuple(stage for stage in FORMULAS if stage not in _NAMED_APART),
    {"result": lambda value, at, factor: factor * value},
    solve=_whole,
    variants=_none,
    alone=True,
    formula="{factor:.6g} times: {right}",
)
FAULTS = (SCALED, ZEROED, EXCHANGED, STAGE_SCALED)
