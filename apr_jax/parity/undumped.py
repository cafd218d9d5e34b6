"""Numbers of mistakes at stages that were not dumped: solved for by how well a later stage is reproduced."""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize_scalar

from apr_jax.parity.faults.record import Mistake
from apr_jax.parity.question import Question

_WORTH = 0.7
"""A number is solved for to the end only if some value nearby leaves less than this share of the difference."""
_TOLERANCE = 1e-9


def solve(question: Question, base: Mistake) -> list[Mistake]:
    """Returns a fault with the number that leaves least, round ones near it first; nothing if no number helps.

    Args:
      question: The dumped stage behind the gap.
      base: The fault with its other parameters; its `grid` says what is solved for, and where to begin.
    """
    grid = base.fault.grid
    if grid is None:
        raise ValueError(f"{base.fault} has no number to solve for")

    def with_number(value: float) -> Mistake:
        return base.having(**base.parameters, **{grid.parameter: value})

    def misfit(logarithm: float) -> float:
        value = question.misfit((with_number(float(np.exp(logarithm))),))
        return value if np.isfinite(value) else np.finfo(np.float64).max

    points = np.log(grid.values)
    errors = [misfit(point) for point in points]
    best = int(np.argmin(errors))
    if errors[best] > _WORTH * question.misfit(()):
        return []
    bounds = points[max(best - 1, 0)], points[min(best + 1, len(points) - 1)]
    found = minimize_scalar(misfit, bounds=bounds, method="bounded", options={"xatol": _TOLERANCE, "maxiter": 60})
    return [with_number(value) for value in grid.near(float(np.exp(found.x)))]
