"""Which mistakes may be behind a wrong stage: sets of them from the table of faults, fewest first.

A mistake may have been made at the stage itself or, where stages before it were not dumped (fused kernels), at one of
those: it is then looked for at the first dumped stage behind it. Its parameters are read off the values of a dumped
stage, enumerated, or solved for by how well the dumped stage is reproduced. Sets are built up from those mistakes that
leave least. Whether a hypothesis is true is for `search` to find out.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any, NamedTuple

import numpy as np

from apr_jax.parity import behind, confined, joint, undumped
from apr_jax.parity.faults.products import MULTIPLIED
from apr_jax.parity.faults.record import Fault, Mistake, Mistakes
from apr_jax.parity.faults.table import FAULTS
from apr_jax.parity.localise import CLASS_OF, EPSILON
from apr_jax.parity.question import Question
from apr_jax.trace.stages import Key

_LONG = 12
"""Behind a gap of as many stages (layer outputs, logits alone) only the sets that leave least are built on."""
_KEPT = 8
"""How many of the best sets are built on."""
_KEPT_WEIGHTS = 32
"""How many of the best mistakes of weights and products are made beside others."""
_LIKE, _MOST_SOLVED = 0.98, 3
"""Of mistakes with a number the likest are solved for in single layers."""
_MOST, _MOST_BEHIND_LONG = 3, 4
"""As many mistakes are stacked before one dumped stage."""
_PROMISING, _MOST_PROMISING = 0.3, 100
"""The least cosine between what a mistake is expected to change and the difference, and how many are made whole."""
_NO_EFFECT = 1e-9
"""A mistake that changes less than this share of the difference cannot be seen at the stage."""
FEW_BITS = 2.0**-12
"""Rounding above this hides what single values would tell."""
_CLEARLY = 0.3
"""One mistake more has to leave less than this share of what was left without it."""


class Came(NamedTuple):
    """How near a hypothesis came.

    Attributes:
      left: What share of the difference it leaves.
      unlike: What share is left if what it changes may be taken any number of times: a mistake of one layer is like
        the same one made in all of them, and not as large.
    """

    left: float
    unlike: float


_NOWHERE = Came(np.inf, np.inf)


def hypotheses(
    question: Question, came: Mapping[Mistakes, Came], accepted: Sized = (), sure: Sequence[Mistakes] = ()
) -> Iterator[Mistakes]:
    """Yields the hypotheses about a wrong stage.

    Args:
      question: The stage.
      came: How near each hypothesis so far came; filled in between.
      accepted: Those that explain the stage so far; filled in between.
      sure: Those of them that leave nothing but rounding of a large difference: only what is of their kind is tried
        after them.
    """
    gap = question.nodes[:-1]
    own = list(_own(question))
    yield from (stack for stack in own if len(stack) == 1)
    before = [(mistake,) for node in gap for (mistake,) in _singles(question, node)]
    # Mistakes of weights are many: the others are likelier, and tried first.
    plain, numerical = ([s for s in dict.fromkeys(before) if _is_numerical(s[0]) == kind] for kind in (False, True))
    before = [*plain, *numerical]
    yield from plain
    if not sure:
        yield from _promising(question, numerical)
    if not sure:
        yield from _solved(question, gap)
    staged = list(_at_one_stage(question, plain))
    if not accepted:
        yield from staged
    if not accepted:
        yield from _likeliest_of_one_layer(question, gap, [*before, *staged])
    if not sure or _has_number(sure):
        yield from behind.hypotheses(question, explained=bool(accepted))
    if not accepted:
        yield from _in_one_layer(question, gap, [*before, *staged], came, sure)
    longer = [stack for stack in own if len(stack) > 1]
    if question.parts():
        yield from longer
        # What is rounded in each part may be too little to be looked into there.
        yield from multiplications(question)
    # In few bits what is made in a part may look like another mistake, about as well.
    if not accepted or EPSILON[question.dtype] > FEW_BITS:
        yield from confined.hypotheses(question, lambda part: _singles(part, part.nodes[-1]), before)
    if gap:
        yield from _together(question)
    if len(gap) >= _LONG and not accepted:
        beside = [stack for stack in plain if not stack[0].fault.alone]
        yield from joint.hypotheses(question, beside, lambda at: _solved(at, gap, _MOST_SOLVED))
    yield from sorted(longer, key=len)
    singles = dict.fromkeys(stack for stack in (*own, *before) if len(stack) == 1)
    yield from _stacked(question, gap, list(singles), [stack for stack in before if stack in singles], came, sure)


def multiplications(question: Question) -> list[Mistakes]:
    """Returns the ways of multiplying less precisely that the table has for a stage."""
    ways = (
        fault.made(**each)
        for fault in FAULTS.values()
        if fault.multiplies
        for each in fault.variants(question, question.nodes[-1])
    )
    return [(mistake,) for mistake in ways if question.stage in mistake.stages(question.replay)]


def _is_numerical(mistake: Mistake) -> bool:
    return mistake.fault.in_weights or mistake.fault.multiplies


def _own(question: Question) -> Iterator[Mistakes]:
    """What may have been made at the dumped stage itself; parts that are computed apart may each have their own."""
    if parts := question.parts():
        # What was not dumped before the parts is computed apart, too.
        yield tuple(dict.fromkeys(mistake for part in parts for mistake in _of_part(part)))
        return
    yield from filter(None, _singles(question, question.nodes[-1]))


def _singles(question: Question, node: Key) -> Iterator[Mistakes]:
    """What the table has for a stage, one mistake each but where a solver finds several together."""
    own = node == question.nodes[-1]
    solvers = {mistake.fault.solve for mistake in question.given}
    for fault in FAULTS.values():
        if not _may_be_made(fault, node) or (own and _too_small_or_large(fault, question)):
            continue
        if own and fault.solve:
            if fault.solve not in solvers:
                solvers.add(fault.solve)
                yield from fault.solve(question)
        else:
            whole = (parameters for parameters in fault.variants(question, node) if not _is_open(fault, parameters))
            yield from ((fault.made(**parameters),) for parameters in whole)


def _is_open(fault: Fault, parameters: Mapping[str, Any]) -> bool:
    """Whether a fault lacks its number, which is to be solved for."""
    return fault.grid is not None and fault.grid.parameter not in parameters


def _too_small_or_large(fault: Fault, question: Question) -> bool:
    return question.stage in MULTIPLIED and fault.slight not in (None, question.slight)


def _may_be_made(fault: Fault, node: Key) -> bool:
    # Where a function tells the stages, the variants are none at others.
    return callable(fault.stages) or node.stage in fault.stages


def _of_part(question: Question) -> Mistakes:
    """The mistakes that come nearest to one part of a stage; one more has to come clearly nearer."""
    chosen: Mistakes = ()
    least = question.misfit(())
    if question.shares() < question.nothing:
        return chosen
    nodes = [node for node in question.nodes if node.stage in ("qkv_matmul", question.stage)]
    singles = sorted(_misfits(question, nodes), key=lambda pair: pair[0])[:_MOST]
    if singles and singles[0][0] < _CLEARLY * least:
        least, chosen = singles[0]
    if question.shares(chosen) < question.nothing:
        return chosen
    for _, base in singles:
        given = dataclasses.replace(question, given=question.given + base)
        for misfit, stack in _misfits(given, nodes):
            if misfit < _CLEARLY * least or (len(chosen) == 2 and misfit < least):
                least, chosen = misfit, base + stack
    return chosen


def _misfits(question: Question, nodes: Sequence[Key]) -> Iterator[tuple[float, Mistakes]]:
    for node in nodes:
        for stack in _singles(question, node):
            misfit = question.misfit(stack)
            if np.isfinite(misfit):
                yield misfit, stack


def _solved(question: Question, gap: Sequence[Key], most: int | None = None) -> Iterator[Mistakes]:
    """Mistakes behind the gap with a number: a base, an eps or a scale that reproduces the dumped stage best; the
    likest `most` of them, or all that are like what there is to explain."""
    made = {mistake.fault for mistake in question.given}
    bases = [base for base in _with_numbers(question, gap) if base.fault not in made]
    for base in _likest(question, bases, most):
        yield from ((mistake,) for mistake in undumped.solve(question, base))


def _likest(question: Question, bases: Sequence[Mistake], most: int | None) -> list[Mistake]:
    """Those mistakes with a number that change what there is to explain, the likest first."""
    angles = {base: float(f"{undumped.unlike(question, base):.2e}") for base in bases}
    return sorted((base for base in bases if angles[base] < _LIKE), key=angles.__getitem__)[:most]


def _with_numbers(question: Question, gap: Sequence[Key]) -> list[Mistake]:
    """The faults in a gap that have a number to solve for, without it."""
    found: dict[Mistake, None] = {}
    for node in gap:
        for fault in FAULTS.values():
            if fault.grid is not None and _may_be_made(fault, node):
                variants = (each for each in fault.variants(question, node) if _is_open(fault, each))
                found |= dict.fromkeys(fault.made(**each) for each in variants)
    return list(found)


def _has_number(stacks: Sequence[Mistakes]) -> bool:
    """Whether a mistake has a number, as a factor of a stage or a part of one has."""
    return any(isinstance(value, float) for stack in stacks for mistake in stack for _, value in mistake.pairs)


def _promising(question: Question, stacks: Sequence[Mistakes]) -> list[Mistakes]:
    """Those that are expected to change what there is to explain, the likest first; all where that is not known."""
    response = question.response
    if response is None:
        return list(stacks)
    likeness = {stack: response.likeness(stack[0]) for stack in stacks}
    likely = (stack for stack in stacks if likeness[stack] > _PROMISING)
    return sorted(likely, key=lambda stack: -likeness[stack])[:_MOST_PROMISING]


def _at_one_stage(question: Question, plain: Sequence[Mistakes]) -> Iterator[Mistakes]:
    """Mistakes that can be made at several stages of one kind, made at one of them: one of a layer's two norms."""
    inside = {node.stage for node in question.nodes}
    for (mistake,) in plain:
        stages = [stage for stage in mistake.stages(question.replay) if stage in inside]
        if len(stages) > 1 and len({CLASS_OF[stage] for stage in stages}) == 1 and not mistake.fault.alone:
            yield from ((mistake.at(stage),) for stage in stages)


