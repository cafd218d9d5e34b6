"""AdamW in NumPy float64, as formulas that can each be replaced: a mistake is a rule with another formula or number.

One step t of Loshchilov and Hutter 2019, algorithm 2, element by element, g the gradient and p the parameter:

    g = taken(gradients of all steps so far)        m = beta1 m + (1 - beta1) g      v = beta2 v + (1 - beta2) g^2
    c1 = 1 - beta1^t, c2 = 1 - beta2^t              d = (m / c1) / (sqrt(v / c2) + eps)
    p = p - rate (d + decay p)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from apr_jax.optimizer.settings import Layout, Settings, decay_of

Vector = np.ndarray
EVERYTHING = slice(None)
GradientsAt = Callable[[int, Vector], Vector]
"""Step (from 0) and parameters [P] -> the gradient [P]."""


def last(found: Sequence[Vector]) -> Vector:
    """The gradient of this step."""
    return found[-1]


def clipped(norm: float) -> Callable[[Sequence[Vector]], Vector]:
    """The gradient, scaled down to a norm over all parameters."""

    def taken(found: Sequence[Vector]) -> Vector:
        return found[-1] * min(1.0, norm / max(float(np.linalg.norm(found[-1])), 1e-300))

    return taken


def alone(gradient: Vector, parameters: Vector, decay: Vector) -> Vector:
    """What goes into the moments: the gradient, without the decay."""
    del parameters, decay
    return gradient


def moments(m: Vector, v: Vector, g: Vector, beta1: float, beta2: float) -> tuple[Vector, Vector]:
    """Running means of the gradient and of its square."""
    return beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2


def corrections(beta1: float, beta2: float, step: int) -> tuple[float, float]:
    """What the means are divided by, since they began at 0."""
    return 1 - beta1**step, 1 - beta2**step


def direction(m: Vector, v: Vector, c1: float, c2: float, eps: float) -> Vector:
    """The step at rate 1."""
    return (m / c1) / (np.sqrt(v / c2) + eps)


def applied(p: Vector, d: Vector, rate: float, decay: Vector) -> Vector:
    """The parameters after the step."""
    return p - rate * (d + decay * p)


def kept(p: Vector) -> Vector:
    """The parameters as they are kept between steps."""
    return p


@dataclasses.dataclass(frozen=True, eq=False)
class Rule:
    """How an engine steps; the defaults are right.

    Attributes:
      rates: The learning rate of each step.
      betas: Of the two moments.
      eps: Of the denominator.
      decay: What each element decays by, [P].
      moves: Which elements are stepped at all, bool [P].
      taken, inputs, moments, corrections, direction, applied, kept: The formulas above, in their order.
    """

    rates: tuple[float, ...]
    betas: tuple[float, float]
    eps: float
    decay: Vector
    moves: Vector
    taken: Callable[[Sequence[Vector]], Vector] = last
    inputs: Callable[[Vector, Vector, Vector], Vector] = alone
    moments: Callable[[Vector, Vector, Vector, float, float], tuple[Vector, Vector]] = moments
    corrections: Callable[[float, float, int], tuple[float, float]] = corrections
    direction: Callable[[Vector, Vector, float, float, float], Vector] = direction
    applied: Callable[[Vector, Vector, float, Vector], Vector] = applied
    kept: Callable[[Vector], Vector] = kept

    @classmethod
    def right(cls, settings: Settings, layout: Layout) -> Rule:
        """Returns the rule that was asked for."""
        return cls(
            settings.rates,
            settings.betas,
            settings.eps,
            layout.per_kind(decay_of(settings)),
            np.ones(sum(part.stop - part.start for part in layout.slices.values()), bool),
            taken=last if settings.clip_norm is None else clipped(settings.clip_norm),
        )

    def change(self, **parts: object) -> Rule:
        """Returns the rule with other numbers or formulas."""
        return dataclasses.replace(self, **parts)  # type: ignore[arg-type]

    def run(self, start: Vector, gradients_at: GradientsAt, only: slice = EVERYTHING) -> Vector:
        """Returns the parameters after all steps, float64 [P]; what is not finite goes on without a warning.

        `only` picks the elements that are stepped and returned, where gradients do not depend on the parameters.
        """
        p, decay, moves = start[only], self.decay[only], self.moves[only]
        m, v = np.zeros_like(p), np.zeros_like(p)
        found: list[Vector] = []
        with np.errstate(all="ignore"):
            for step, rate in enumerate(self.rates):
                found.append(gradients_at(step, p))
                g = self.inputs(self.taken(found)[only], p, decay)
                m, v = self.moments(m, v, g, *self.betas)
                d = self.direction(m, v, *self.corrections(*self.betas, step + 1), self.eps)
                p = np.where(moves, self.kept(self.applied(p, d, rate, decay)), p)
        return p
