"""Several mistakes behind a long gap, found where fewest of them show: at the first token of each row.

There attention has one key, whose share is 1 whatever q, k, mask and rotation are. So what explains the first tokens is
looked for first, and what is made of q and k afterwards, beside it, at all positions.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from typing import Any

import numpy as np

from apr_jax.parity.faults.record import Mistakes
from apr_jax.parity.question import Question

_KEPT = 6
"""How many of the best sets are built on."""
_EXPLAINED = 0.05
"""What a set leaves at most of the difference at the first tokens."""
_ALIKE = 3.0
"""How many times what the best one leaves others may leave."""
_NO_EFFECT = 1e-9
_MOST = 4
"""As many mistakes are made together."""

Solved = Callable[[Question], Iterator[Mistakes]]


def hypotheses(
    question: Question, plain: Sequence[Mistakes], solved: Solved, came: Mapping[Mistakes, Any], accepted: Sized
) -> Iterator[Mistakes]:
    """Yields sets of mistakes that explain the first tokens, with others beside them.

    Args:
      question: The dumped stage behind the gap.
      plain: What the table has for the gap, one mistake each, without numbers to solve for.
      solved: Gives mistakes with numbers, solved for beside those that a question has as given.
      came: How near each hypothesis so far came (`hypotheses.Came`); filled in between.
      accepted: Those that explain the stage so far; filled in between.
    """
    first = _at_first_tokens(question)
    if question.key.per_pair or first.shares() < first.nothing:
        return
    bases = _explaining(first, plain, solved)
    yield from (base for base in bases if len(base) > 1)
    while bases and not accepted and len(bases[0]) < _MOST:
        made: dict[Mistakes, float] = {}
        for base in bases:
            given = dataclasses.replace(question, given=base)
            names = {mistake.name for mistake in base}
            for stack in itertools.chain(plain, solved(given)):
                if stack[0].name not in names and (together := base + stack) not in made:
                    yield together
                    made[together] = came[together].left if together in came else np.inf
        bases = sorted(made, key=lambda stack: float(f"{made[stack]:.2e}"))[:_KEPT]


def _at_first_tokens(question: Question) -> Question:
    """The question about the first token of each row alone."""
    columns = np.argmax(question.tokens, axis=1)
    tokens = np.zeros_like(question.tokens)
    tokens[np.arange(len(tokens)), columns] = question.tokens.any(axis=1)
    probe = dataclasses.replace(question.replay, rows=np.unique(columns))
    return dataclasses.replace(question, tokens=tokens, probe=probe)


def _explaining(first: Question, plain: Sequence[Mistakes], solved: Solved) -> list[Mistakes]:
    """The fewest mistakes that explain the first tokens: the sets that leave about as little as the best one."""
    whole = first.misfit(())
    left = {stack: first.misfit(stack) / whole for stack in plain}
    shown = {stack: share for stack, share in left.items() if abs(share - 1) > _NO_EFFECT and np.isfinite(share)}
    shown |= {stack: first.misfit(stack) / whole for stack in solved(first)}
    bases: list[Mistakes] = sorted(shown, key=lambda stack: shown[stack])
    singles = [stack for stack in bases if not stack[0].fault.alone]
    for _ in range(2):
        if (good := _alike(shown)) or not bases:
            return good
        made: dict[Mistakes, float] = {}
        for base in bases[:_KEPT]:
            given = dataclasses.replace(first, given=base)
            for stack in itertools.chain(singles, solved(given)):
                if stack[0].name not in {mistake.name for mistake in base}:
                    made[base + stack] = given.misfit(stack) / whole
        shown, bases = made, sorted(made, key=lambda stack: made[stack])
    return _alike(shown)


def _alike(left: Mapping[Mistakes, float]) -> list[Mistakes]:
    """The sets that explain, the best first; of one set in two orders the first."""
    least = min(left.values(), default=np.inf)
    good = [stack for stack, share in left.items() if share <= min(_EXPLAINED, _ALIKE * least)]
    once = {frozenset(stack): stack for stack in sorted(good, key=lambda stack: -left[stack])}
    return sorted(once.values(), key=lambda stack: left[stack])[:_KEPT]