def _likeliest_of_one_layer(question: Question, gap: Sequence[Key], before: Sequence[Mistakes]) -> Iterator[Mistakes]:
    """Mistakes of one layer of several that are expected to change what there is to explain, the likest first."""
    layers, response = sorted({node.layer for node in gap if node.layer is not None}), question.response
    if len(layers) < 2 or response is None:
        return
    likeness: dict[Mistake, float] = {}
    for (mistake,) in before:
        for layer, moved in response.of(mistake).items():
            if layer is not None:
                likeness[mistake.in_layers(layer)] = float(response.predicted(moved).cosine)
    likely = sorted((made for made in likeness if likeness[made] > _PROMISING), key=lambda made: -likeness[made])
    yield from ((mistake,) for mistake in likely[:_MOST_PROMISING])
    numbers: dict[Mistake, float] = {}
    for base in _with_numbers(question, gap):
        for made in undumped.some(base):
            for layer, moved in response.of(made).items():
                here = base.in_layers(layer)
                numbers[here] = max(numbers.get(here, 0.0), float(response.predicted(moved).cosine))
    likely = sorted((made for made in numbers if numbers[made] > _PROMISING), key=lambda made: -numbers[made])
    for base in likely[:_MOST_SOLVED]:
        yield from ((mistake,) for mistake in undumped.solve(question, base))


