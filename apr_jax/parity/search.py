"""The search for the mistakes behind one wrong stage.

Most hypotheses are wrong, and a few positions show it: each is judged on a sample first, and only what survives on all
positions. A mistake that explained the same stage of another layer is tried before anything else.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from apr_jax.parity.faults.products import TF32, drift
from apr_jax.parity.faults.record import Mistake, Mistakes, names
from apr_jax.parity.hypotheses import FEW_BITS, Came, hypotheses, multiplications
from apr_jax.parity.localise import (
    EPSILON,
    Localisation,
    Site,
    budgets,
    channel_budgets,
    channel_medians,
    row_norms,
    turn_budgets,
    worst_share,
)
from apr_jax.parity.question import Question, sine
from apr_jax.parity.replay import Replay
from apr_jax.trace.positions import compared_positions, dumped_tokens, position_axis

_SLACK = 1.5
"""A hypothesis may be this much farther off than a right stage: the mistake's own rounding is not ours."""
_SURE = 1.0
"""What explained another layer is taken at once where it leaves no more than a right stage may be off."""
_TINY = 0.03
"""What is left of the difference by what explains it beyond doubt."""
_SAMPLED = 3.0
"""How much farther off a sample of the positions may be than all of them."""
_CHAOTIC = 0.1
"""What sums in bf16, activations in int8 and quantised weights may leave unexplained: a rounding that falls the other
way moves a whole step, so that such mistakes are told by most values, not by all. So it is with TF32 where what is
rounded was not dumped and is known nearly; elsewhere it has to fit and to leave no more than this."""
_EQUAL = 1e-9
"""Relative difference of squares up to which two distances are equal."""
_ALIKE = 0.1
"""Two mistakes give the same values if their distances differ by less than this share of the budget."""
_TOLD_APART, _FEW = 0.02, 12.5
"""In few bits what is left is roundings of single values, nearly independent of each other: thousands of them leave a
wrong mistake farther off than the right one by more than this. Numbers of one mistake may be off by roundings that are
not: those of cos and sin. By chance alone, few values differ by this much over their number: five sigmas."""
_ROUND = 0.02
"""As much a number that was solved for may be off its round neighbour."""
_DOUBTFUL = 0.1
"""As much it may be off one that gives the same values."""
_BETTER = 0.7
"""What a hypothesis leaves at most of the difference that it is to explain."""

_MOST_STACKS, _SECONDS = 2000, 30.0
"""How many sets of mistakes, and mistakes of single layers behind a gap of several, are tried at a stage, and for how
long at all of them: behind layer outputs or logits alone there is no end to them. Seconds are of this thread's
processor time, since an answer shall not hang on what else the machine does."""

_TOLD_SECONDS = 60.0
"""How long it is asked which layers behind a gap the values tell; of the others it is taken for granted."""

_MOST_POSITIONS, _FEWEST_POSITIONS = 32, 8
_SAMPLE_ELEMENTS = 1 << 21


@dataclasses.dataclass(frozen=True)
class Answer:
    """The mistakes that explain a stage.

    Attributes:
      mistakes: What was made.
      error: |theirs - the stage with these mistakes|.
      alternatives: Names of other mistakes that give the same values.
      told: By name, for a gap of several layers: those in which these values show whether the mistake was made.
    """

    mistakes: Mistakes
    error: float
    alternatives: tuple[str, ...] = ()
    told: Mapping[str, frozenset[int]] = dataclasses.field(default_factory=dict)


def silent(text: str) -> None:
    """Tells nobody."""


