"""Soft bounds, x = c tanh(r / c), as engines put on scores and logits of some models."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from apr_jax.parity import round_numbers
from apr_jax.parity.faults.record import Fault, Grid, Mistakes
from apr_jax.parity.question import Question
from apr_jax.parity.replay import At, Value

_FORMULA = "{right}, then {cap:.6g} · tanh(y / {cap:.6g})"
_CAPS = (5.0, 10.0, 15.0, 20.0, 30.0, 50.0, 100.0, 200.0, 500.0)


def fault(name: str, wording: str, stage: str, step: str) -> Fault:
    """Returns the fault of a bound.

    Args:
      name: Its name.
      wording: What is said of it, a format string of `cap`.
      stage: The stage whose values are bounded.
      step: The step of its formula that they are.
    """

    def bounds(question: Question) -> Iterator[Mistakes]:
        yield from ((made.made(cap=cap),) for cap in _near(question))

    grid = Grid("cap", _CAPS, round_numbers.near)
    made = Fault(name, wording, (stage,), {step: _capped}, solve=bounds, grid=grid, alone=True, formula=_FORMULA)
    return made


def _capped(raw: Value, at: At, cap: float) -> Value:
    return cap * np.tanh(raw / cap)


def _near(question: Question) -> list[float]:
    """Bounds that theirs may have: c is solved for where the curve bends most."""
    counted, values = question.counted(), (question.value(()), question.their_rows())
    largest, bound = (float(np.abs(np.where(counted, each, 0.0)).max(initial=0.0)) for each in values)
    return round_numbers.near(_cap_of(largest, bound)) if 0 < bound < largest else []


def _cap_of(raw: float, capped: float) -> float:
    """c of c tanh(raw / c) = capped, by bisection: the bound rises with c."""
    low, high = capped, 1e3 * raw
    for _ in range(80):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if middle * np.tanh(raw / middle) > capped else (middle, high)
    return low