def _in_one_layer(
    question: Question,
    gap: Sequence[Key],
    before: Sequence[Mistakes],
    came: Mapping[Mistakes, Came],
    sure: Sequence[Mistakes],
) -> Iterator[Mistakes]:
    """Mistakes made in one layer of a gap of several, those first that are likest where all layers make them."""
    layers = sorted({node.layer for node in gap if node.layer is not None})
    if len(layers) < 2:
        return
    likest = sorted(before, key=lambda stack: float(f"{came.get(stack, _NOWHERE).unlike:.2e}"))
    for numerical in (False, True) if question.response is None else (False,):
        for (mistake,) in (stack for stack in likest if _is_numerical(stack[0]) == numerical):
            for layer in layers:
                if not sure or _is_like(mistake, layer, sure):
                    yield (mistake.in_layers(layer),)
        if not numerical and not sure and question.response is None:
            bases = [base.in_layers(layer) for base in _with_numbers(question, gap) for layer in layers]
            for base in _likest(question, bases, _MOST_SOLVED):
                yield from ((mistake,) for mistake in undumped.solve(question, base))


def _is_like(mistake: Mistake, layer: int, sure: Sequence[Mistakes]) -> bool:
    """Whether a mistake of one layer may give the same values as what surely explains them."""
    return any(
        other.layers == (layer,) and _is_numerical(other) == _is_numerical(mistake) for stack in sure for other in stack
    ) or any(other.fault is mistake.fault for stack in sure for other in stack)


