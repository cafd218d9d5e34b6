"""Several mistakes behind a long gap, found where fewest of them show: at the first tokens of each row.

At the very first one attention has one key, whose share is 1 whatever q, k, mask and rotation are. So what explains it
is looked for there, and what is made of q and k afterwards, beside it, at some tokens more. Rows of few tokens are
computed in no time, so that many sets can be tried; those that explain them are judged at all positions then.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from apr_jax.parity import undumped
from apr_jax.parity.faults.record import Mistake, Mistakes
from apr_jax.parity.question import Question
from apr_jax.parity.replay import Replay
from apr_jax.trace.inputs import Inputs
from apr_jax.trace.positions import gather_positions
from apr_jax.trace.stages import Key

_TOKENS = 16
"""As many tokens tell what is made of q and k."""
_KEPT = 4
"""How many of the best sets are built on."""
_ROUNDING = 30.0
"""How many times the least difference that counts a set may leave where it explains these tokens."""
_NO_EFFECT = 1e-9
_MOST, _MOST_AT_FIRST = 4, 2
"""As many mistakes are made together, and as many of them show at the first token."""

Solved = Callable[[Question], Iterator[Mistakes]]


def hypotheses(question: Question, plain: Sequence[Mistakes], solved: Solved) -> Iterator[Mistakes]:
    """Yields the sets of mistakes that explain the first tokens of each row.

    Args:
      question: The dumped stage behind the gap.
      plain: What the table has for the gap, one mistake each, without numbers to solve for.
      solved: Gives mistakes with numbers, solved for beside those that a question has as given.
    """
    first, some = _beginning(question, 1), _beginning(question, _TOKENS)
    if first is None or some is None or not (whole := some.misfit(())):
        return
    bases: list[Mistakes] = _explaining(first, plain, solved) if first.shares() > first.nothing else [()]
    left = {base: some.misfit(base) / whole for base in bases}
    while bases:
        if good := [base for base in bases if some.shares(base) <= _ROUNDING * some.nothing]:
            yield from itertools.chain.from_iterable(_solved_again(question, base) for base in good)
            return
        left = {
            made: share
            for base in bases
            if len(base) < _MOST
            for made, share in _beside(some, base, plain, solved, whole)
        }
        bases = _best(left)


def _beginning(question: Question, length: int) -> Question | None:
    """The question about the first tokens of each row, as if there were no others; None where that cannot be asked."""
    replay, tokens = question.replay, question.tokens
    length = min(length, int(tokens.sum(axis=1).min()))
    columns = np.argmax(tokens, axis=1)[:, None] + np.arange(length)
    shapes = {value.shape[1] for key, value in replay.theirs.items() if not Key(key).per_pair}
    outside = not length or (columns >= tokens.shape[1]).any()
    if outside or shapes != {tokens.shape[1]} or any(Key(key).per_pair for key in replay.theirs):
        return None
    if (np.take_along_axis(replay.inputs.positions(), columns, axis=1) != np.arange(length)).any():
        return None
    inputs = Inputs.of(np.take_along_axis(replay.inputs.input_ids, columns, axis=1), np.ones_like(columns, np.int32))
    theirs = {key: gather_positions(key, value, columns) for key, value in replay.theirs.items()}
    right = gather_positions(question.key, question.right, columns)
    few = Replay(replay.config, replay.parameters, inputs, theirs)
    seen = (few, few, question.key, theirs[question.key], right, inputs.attention_mask == 1)
    return Question(*seen, dtype=question.dtype)


def _explaining(first: Question, plain: Sequence[Mistakes], solved: Solved) -> list[Mistakes]:
    """The fewest mistakes that explain the first tokens: all sets that do."""
    whole = first.misfit(())
    left = dict(_beside(first, (), plain, solved, whole))
    showing = [stack for stack in plain if stack in left]
    for _ in range(_MOST_AT_FIRST - 1):
        if good := [base for base in _best(left) if first.shares(base) <= _ROUNDING * first.nothing]:
            return good
        left = {made: share for base in _best(left) for made, share in _beside(first, base, showing, solved, whole)}
    return [base for base in _best(left) if first.shares(base) <= _ROUNDING * first.nothing]


def _beside(
    question: Question, base: Mistakes, plain: Sequence[Mistakes], solved: Solved, whole: float
) -> Iterator[tuple[Mistakes, float]]:
    """What one mistake more leaves, of those that change anything."""
    given = dataclasses.replace(question, given=base)
    before, names = given.misfit(()), {mistake.name for mistake in base}
    for stack in itertools.chain(plain, solved(given)):
        if stack[0].name not in names:
            share = given.misfit(stack)
            if np.isfinite(share) and abs(share - before) > _NO_EFFECT * whole:
                yield base + stack, share / whole


def _best(left: Mapping[Mistakes, float]) -> list[Mistakes]:
    """The sets that leave least, each with one number of those that leave about as little: the first, a round one."""
    ordered = sorted(left, key=lambda stack: float(f"{left[stack]:.1e}"))
    different: dict[frozenset[Mistake], Mistakes] = {}
    for stack in ordered:
        different.setdefault(frozenset(map(_without_numbers, stack)), stack)
    return list(different.values())[:_KEPT]


def _without_numbers(mistake: Mistake) -> Mistake:
    return mistake.having(**{name: value for name, value in mistake.pairs if not isinstance(value, float)})


def _solved_again(question: Question, stack: Mistakes) -> Iterator[Mistakes]:
    """A set as it is, and with each number solved for at all positions, beside the others."""
    yield stack
    for place, mistake in enumerate(stack):
        grid = mistake.fault.grid
        if grid is not None and grid.parameter in mistake.parameters:
            others = (*stack[:place], *stack[place + 1 :])
            given = dataclasses.replace(question, given=others)
            yield from ((*others, again) for again in undumped.solve_near(given, mistake))
