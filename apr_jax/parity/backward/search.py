"""The search for the mistakes behind one wrong gradient: at it, or at one before it that was not dumped."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from apr_jax.parity.backward import nodes
from apr_jax.parity.backward.localise import Bench, Judged, judge
from apr_jax.parity.backward.replay import Backward
from apr_jax.parity.faults.losses import round_factor
from apr_jax.parity.faults.record import Mistake, Mistakes, names
from apr_jax.parity.faults.table import BACKWARD
from apr_jax.trace.stages import Key

_SLACK = 1.5
"""A hypothesis may be this much farther off than a right gradient: the mistake's own rounding is not ours."""
_BETTER = 0.7
"""What a hypothesis leaves at most of the difference that it is to explain."""
_ALIKE = 0.1
"""Hypotheses give the same values if their errors differ by less than this share of the budget."""
_CHAOTIC = 0.35
"""What roundings that may fall the other way leave at most of the difference, if most values are met."""
_NEARLY = 1e-3
_MET = 0.9
"""The share of values that such a hypothesis has to meet."""
_KEPT, _KEPT_PAIRS = 14, 6
"""How many of the best single mistakes, and of pairs, are built on."""
_CHANGES = 1e-9
_NEIGHBOURS = 8
"""At how many gradients that share its inputs a hypothesis is tried."""
_STEPS = 40
_SECONDS = 30.0
"""How long sets of mistakes are tried at one gradient; of this thread's processor time."""


@dataclasses.dataclass(frozen=True)
class Question:
    """A wrong gradient.

    Attributes:
      bench: What gradients are judged with.
      judged: The gradient.
      sound: Gradients that were not dumped and that others, which were made of them, show to be right.
    """

    bench: Bench
    judged: Judged
    sound: frozenset[Key] = frozenset()

    @property
    def back(self) -> Backward:
        """The replay in float64."""
        return self.bench.exact

    @property
    def node(self) -> Key:
        """The gradient's key."""
        return self.judged.site.key

    @property
    def dtype(self) -> str:
        """What the other side declares to compute in."""
        return self.bench.dtype

    def kind_of(self, node: Key) -> str:
        """Returns what kind of gradient another one is."""
        return nodes.kind_of(node, self.back.config)

    @functools.cached_property
    def gap(self) -> list[Key]:
        """The gradient, and what was not dumped before it and may be wrong."""
        return [key for key in self.back.gap(self.node) if key not in self.sound]

    def value(self, mistakes: Mistakes) -> np.ndarray:
        """Returns the gradient with these mistakes made too."""
        return np.asarray(self.back.supposing(mistakes).compute(self.node))

    def misfit(self, mistakes: Mistakes) -> float:
        """Returns |theirs - the gradient with these mistakes|."""
        return self.judged.error(self.value(mistakes))[0]

    def factor(self) -> float | None:
        """Returns what the right gradient is to be multiplied by; None if no number explains theirs."""
        return factor_of(self.judged)

    def solved(self, make: Callable[[float], Mistake], grid: Sequence[float]) -> float | None:
        """Returns the number with which a mistake comes nearest, sought around the best of a rising grid."""
        layers = nodes.layer_of(self.node, self.back.config)

        def left(power: float) -> float:
            return self.misfit((make(math.exp(power)).in_layers(layers),))

        powers = [math.log(number) for number in grid]
        best = min(range(len(powers)), key=lambda index: left(powers[index]))
        low, high = powers[max(0, best - 1)], powers[min(len(powers) - 1, best + 1)]
        golden = (math.sqrt(5) - 1) / 2
        for _ in range(_STEPS):
            first, second = high - golden * (high - low), low + golden * (high - low)
            low, high = (low, second) if left(first) < left(second) else (first, high)
        number = math.exp((low + high) / 2)
        return number if self.misfit((make(number).in_layers(layers),)) < _BETTER * self.judged.site.error else None


def factor_of(judged: Judged) -> float | None:
    """Returns the number that theirs is times the right gradient; None if it is none, or 1."""
    theirs, right = judged.theirs[judged.counted], judged.right[judged.counted]
    power = float(right @ right)
    if not power or not judged.site.finite:
        return None
    factor = float(right @ theirs) / power
    left = float(np.linalg.norm(theirs - factor * right))
    scale = max(abs(factor), 1e-30)
    if left > _SLACK * scale * judged.site.budget or judged.site.error <= judged.site.budget:
        return None
    return round_factor(factor)


@dataclasses.dataclass(frozen=True)
class Found:
    """What explains a wrong gradient.

    Attributes:
      mistakes: What was made.
      error: What they leave.
      alternatives: Names of others that give the same values.
    """

    mistakes: Mistakes
    error: float
    alternatives: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Tried:
    mistakes: Mistakes
    error: float
    fits: bool


def candidates(question: Question) -> Iterator[Mistake]:
    """Yields every mistake that the table has for a gradient and for those that were not dumped before it."""
    config = question.back.config
    for node in reversed(question.gap):
        kind, layer = nodes.kind_of(node, config), nodes.layer_of(node, config)
        for fault in BACKWARD.values():
            if not callable(fault.stages) and kind in fault.stages:
                for parameters in fault.variants(question, node):
                    yield fault.made(**parameters).in_layers(layer)


