"""Numbers of mistakes at stages that were not dumped: solved for by how well a later stage is reproduced."""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize_scalar

from apr_jax.parity.faults.record import Mistake
from apr_jax.parity.question import Question

_WORTH = 0.7
"""A number is solved for to the end only if some value nearby leaves less than this share of the difference."""
_TOLERANCE = 1e-9
_NEARLY = 0.05
"""How far off the logarithm of a number that is nearly known may be."""
_FEW = 5
"""As many numbers of a grid tell whether a fault is like what there is to explain."""


def solve(question: Question, base: Mistake) -> list[Mistake]:
    """Returns a fault with the number that leaves least, round ones near it first; nothing if no number helps.

    Args:
      question: The dumped stage behind the gap.
      base: The fault with its other parameters; its `grid` says what is solved for, and where to begin.
    """
    grid = base.fault.grid
    if grid is None:
        raise ValueError(f"{base.fault} has no number to solve for")

    points = np.log(grid.values)
    errors = [_misfit(question, base, point) for point in points]
    best = int(np.argmin(errors))
    if errors[best] > _WORTH * question.misfit(()):
        return []
    return _between(question, base, points[max(best - 1, 0)], points[min(best + 1, len(points) - 1)])


def solve_near(question: Question, mistake: Mistake) -> list[Mistake]:
    """Returns a fault whose number is nearly known with the one that leaves least, round ones near it first."""
    grid = mistake.fault.grid
    assert grid is not None
    others = {name: value for name, value in mistake.pairs if name != grid.parameter}
    at = float(np.log(mistake.parameters[grid.parameter]))
    return _between(question, mistake.having(**others), at - _NEARLY, at + _NEARLY)


def _between(question: Question, base: Mistake, low: float, high: float) -> list[Mistake]:
    """The fault with the number whose logarithm is between these that leaves least, round ones near it first."""
    assert base.fault.grid is not None
    options = {"xatol": _TOLERANCE, "maxiter": 60}
    found = minimize_scalar(
        lambda at: _misfit(question, base, at), bounds=(low, high), method="bounded", options=options
    )
    return [_with_number(base, value) for value in base.fault.grid.near(float(np.exp(found.x)))]


def _misfit(question: Question, base: Mistake, logarithm: float) -> float:
    value = question.misfit((_with_number(base, float(np.exp(logarithm))),))
    return value if np.isfinite(value) else np.finfo(np.float64).max


def unlike(question: Question, base: Mistake) -> float:
    """Returns how unlike what there is to explain a fault's change is, by a few numbers from all over its grid."""
    return min(question.unlike((made,)) for made in some(base))


def some(base: Mistake) -> list[Mistake]:
    """Returns a fault with a few numbers from all over its grid."""
    assert base.fault.grid is not None
    values = base.fault.grid.values
    return [_with_number(base, value) for value in values[:: max(1, len(values) // _FEW)]]


def _with_number(base: Mistake, value: float) -> Mistake:
    assert base.fault.grid is not None
    return base.having(**base.parameters, **{base.fault.grid.parameter: value})