def _together(question: Question) -> Iterator[Mistakes]:
    """Every variant of one kind in the gap and at the stage itself: all of its weights by one codec."""
    response = question.response
    for fault in (fault for fault in FAULTS.values() if fault.together):
        found: dict[str, list[Mistake]] = {}
        for parameters in itertools.chain.from_iterable(fault.variants(question, node) for node in question.nodes):
            found.setdefault(parameters[fault.together], []).append(fault.made(**parameters))
        together = [tuple(mistakes) for mistakes in found.values() if len(mistakes) > 1]
        yield from (stack for stack in together if response is None or response.likeness(*stack) > _PROMISING)


def _stacked(
    question: Question,
    gap: Sequence[Key],
    singles: Sequence[Mistakes],
    before: Sequence[Mistakes],
    came: Mapping[Mistakes, Came],
    sure: Sequence[Mistakes],
) -> Iterator[Mistakes]:
    """Two mistakes, then more on the best of them; what is solved for is solved for beside the others."""

    def leaves(stack: Mistakes) -> float:
        # To three digits: among those that come as near, a cut shall not hang on the last bits.
        return float(f"{came.get(stack, _NOWHERE).left:.2e}")

    seen = [s for s in singles if abs(came.get(s, _NOWHERE).left - 1) > _NO_EFFECT and not s[0].fault.alone]
    plain = [stack for stack in seen if not _is_numerical(stack[0])]
    near = sorted((stack for stack in seen if _is_numerical(stack[0]) and leaves(stack) < 1), key=leaves)
    long = len(gap) >= _LONG
    bases = sorted([*plain, *near], key=leaves)[:_KEPT] if long else [*plain, *near[: 0 if gap else _KEPT]]
    numerical = sorted((stack for stack in before if stack in seen and _is_numerical(stack[0])), key=leaves)
    others = [*(stack for stack in before if stack in plain), *numerical[: _KEPT if long else _KEPT_WEIGHTS]]
    longer: list[Mistakes] = []
    for count in range(2, (_MOST_BEHIND_LONG if long else _MOST) + 1):
        made: dict[frozenset[Mistake], Mistakes] = {}
        longer = [stack for stack in longer if len(stack) > count]
        for base in bases:
            if sure:
                return
            given = dataclasses.replace(question, given=base)
            behind = [(*base, *stack) for stack in _own(given) if stack]
            longer += [stack for stack in behind if len(stack) > count]
            beside = ((*base, *other) for other in others)
            solved = ((*base, *stack) for stack in _solved(given, gap, _MOST_SOLVED if long else None))
            for stack in itertools.chain(behind, beside, solved):
                if len({mistake.name for mistake in stack}) == count and frozenset(stack) not in made:
                    made[frozenset(stack)] = stack
                    yield stack
        yield from (stack for stack in longer if len(stack) == count + 1)
        bases = sorted((stack for stack in made.values() if leaves(stack) < 1), key=leaves)[:_KEPT]