def search(
    question: Question, later: Sequence[Key], stacked: bool = True
) -> tuple[Found | None, tuple[str, float] | None]:
    """Looks for the fewest mistakes that reproduce a gradient.

    Args:
      question: The gradient.
      later: Gradients that are judged after it, in order: those that share inputs with it tell which mistake it is.
      stacked: Whether sets of several mistakes are tried too.

    Returns:
      What explains it, if anything; else what came nearest, and what share it leaves.
    """
    found = list(dict.fromkeys(candidates(question)))
    singles = [_best_way(question, mistake) for mistake in found]
    if good := [tried for tried in singles if tried.fits]:
        return _chosen(question, good, later), None
    tried = list(_stacks(question, singles)) if stacked else []
    if good := [each for each in tried if each.fits]:
        fewest = min(len(each.mistakes) for each in good)
        return _chosen(question, [each for each in good if len(each.mistakes) == fewest], later), None
    nearest = min(singles, key=lambda each: each.error, default=None)
    if nearest is None or not question.judged.site.error:
        return None, None
    return None, (names(nearest.mistakes), nearest.error / question.judged.site.error)


def accumulated(question: Question) -> Found | None:
    """Looks for a running sum in a narrow dtype: what else is rounded to it has no other mistake."""
    sums = [mistake for mistake in candidates(question) if mistake.fault.chaotic and "tensor" in mistake.parameters]
    good = [tried for tried in (_try(question, (mistake,)) for mistake in sums) if tried.fits]
    best = min(good, key=lambda tried: tried.error, default=None)
    return None if best is None else Found(best.mistakes, best.error)


def _best_way(question: Question, mistake: Mistake) -> _Tried:
    ways = [way.in_layers(*(mistake.layers or ())) for way in mistake.ways()]
    return min((_try(question, (way,)) for way in ways), key=lambda tried: (not tried.fits, tried.error))


def _try(question: Question, mistakes: Mistakes) -> _Tried:
    judged = question.judged
    with np.errstate(all="ignore"):
        value = question.value(mistakes)
    error, budget, worst = judged.error(value)
    if not math.isfinite(error):
        return _Tried(mistakes, math.inf, False)
    better = error <= _BETTER * judged.site.error
    fits = better and error <= _SLACK * budget and worst <= _SLACK
    if not fits and (near := max((m.fault.near for m in mistakes if m.fault.chaotic), default=0.0)):
        # Of roundings all but few values are met, of exponentials that are off a little each nearly.
        left = _CHAOTIC if near < _NEARLY else 1.0
        fits = error <= left * judged.site.error and _met(judged, value, near) >= _MET
    return _Tried(mistakes, error, fits)


def _met(judged: Judged, value: np.ndarray, near: float) -> float:
    """The share of values that are met, of those that differ from the right ones by more than that."""
    theirs, made, right = (each[judged.counted] for each in (judged.theirs, value, judged.right))
    wrong = np.abs(theirs - right) > 2 * near * np.abs(theirs)
    return float(np.mean((np.abs(theirs - made) <= near * np.abs(theirs))[wrong])) if wrong.any() else 0.0


def _stacks(question: Question, singles: Sequence[_Tried]) -> Iterator[_Tried]:
    """Two mistakes, then three, built on those that leave least; none that changes nothing."""
    start = question.judged.site.error
    moving = [tried for tried in singles if abs(tried.error - start) > _CHANGES * start and math.isfinite(tried.error)]
    ranked = sorted(moving, key=lambda tried: float(f"{tried.error:.3e}"))
    pairs: list[_Tried] = []
    ends = time.thread_time() + _SECONDS
    for first, second in itertools.product(ranked[:_KEPT], ranked):
        if time.thread_time() > ends:
            return
        if _apart(first.mistakes, second.mistakes):
            pairs.append(_try(question, (*first.mistakes, *second.mistakes)))
            yield pairs[-1]
    if any(pair.fits for pair in pairs):
        return
    for pair in sorted(pairs, key=lambda tried: float(f"{tried.error:.3e}"))[:_KEPT_PAIRS]:
        for third in ranked:
            if time.thread_time() > ends:
                return
            if all(_apart((mistake,), third.mistakes) for mistake in pair.mistakes):
                yield _try(question, (*pair.mistakes, *third.mistakes))


def _apart(ones: Mistakes, others: Mistakes) -> bool:
    """Whether some mistakes are not of one kind: each is made once in a place."""
    return not any(
        one.fault is other.fault and one.layers == other.layers and _of(one) == _of(other)
        for one in ones
        for other in others
    )


def _of(mistake: Mistake) -> object:
    return mistake.parameters.get("of", mistake.parameters.get("tensor", mistake.parameters.get("without")))


def _chosen(question: Question, good: Sequence[_Tried], later: Sequence[Key]) -> Found:
    """The one that most of the gradients that share inputs with it agree to; those that cannot be told from it."""
    if len(good) > 1 and len(question.gap) > 1:
        agreed = {id(tried): _agreement(question, tried.mistakes, later) for tried in good}
        most = max(agreed.values())
        good = [tried for tried in good if agreed[id(tried)] == most]
    least = min(tried.error for tried in good)
    alike = [tried for tried in good if tried.error <= least + _ALIKE * question.judged.site.budget]
    best = alike[0]
    others = {names(tried.mistakes) for tried in alike} - {names(best.mistakes)}
    return Found(best.mistakes, best.error, tuple(sorted(others)))


def _agreement(question: Question, mistakes: Mistakes, later: Sequence[Key]) -> int:
    """At how many of the gradients that may show it a set of mistakes makes theirs right."""
    back, bench = question.back, question.bench.supposing(mistakes)
    inside = set(question.gap)
    near = [key for key in later if inside & set(back.gap(key))][:_NEIGHBOURS]
    return sum(not judge(bench, key, back.theirs[key]).site.wrong for key in near)