@dataclasses.dataclass
class Known:
    """What explained the stages before.

    Attributes:
      answers: By stage name, the answers that a search among all hypotheses gave.
      progress: Is told what is going on, often.
      seconds: How long sets of mistakes, and mistakes of single layers, are still looked for.
    """

    answers: dict[str, list[Answer]] = dataclasses.field(default_factory=dict)
    progress: Callable[[str], None] = silent
    seconds: float = _SECONDS

    def at(self, stage: str) -> list[Answer]:
        """Returns what explained this stage in other layers, the last first."""
        return self.answers.get(stage, [])[::-1]

    def blames_precision(self, mistakes: Mistakes) -> bool:
        """Whether another stage was explained by the same way of multiplying: that concerns all products."""
        if len(mistakes) > 1 or not mistakes[0].fault.multiplies:
            return False
        return any(answer.mistakes == mistakes for found in self.answers.values() for answer in found)

    def with_numbers(self, mistakes: Mistakes) -> list[Mistakes]:
        """Returns these mistakes with numbers that were solved for at other stages in place of their own."""
        answers = [answer.mistakes for found in self.answers.values() for answer in found]
        moved = (tuple(_with_numbers_of(others, mistake) for mistake in mistakes) for others in answers)
        return [one for one in dict.fromkeys(moved) if one != mistakes]

    def add(self, stage: str, answer: Answer) -> None:
        """Keeps an answer."""
        self.answers.setdefault(stage, []).append(answer)


@dataclasses.dataclass(frozen=True)
class Fit:
    """How well a hypothesis reproduces their values.

    Attributes:
      error: |theirs - value| over what is compared.
      budget: What that may be.
      worst: The largest error of a position or channel over its own budget.
      turned: The same of a rotated value.
      typical: The median error of a position, relative to it.
      unlike: What share of the difference is left if what the hypothesis changes may be taken any number of times.
    """

    error: float
    budget: float
    worst: float
    turned: float = 0.0
    typical: float = math.inf
    unlike: float = 1.0

    @property
    def single(self) -> float:
        """The largest error of anything smaller than the stage over its own budget."""
        return max(self.worst, self.turned)

    @property
    def share(self) -> float:
        """The largest error over its own budget, of the whole or of anything smaller."""
        return max(self.error / self.budget if self.budget else math.inf, self.single)

    def within(self, slack: float) -> bool:
        """Whether what is left is rounding."""
        # A number that was solved for turns single values by more than their few roundings.
        return self.error <= slack * self.budget and self.worst <= 2 * slack and self.turned <= 8 * slack


