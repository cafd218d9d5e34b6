"""What is known of another engine's steps, and how well a rule explains them.

Adam divides a gradient by its own size, so that rounding decides the direction of a step where the gradient is nearly
0. How far each element may be off is therefore asked of the rule itself: what does it make of gradients that are off by
as much as ours are in the engine's dtype? A difference is measured in units of that.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from apr_jax.optimizer.rule import GradientsAt, Rule, Vector
from apr_jax.optimizer.settings import Layout, Settings

BAR = 3.0
"""How many times its allowance the differences of any one parameter may be, as a root mean square (`Fit.worst`).

Clean runs of torch and optax stay below 1 (tests/reference/optimizer_hf_test.py prints them)."""
_GRADIENT_NOISE = 4.0  # times the root mean square of our own error: another engine's, and its tails
_SOLVED_ON = 16_000  # elements that a number is solved for on
_LARGEST = 1e4  # one element counts no more than this
_LARGEST_EXPLAINED = 30.0  # and beside a mistake that explains nearly all no more than this
_CHAOTIC_SHARE = 0.9  # of the elements, where a mistake decides by rounding and a few go the other way
_MOST_LEFT = 0.3  # of what is to be explained: a rule that allows everything explains nothing


@dataclasses.dataclass(frozen=True)
class Fit:
    """How a rule's parameters compare with the other side's.

    Attributes:
      worst: Of the parameter that is farthest off: the root mean square of its differences in units of what each
        element may be off.
      where: Its name.
      typical: As `worst`, with little weight on single elements: where a mistake makes steps large, rounding decides
        more of them.
      error: |theirs - replayed| / |theirs - before| over all elements.
      left: |theirs - replayed| / |theirs - right|, both in units of what each element may be off of the right rule.
    """

    worst: float
    where: str
    typical: float
    error: float
    left: float = math.inf

    @property
    def within(self) -> bool:
        """Whether no parameter is off by more than rounding is."""
        return self.worst <= BAR

    @property
    def explains(self) -> bool:
        """Whether a rule with mistakes leaves nothing of what the right one does."""
        return self.typical <= BAR and self.left <= _MOST_LEFT


@dataclasses.dataclass(frozen=True, eq=False)
class Question:
    """The steps of another engine.

    Attributes:
      settings: What it was asked to do.
      layout: Where each parameter stands.
      start: The parameters before, [P].
      theirs: The other side's after the last step, [P]; finite.
      exact: Computes the gradient of a step at some parameters, in float64.
      coarse: The same in the engine's dtype.
      spacing: The distance of neighbouring numbers of the engine's dtype at each parameter, [P].
      rounding: One rounding in the engine's dtype, relative.
    """

    settings: Settings
    layout: Layout
    start: Vector
    theirs: Vector
    exact: GradientsAt
    coarse: GradientsAt
    spacing: Vector
    rounding: float

    @functools.cached_property
    def right(self) -> Rule:
        """What was asked for."""
        return Rule.right(self.settings, self.layout)

    @functools.cached_property
    def expected(self) -> tuple[Vector, list[Vector]]:
        """The right parameters after the last step, and the gradients on the way."""
        return self.replay(self.right)

    @functools.cached_property
    def _expected_within(self) -> tuple[Vector, Vector]:
        """The right parameters, and how far each element may be off."""
        after, gradients = self.expected
        return after, self.allowance(self.right, gradients)

    def replay(self, rule: Rule) -> tuple[Vector, list[Vector]]:
        """Returns the parameters that a rule ends at, [P], and the gradient at each of its steps."""
        return _recorded(rule, self.start, self.exact)

    def allowance(self, rule: Rule, gradients: Sequence[Vector]) -> Vector:
        """Returns how far each element may be off that an engine steps by a rule, float64 [P].

        Gradients are off by rounding, and from the second step on also since the parameters are: both are seen where
        the rule runs on gradients of the engine's dtype.
        """
        _, coarse = _recorded(rule, self.start, self.coarse)
        noise = [self._noise(*pair) for pair in zip(gradients, coarse, strict=True)]
        middle = rule.run(self.start, lambda step, _: gradients[step])
        spread = np.zeros_like(middle)
        count = len(gradients)
        for signs in _patterns(count):
            moved = [each + sign * off for each, sign, off in zip(gradients, signs, noise, strict=True)]
            after = rule.run(self.start, lambda step, _, moved=moved: moved[step])  # type: ignore[misc]
            spread = np.fmax(spread, np.abs(after - middle))
        # Engines take 1 - beta2^t in their own dtype, so that the roundings of beta2 are large beside it.
        relative = self.rounding * (8 + 0.5 / max(1 - max(rule.betas), 1e-5))
        steps = relative * np.abs(middle - self.start) + self.rounding * sum(map(abs, rule.rates))
        return spread + steps + 0.5 * self.spacing * np.sqrt(2 * count)

    def _noise(self, exact: Vector, coarse: Vector) -> Vector:
        """Returns how far a gradient may be off, [P]: as far as ours are, and by no rounding where they are 0."""
        noise = np.zeros_like(exact)
        for part in self.layout.slices.values():
            own, size = (float(np.sqrt(np.mean(each**2))) for each in (coarse[part] - exact[part], exact[part]))
            noise[part] = np.where(exact[part] == 0, 0.0, _GRADIENT_NOISE * max(own, self.rounding * size))
        return noise

    def fit(self, rule: Rule, chaotic: bool = False) -> Fit:
        """Replays a rule and compares.

        Args:
          rule: The rule.
          chaotic: Whether a tenth of the elements of each parameter may be anywhere.
        """
        after, gradients = self.replay(rule)
        off = self.theirs - after
        units = _in_units(off, self.allowance(rule, gradients))
        parts = {name: units[part] for name, part in self.layout.slices.items()}
        worst, where = max((_size(part), name) for name, part in parts.items())
        typical = max(_typical(part, chaotic) for part in parts.values())
        step = float(np.linalg.norm(self.theirs - self.start))
        error = float(np.linalg.norm(off)) / step if step else (0.0 if not off.any() else math.inf)
        expected, allowance = self._expected_within
        all_of_it = _size(_in_units(self.theirs - expected, allowance))
        left = _size(_in_units(off, allowance)) / all_of_it if all_of_it else 0.0
        return Fit(worst, where, typical, error if math.isfinite(error) else math.inf, left)

    def solve(
        self, change: Callable[[float], Rule], grid: Sequence[float], likely: Callable[[float], Sequence[float]]
    ) -> float:
        """Returns the number with which a rule comes nearest to the other side's parameters.

        Gradients are those on the way of the rule that was solved for before: twice is enough, since they change
        little from one guess to the next.

        Args:
          change: Makes a rule of a number.
          grid: Where to look, rising; the number is refined between neighbours.
          likely: Numbers that an engine may hold near a solved one, the likeliest first.
        """
        _, gradients = self.expected
        some = slice(None, None, max(1, len(self.start) // _SOLVED_ON))
        allowance, theirs = self._expected_within[1][some], self.theirs[some]
        number = grid[0]
        for _ in range(2):

            def cost(number: float, gradients: list[Vector] = gradients, allowance: Vector = allowance) -> float:
                after = change(number).run(self.start, lambda step, _: gradients[min(step, len(gradients) - 1)], some)
                # Grows so slowly that what rounding has decided the other way does not pull.
                return float(np.mean(np.log1p(_in_units(theirs - after, allowance) ** 2)))

            number = _least(cost, grid)
            _, gradients = self.replay(change(number))
            nearer = self.allowance(change(number), gradients)[some]
            # A number that makes rounding of everything would come nearest.
            allowance = np.minimum(allowance, nearer)
        best = cost(number)
        return next(each for each in (*likely(number), number) if cost(each) <= best + 0.1 * (1 + best))


def _recorded(rule: Rule, start: Vector, gradients_at: GradientsAt) -> tuple[Vector, list[Vector]]:
    found: list[Vector] = []

    def at(step: int, parameters: Vector) -> Vector:
        found.append(gradients_at(step, parameters))
        return found[-1]

    return rule.run(start, at), found


def _in_units(off: Vector, allowance: Vector) -> Vector:
    """Returns |off| in units of the allowance, at most `_LARGEST`; what is not finite is as much."""
    with np.errstate(invalid="ignore"):
        units = np.abs(off) / allowance
    return np.where(np.isfinite(units), np.minimum(units, _LARGEST), _LARGEST)


def _patterns(steps: int) -> Iterator[np.ndarray]:
    """Yields signs of an error of the gradient at each step: always the same, changing, in one step alone."""
    for sign in (1.0, -1.0):
        yield np.full(steps, sign)
        if steps > 1:
            yield sign * (-1.0) ** np.arange(steps)
            yield sign * np.eye(steps)[-1]
            yield sign * np.eye(steps)[0]


def _size(units: Vector) -> float:
    return float(np.sqrt(np.mean(units**2)))


def _typical(units: Vector, chaotic: bool) -> float:
    if chaotic:
        units = np.sort(units)[: max(1, int(len(units) * _CHAOTIC_SHARE))]
    return _size(np.minimum(units, _LARGEST_EXPLAINED))


def _least(cost: Callable[[float], float], grid: Sequence[float]) -> float:
    """Returns where a cost is least: the best of a grid, refined by golden sections between its neighbours."""
    costs = [cost(number) for number in grid]
    at = int(np.argmin(costs))
    low, high = grid[max(0, at - 1)], grid[min(len(grid) - 1, at + 1)]
    for _ in range(_SECTIONS):
        inner = [low + (high - low) * share for share in (1 - _GOLDEN, _GOLDEN)]
        low, high = (low, inner[1]) if cost(inner[0]) < cost(inner[1]) else (inner[0], high)
    middle = (low + high) / 2
    return middle if cost(middle) <= costs[at] else grid[at]


_GOLDEN, _SECTIONS = 0.618, 20