class _Look:
    """One stage's values at the positions of a replay, ready to judge hypotheses with.

    Attributes:
      replay: The replay.
      theirs: Their values, float64.
      before: How well the right values fit.
    """

    def __init__(self, replay: Replay, site: Site, located: Localisation):
        self.replay, self._site, self._dtype = replay, site, located.dtype
        self.theirs = replay.look(site.stage, located.theirs[site.key])
        columns, axis = replay.columns(), position_axis(site.key)
        window = replay.config.window_of(site.layer)
        mask = compared_positions(site.key, replay.inputs, located.theirs[site.key].shape, window=window)
        counted = dumped_tokens(replay.inputs, located.columns.get(site.key))[:, columns]
        self._mask = mask.take(columns, axis) & (counted[:, None, :, None] if axis == 2 else counted)
        self._positions = replay.positions()
        reference = replay.look(site.stage, located.reference[site.key])
        self._norm = float(np.linalg.norm(row_norms(reference, self._mask)))
        # Only a sample of the positions is asked how like a change is: of all of them that would be one more copy.
        self._right = reference if replay.rows is not None else None
        self.before = self.fit(reference, turns=turn_budgets(replay, site.key, located.dtype))

    def fit(self, value: np.ndarray, drift: float = 0.0, turns: np.ndarray | None = None) -> Fit:
        """Judges values as a right stage's are: by our own error there, carried over to the size of these.

        Args:
          value: The values, at the replay's positions.
          drift: What the mistake's own way of adding may move a position by, relative to it, beside the budget.
          turns: What each value may be off where they are rotated ones.
        """
        key, dtype, site = self._site.key, self._dtype, self._site
        with np.errstate(all="ignore"):
            difference = self.theirs - value
            error, size = row_norms(difference, self._mask), row_norms(value, self._mask)
            if not np.isfinite(error).all():
                return Fit(math.inf, 0.0, math.inf)
            scale = max(1.0, float(np.linalg.norm(size)) / max(self._norm, 1e-300))
            own = size * (scale * site.own / site.norm if site.norm else 0.0)
            budget, each = budgets(key, dtype, own, size, self._positions)
            worst = worst_share(error, each + drift * size)
            if site.channel_budgets is not None:
                channels = self._channels(value, size) + drift
                worst = max(worst, worst_share(channel_medians(key, difference, size, self._mask), channels))
            shares = 0.0 if turns is None else worst_share(np.abs(difference) * self._mask[..., None], turns)
            unlike = 1.0 if self._right is None else sine(self._counted(value - self._right), self._off)
        allowed = budget + drift * float(np.linalg.norm(size))
        moved = error[size > 0] / size[size > 0]
        typical = float(np.median(moved)) if moved.size else math.inf
        return Fit(float(np.linalg.norm(error)), allowed, worst, shares, typical, unlike)

    @functools.cached_property
    def _off(self) -> np.ndarray:
        assert self._right is not None
        return self._counted(self.theirs - self._right)

    def _counted(self, values: np.ndarray) -> np.ndarray:
        return values[self._mask] if self._mask.ndim < values.ndim else np.where(self._mask, values, 0.0)

    def _channels(self, value: np.ndarray, size: np.ndarray) -> np.ndarray:
        """What each channel may be off, if these values are the right ones: no less than the typical channel there."""
        known = self._site.channel_budgets
        assert known is not None
        least, medians = np.maximum(known, np.median(known)), channel_medians(self._site.key, value, size, self._mask)
        nothing = None if medians is None else np.zeros_like(medians)
        here = channel_budgets(self._site.key, self._dtype, nothing, medians, floor=1.0)
        return least if here is None else np.maximum(least, here)

    def judge(self, mistakes: Mistakes) -> Fit:
        """Judges a hypothesis, made in the way that fits best."""
        key, dtype = self._site.key, self._dtype
        allowed = sum(drift(mistake, self.replay, key) for mistake in mistakes)
        made = (self.replay.under(way) for way in itertools.product(*(mistake.ways() for mistake in mistakes)))
        fits = (self.fit(replay.compute(key), allowed, turn_budgets(replay, key, dtype)) for replay in made)
        return min(fits, key=lambda fit: fit.error)


class Search:
    """The search at one stage.

    Attributes:
      closest: Names of the hypothesis that came nearest without explaining it, and what share of the difference it
        leaves; None before `run`.
      ended: After how many explanations the search was ended with others left; None if it was not.
    """

    def __init__(self, replay: Replay, site: Site, located: Localisation):
        self.site, self.located = site, located
        self.closest: tuple[str, float] | None = None
        self.ended: int | None = None
        self._came: dict[Mistakes, Came] = {}
        self._replay = dataclasses.replace(replay, memo={})

    def recall(self, known: Known) -> Answer | None:
        """Tries what explained the same stage in other layers; None if nothing of it surely explains this one."""
        for answer in known.at(self.site.stage):
            fit = self._judge(answer.mistakes)
            if fit is not None and fit.within(_SURE):
                return dataclasses.replace(answer, error=fit.error, told=self._told(answer.mistakes, fit.error))
        return None

    def run(self, known: Known) -> Answer | None:
        """Looks among all hypotheses, and keeps what it finds in `known`; None if nothing explains the stage."""
        accepted: list[tuple[Mistakes, Fit]] = []
        sure: list[Mistakes] = []
        stacks, before = 0, time.thread_time()
        for tried, mistakes in enumerate(hypotheses(self._question(), self._came, accepted, sure)):
            known.progress(f"{self.site.key}: {tried} explanations tried")
            if accepted and len(mistakes) > len(accepted[0][0]):
                break
            now = time.thread_time()
            if len(mistakes) > 1 or any(mistake.layers is not None for mistake in mistakes):
                stacks, known.seconds = stacks + 1, known.seconds - (now - before)
                if stacks > _MOST_STACKS or known.seconds < 0:
                    self.ended = tried
                    break
            before = now
            if not mistakes or (fit := self._judge(mistakes)) is None:
                continue
            accepted.append((mistakes, fit))
            if fit.within(_SURE) and known.blames_precision(mistakes):
                break
            if fit.within(_SURE) and fit.error <= _TINY * self._all.before.error:
                sure.append(mistakes)
        if not accepted:
            return None
        if not any(fit.within(_SLACK) for _, fit in accepted):
            accepted += self._multiplied(accepted)
        answer = self._choose(accepted, known)
        answer = dataclasses.replace(answer, told=self._told(answer.mistakes, answer.error))
        known.add(self.site.stage, answer)
        return answer

    def _multiplied(self, accepted: Sequence[tuple[Mistakes, Fit]]) -> list[tuple[Mistakes, Fit]]:
        """Returns what ways of multiplying make of mistakes that leave more than rounding: engines round activations
        beside the weights that they quantise, and that is less than such mistakes may leave unexplained."""
        stacks = ((*mistakes, *way) for mistakes, _ in accepted for way in multiplications(self._question()))
        fits = ((stack, self._judge(stack)) for stack in stacks if len({mistake.fault for mistake in stack}) > 1)
        return [(stack, fit) for stack, fit in fits if fit is not None and fit.within(_SLACK)]

    def layers_of(self, answer: Answer) -> dict[str, tuple[int, ...]]:
        """Returns the layers that each mistake is made in, by name: the stage's own or, over a gap, those before that
        the values tell."""
        made = {mistake.name: self._layers(mistake) for mistake in answer.mistakes}
        return {name: tuple(sorted(layers & answer.told.get(name, layers))) for name, layers in made.items()}

    def _layers(self, mistake: Mistake) -> frozenset[int]:
        """The layers up to the stage that a mistake is made in; none outside the layers."""
        nodes, stages = self._replay.undumped(self.site.key), mistake.stages(self._replay)
        within = frozenset(node.layer for node in nodes if node.stage in stages and node.layer is not None)
        return within if mistake.layers is None else within.intersection(mistake.layers)

    def _told(self, mistakes: Mistakes, error: float) -> Mapping[str, frozenset[int]]:
        """In which layers the values show whether each mistake was made: without it there, or with it, they are
        farther off."""
        layers = {node.layer for node in self._replay.undumped(self.site.key) if node.layer is not None}
        told: dict[str, frozenset[int]] = {}
        started = time.thread_time()
        for place, mistake in enumerate(mistakes):
            made, shown = self._layers(mistake), set[int]()
            for layer in sorted(layers) if made and len(layers) > 1 else ():
                if time.thread_time() - started > _TOLD_SECONDS:
                    shown.add(layer)
                    continue
                others: list[int | None] = [*sorted(made ^ {layer}), *([None] if mistake.layers is None else [])]
                instead = (mistake.in_layers(*others),) if others else ()
                fit = self._all.judge((*mistakes[:place], *instead, *mistakes[place + 1 :]))
                if not self._as_near(fit.error, error):
                    shown.add(layer)
            if made and len(layers) > 1:
                told[mistake.name] = frozenset(shown)
        return told

    def permuted(self) -> np.ndarray | None:
        """Returns which column each position's values belong to, [B, T], if right values stand at wrong positions."""
        theirs, right = self._all.theirs, self.located.reference[self.site.key]
        if theirs.ndim != 3 or theirs.shape != right.shape or not np.isfinite(theirs).all():
            return None
        squares = (right * right).sum(axis=-1)
        distances = squares[:, None, :] - 2 * theirs @ right.swapaxes(1, 2)
        # Equal tokens have equal values: a position that is as near to itself as to any other is where it should be.
        slack = _EQUAL * squares
        own = distances.diagonal(axis1=1, axis2=2) <= distances.min(axis=-1) + slack
        nearest = np.where(own, np.arange(right.shape[1]), np.argmin(distances, axis=-1))
        moved = np.take_along_axis(right, nearest[..., None], axis=1)
        fit = self._all.fit(moved)
        return nearest if fit.within(_SLACK) and fit.error <= _CHAOTIC * self._all.before.error else None

    def _question(self) -> Question:
        key = self.site.key
        theirs, right = self.located.theirs[key], self.located.reference[key]
        tokens = dumped_tokens(self._replay.inputs, self.located.columns.get(key))
        given, reference = (self._replay, self._some.replay, key, theirs, right, tokens), self.located.reference
        return Question(*given, dtype=self.located.dtype, site=self.site, reference=reference)

    def _choose(self, accepted: Iterable[tuple[Mistakes, Fit]], known: Known) -> Answer:
        """The first that is about as near as the nearest; the others of its kind are alternatives.

        Of one mistake with several parameters the nearest is meant, and of its numbers the first that is nearly the
        same: round ones come first. Numbers are those that explained another stage, if these values cannot tell them
        from their own.
        """
        fits = list(accepted)
        least = min(fit.error for _, fit in fits)
        alike = [pair for pair in fits if pair[1].error <= 2 * least + _ALIKE * self.site.budget]
        if EPSILON[self.located.dtype] > FEW_BITS:
            alike = self._told_apart(alike, least)
        # How products are made concerns all of them: it goes before what explains this stage alone.
        blamed = [pair for pair in fits if self._as_near(pair[1].error, least) and known.blames_precision(pair[0])]
        first = names((blamed or alike)[0][0])
        same = [pair for pair in blamed or alike if names(pair[0]) == first]
        nearest, best = min(same, key=lambda pair: pair[1].share)
        chosen, fit = next(
            pair
            for pair in same
            if _nearly(pair[0], nearest)
            or (abs(pair[1].error - best.error) <= _ALIKE * self.site.budget and _nearly(pair[0], nearest, _DOUBTFUL))
        )
        error = fit.error
        others = set() if blamed else {names(mistakes) for mistakes, _ in alike}
        for mistakes in known.with_numbers(chosen):
            moved = self._judge(mistakes)
            if moved is not None and self._as_near(moved.error, least):
                chosen, error = mistakes, moved.error
                break
        return Answer(chosen, error, tuple(sorted(others - {names(chosen)})))

    def _told_apart(self, alike: Sequence[tuple[Mistakes, Fit]], least: float) -> list[tuple[Mistakes, Fit]]:
        """Of what is about as near, what roundings of a few bits cannot tell from the nearest, and all of its kind."""
        apart = 1 + max(_TOLD_APART, _FEW / self.site.elements)
        near = [pair for pair in alike if pair[1].error <= apart * least]
        # What leaves no single value beyond its budget goes before what does.
        near = [pair for pair in near if pair[1].share <= 1] or near
        close = {names(mistakes) for mistakes, _ in near}
        # A part that takes in nearly everything is as near as the whole, but for the last bits of its budget.
        whole = {names(mistakes) for mistakes, _ in near if not _in_a_part(mistakes)}
        parts = close - whole
        return [p for p in alike if names(p[0]) in (parts if _in_a_part(p[0]) else close)]

    def _as_near(self, error: float, least: float) -> bool:
        """Whether a hypothesis comes about as near as the nearest does: what is between them may be rounding."""
        return error <= 2 * least + 0.5 * self.site.budget

    def _judge(self, mistakes: Mistakes) -> Fit | None:
        """Returns how well a hypothesis fits if it explains the stage: on a sample, then on everything."""
        sampled = self._some.judge(mistakes)
        left = sampled.error / self._some.before.error if self._some.before.error else math.inf
        self._came[mistakes] = Came(left, sampled.unlike)
        if math.isfinite(left) and (self.closest is None or left < self.closest[1]):
            self.closest = names(mistakes), left
        if not self._explains(mistakes, sampled, self._some, _SAMPLED):
            return None
        fit = self._all.judge(mistakes)
        return fit if self._explains(mistakes, fit, self._all, 1.0) else None

    def _explains(self, mistakes: Mistakes, fit: Fit, look: _Look, leniency: float) -> bool:
        # A stage that single positions give away need not come nearer as a whole.
        single = look.before.error <= look.before.budget and fit.single <= leniency * _BETTER * look.before.single
        near = fit.within(leniency * _SLACK) and (single or fit.error <= leniency * _BETTER * look.before.error)
        rest = tuple(mistake for mistake in mistakes if not (mistake.fault.multiplies or mistake.fault.chaotic))
        tf32 = any(mistake.fault is TF32 for mistake in mistakes)
        if len(rest) == len(mistakes) or (near and not tf32):
            return near
        if not near and tf32 and not self._composed:
            return False
        # Of what the other mistakes leave, not of the whole: else any step would do beside a large mistake.
        without = look.judge(rest) if rest else look.before
        if fit.error <= leniency * _CHAOTIC * without.error:
            return True
        # One position with a massive activation is most of the whole, and one step that falls the other way most of it.
        most = fit.typical <= _CHAOTIC * without.typical and not tf32
        return most and fit.error <= leniency * _BETTER * without.error

    @functools.cached_property
    def _composed(self) -> bool:
        """Whether the stage is computed over others that were not dumped: what is rounded is then known but nearly."""
        return len(self._replay.undumped(self.site.key)) > 1

    @functools.cached_property
    def _all(self) -> _Look:
        return _Look(self._replay, self.site, self.located)

    @functools.cached_property
    def _some(self) -> _Look:
        columns = np.flatnonzero(
            dumped_tokens(self._replay.inputs, self.located.columns.get(self.site.key)).any(axis=0)
        )
        shape = self.located.theirs[self.site.key].shape
        per_position = max(1, math.prod(shape) // shape[position_axis(self.site.key)])
        count = int(np.clip(_SAMPLE_ELEMENTS // per_position, _FEWEST_POSITIONS, _MOST_POSITIONS))
        chosen = np.unique(np.linspace(0, len(columns) - 1, count).astype(int))
        return _Look(dataclasses.replace(self._replay, rows=columns[chosen]), self.site, self.located)


def _in_a_part(mistakes: Mistakes) -> bool:
    return any(mistake.within is not None for mistake in mistakes)


def _nearly(one: Mistakes, other: Mistakes, off: float = _ROUND) -> bool:
    """Whether these are the same mistakes but for solved numbers that are nearly the same."""
    return len(one) == len(other) and all(
        a.fault is b.fault
        and (a.within, a.layers) == (b.within, b.layers)
        and a.parameters.keys() == b.parameters.keys()
        and all(_same_value(value, b.parameters[name], off) for name, value in a.pairs)
        for a, b in zip(one, other, strict=True)
    )


def _same_value(a: object, b: object, off: float) -> bool:
    return math.isclose(a, b, rel_tol=off) if isinstance(a, float) and isinstance(b, float) else a == b


def _with_numbers_of(others: Mistakes, mistake: Mistake) -> Mistake:
    """A mistake with the solved numbers of the one among others that is the same fault."""
    same = {name: value for other in others if other.fault is mistake.fault for name, value in other.pairs}
    numbers = {name: value for name, value in same.items() if isinstance(value, float)}
    return mistake.having(**(mistake.parameters | numbers))
