"""The table of what engines do wrong in AdamW: a record for each mistake, which makes rules of the right one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from apr_jax.optimizer import rule as formulas
from apr_jax.optimizer.question import Question
from apr_jax.optimizer.rule import Rule, Vector
from apr_jax.optimizer.settings import KINDS, decay_of

Way = tuple[Mapping[str, Any], Rule]
"""What was solved for, for the sentence and for --json, and the rule that it makes."""


@dataclasses.dataclass(frozen=True)
class Mistake:
    """One mistake.

    Attributes:
      name: Its name.
      says: The sentence, with the names of what was solved for in braces.
      formula: What is computed in place of the right formula.
      ways: Makes the rules that it may be, of a rule that is right but for other mistakes.
      solved: How many numbers are solved for: of two mistakes that explain the same, the one with fewer is likelier.
      chaotic: Whether rounding decides, so that a tenth of the elements may be elsewhere.
    """

    name: str
    says: str
    formula: str
    ways: Callable[[Question, Rule], Iterator[Way]]
    solved: int = 0
    chaotic: bool = False


def _changed(**parts: Any) -> Callable[[Question, Rule], Iterator[Way]]:
    """The one way of a mistake that is another formula."""

    def ways(question: Question, base: Rule) -> Iterator[Way]:
        del question
        yield {}, base.change(**parts)

    return ways


def _rounder(number: float) -> list[float]:
    return [float(f"{number:.{digits}e}") for digits in (0, 1, 2, 3)]


def _decades(low: int, high: int, each: int = 3) -> list[float]:
    return np.logspace(low, high, (high - low) * each + 1).tolist()


# --- Moments and their correction ------------------------------------------------------------------------------------


def _uncorrected(question: Question, base: Rule) -> Iterator[Way]:
    del question
    for which, kept in (
        ("both moments are", (0, 0)),
        ("the first moment is", (0, 1)),
        ("the second moment is", (1, 0)),
    ):

        def corrections(beta1: float, beta2: float, step: int, kept: tuple[int, int] = kept) -> tuple[float, float]:
            first, second = formulas.corrections(beta1, beta2, step)
            return first if kept[0] else 1.0, second if kept[1] else 1.0

        yield {"which": which}, base.change(corrections=corrections)


def _step_off(question: Question, base: Rule) -> Iterator[Way]:
    del question
    for by, number in ((1, lambda step: step + 1), (-1, lambda step: max(step - 1, 1))):

        def corrections(
            beta1: float, beta2: float, step: int, number: Callable[[int], int] = number
        ) -> tuple[float, float]:
            return formulas.corrections(beta1, beta2, number(step))

        yield {"by": by}, base.change(corrections=corrections)


def _swapped(question: Question, base: Rule) -> Iterator[Way]:
    del question
    yield {}, base.change(betas=base.betas[::-1])


def _other_beta(question: Question, base: Rule) -> Iterator[Way]:
    grid = [0.0, 0.3, 0.5, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999, 0.9995, 0.9999, 0.99999]
    for at, name in enumerate(("beta1", "beta2")):

        def change(number: float, at: int = at) -> Rule:
            betas = list(base.betas)
            betas[at] = number
            return base.change(betas=tuple(betas))

        number = question.solve(change, grid, lambda beta: [1 - each for each in _rounder(1 - beta)])
        yield {"beta": name, "is": number}, change(number)


def _undamped(question: Question, base: Rule) -> Iterator[Way]:
    del question

    def first(m: Vector, v: Vector, g: Vector, beta1: float, beta2: float) -> tuple[Vector, Vector]:
        return beta1 * m + g, formulas.moments(m, v, g, beta1, beta2)[1]

    def both(m: Vector, v: Vector, g: Vector, beta1: float, beta2: float) -> tuple[Vector, Vector]:
        return beta1 * m + g, beta2 * v + g**2

    yield {"which": "the first moment"}, base.change(moments=first)
    yield {"which": "both moments"}, base.change(moments=both)


def _reset(m: Vector, v: Vector, g: Vector, beta1: float, beta2: float) -> tuple[Vector, Vector]:
    return formulas.moments(np.zeros_like(m), np.zeros_like(v), g, beta1, beta2)


def _of_one_step(beta1: float, beta2: float, step: int) -> tuple[float, float]:
    del step
    return formulas.corrections(beta1, beta2, 1)


# --- The step --------------------------------------------------------------------------------------------------------


def _eps_in_root(m: Vector, v: Vector, c1: float, c2: float, eps: float) -> Vector:
    return (m / c1) / np.sqrt(v / c2 + eps)


def _eps_before_correction(m: Vector, v: Vector, c1: float, c2: float, eps: float) -> Vector:
    return (m / c1) * np.sqrt(c2) / (np.sqrt(v) + eps)


def _root_missing(m: Vector, v: Vector, c1: float, c2: float, eps: float) -> Vector:
    return (m / c1) / (v / c2 + eps)


def _other_eps(question: Question, base: Rule) -> Iterator[Way]:
    number = question.solve(lambda eps: base.change(eps=eps), _decades(-12, -1), _rounder)
    yield {"eps": number}, base.change(eps=number)


def _first_moment_alone(question: Question, base: Rule) -> Iterator[Way]:
    del question
    yield {"which": "the first moment, corrected"}, base.change(direction=lambda m, v, c1, c2, eps: m / c1)
    yield {"which": "the first moment"}, base.change(direction=lambda m, v, c1, c2, eps: m)
    raw = base.change(direction=lambda m, v, c1, c2, eps: m, moments=lambda m, v, g, beta1, beta2: (g, v))
    yield {"which": "the gradient"}, raw


def _other_rate(question: Question, base: Rule) -> Iterator[Way]:
    def change(factor: float) -> Rule:
        return base.change(rates=tuple(factor * rate for rate in base.rates))

    sizes = _decades(-4, 4, 4)
    factor = question.solve(change, [*(-size for size in sizes[::-1]), *sizes], _rounder)
    uphill = "; the step goes uphill" if factor < 0 else ""
    first = factor * base.rates[0]
    yield {"factor": factor, "rate": first, "uphill": uphill}, change(factor)


def _schedule_off(question: Question, base: Rule) -> Iterator[Way]:
    del question
    rates = base.rates
    if len(rates) < 2:
        return
    for beyond in dict.fromkeys((rates[-1], max(0.0, 2 * rates[-1] - rates[-2]), 0.0)):
        yield {"by": "ahead"}, base.change(rates=(*rates[1:], beyond))
    for before in dict.fromkeys((0.0, rates[0], max(0.0, 2 * rates[0] - rates[1]))):
        yield {"by": "behind"}, base.change(rates=(before, *rates[:-1]))


def _other_count(question: Question, base: Rule) -> Iterator[Way]:
    del question
    rates = base.rates
    for count in (len(rates) - 1, len(rates) + 1, 2 * len(rates)):
        if count:
            more = rates * 2 if count == 2 * len(rates) else (*rates, rates[-1])
            yield {"steps": count}, base.change(rates=more[:count])


# --- Decay -----------------------------------------------------------------------------------------------------------


def _into_moments(question: Question, base: Rule) -> Iterator[Way]:
    del question

    def inputs(gradient: Vector, parameters: Vector, decay: Vector) -> Vector:
        return gradient + decay * parameters

    yield {"also": ""}, base.change(inputs=inputs, applied=lambda p, d, rate, decay: p - rate * d)
    yield {"also": ", and is taken off the parameters as well"}, base.change(inputs=inputs)


def _unscaled(question: Question, base: Rule) -> Iterator[Way]:
    del question
    yield (
        {"by": "it is not multiplied by the learning rate"},
        base.change(applied=lambda p, d, rate, decay: p - rate * d - decay * p),
    )
    peak = max(base.rates)
    yield (
        {"by": "it is multiplied by the highest rate and not by that of the step"},
        base.change(applied=lambda p, d, rate, decay: p - rate * d - peak * decay * p),
    )


def _kinds(question: Question, base: Rule) -> Iterator[Way]:
    """Solves for the decay of each kind of parameter: nothing, or what was asked for of the others."""
    full = question.settings.weight_decay
    if not full:
        return
    bare, gradients = question.replay(base.change(decay=np.zeros_like(base.decay)))
    allowance = question.allowance(base, gradients)
    asked, decays = decay_of(question.settings), {}
    for kind in KINDS:
        one = question.layout.per_kind({each: full if each == kind else 0.0 for each in KINDS})
        effect = (base.change(decay=one).run(question.start, lambda step, _: gradients[step]) - bare) / allowance
        off = np.clip((question.theirs - bare) / allowance, -1e3, 1e3)
        seen = float(effect @ effect)
        # Of what is not seen nothing can be said.
        decays[kind] = asked[kind] if seen < _SEEN else full * float(effect @ off / seen > 0.5)
    if decays != asked:
        said = [kind for kind in KINDS if decays[kind]]
        wanted = [kind for kind in KINDS if asked[kind]]
        yield (
            {"on": ", ".join(said) or "nothing", "asked": ", ".join(wanted)},
            base.change(decay=question.layout.per_kind(decays)),
        )


_SEEN = 10.0


def _other_decay(question: Question, base: Rule) -> Iterator[Way]:
    unit = (base.decay > 0).astype(np.float64) if base.decay.any() else np.ones_like(base.decay)
    sizes = _decades(-5, 1)
    number = question.solve(
        lambda decay: base.change(decay=decay * unit), [*(-size for size in sizes[::-1]), 0.0, *sizes], _rounder
    )
    yield {"decay": number}, base.change(decay=number * unit)


# --- Gradients -------------------------------------------------------------------------------------------------------


def _scaled(question: Question, base: Rule) -> Iterator[Way]:
    def change(factor: float) -> Rule:
        return base.change(taken=lambda found: base.taken(found) * factor)

    factor = question.solve(change, _decades(-6, 6), _rounder)
    yield {"factor": factor}, change(factor)


def _clipped(question: Question, base: Rule) -> Iterator[Way]:
    _, gradients = question.expected
    norms = [float(np.linalg.norm(gradient)) for gradient in gradients]
    parts = list(question.layout.slices.values())

    def by_tensor(norm: float) -> Rule:
        def taken(found: Sequence[Vector]) -> Vector:
            return np.concatenate([formulas.clipped(norm)([found[-1][part]]) for part in parts])

        return base.change(taken=taken)

    for of, change, high in (
        ("norm over all parameters", lambda norm: base.change(taken=formulas.clipped(norm)), max(norms)),
        ("norm of each parameter alone", by_tensor, max(norms)),
        (
            "absolute value",
            lambda most: base.change(taken=lambda found: np.clip(found[-1], -most, most)),
            max(float(np.abs(gradient).max()) for gradient in gradients),
        ),
    ):
        number = question.solve(change, (high * np.logspace(-6, 0, 25)).tolist(), _rounder)
        yield {"of": of, "most": number}, change(number)


def _not_clipped(question: Question, base: Rule) -> Iterator[Way]:
    if question.settings.clip_norm is not None:
        yield {"norm": question.settings.clip_norm}, base.change(taken=formulas.last)


def _accumulated(found: Sequence[Vector]) -> Vector:
    return np.sum(found, axis=0)


def _stale(found: Sequence[Vector]) -> Vector:
    return found[-2] if len(found) > 1 else found[-1]


# --- Parameters ------------------------------------------------------------------------------------------------------


def _not_moved(question: Question, base: Rule) -> Iterator[Way]:
    slices = question.layout.slices
    still = [name for name, part in slices.items() if (question.theirs[part] == question.start[part]).all()]
    if not still:
        return
    moves = base.moves.copy()
    for name in still:
        moves[slices[name]] = False
    said = ", ".join(still[:3]) + (f" and {len(still) - 3} more" if len(still) > 3 else "")
    yield (
        {"parameters": said if len(still) < len(slices) else "all of them", "count": len(still)},
        base.change(moves=moves),
    )


def _rounded(question: Question, base: Rule) -> Iterator[Way]:
    del question
    for dtype in ("bfloat16", "float16"):
        kind = np.float16 if dtype == "float16" else ml_dtypes.bfloat16
        yield (
            {"dtype": dtype},
            base.change(kept=lambda p, kind=kind: p.astype(np.float32).astype(kind).astype(np.float64)),
        )


MISTAKES: tuple[Mistake, ...] = (
    Mistake(
        "adamw-bias-correction", "{which} not corrected for having begun at 0", "m, not m / (1 - beta1^t)", _uncorrected
    ),
    Mistake(
        "adamw-step-off-by-one",
        "the step counter of the bias correction is off by {by:+d}",
        "1 - beta^(t+1), or 1 - beta^max(t-1, 1)",
        _step_off,
    ),
    Mistake("adamw-betas-swapped", "beta1 and beta2 are swapped", "m = beta2 m + (1 - beta2) g", _swapped),
    Mistake("adamw-beta", "{beta} is {is:.6g}", "another beta", _other_beta, solved=1),
    Mistake(
        "adamw-moment-undamped",
        "the gradient goes into {which} whole, without the factor 1 - beta",
        "m = beta1 m + g",
        _undamped,
    ),
    Mistake(
        "adamw-state-lost",
        "the moments begin anew at every step",
        "m = v = 0, t = 1 at each step",
        _changed(moments=_reset, corrections=_of_one_step),
    ),
    Mistake("adamw-eps-in-root", "eps is added inside the root", "m / sqrt(v + eps)", _changed(direction=_eps_in_root)),
    Mistake(
        "adamw-eps-before-correction",
        "eps is added to the root before the bias correction",
        "m sqrt(1 - beta2^t) / (sqrt(v) + eps)",
        _changed(direction=_eps_before_correction),
    ),
    Mistake("adamw-eps", "eps is {eps:.3g}", "another eps", _other_eps, solved=1),
    Mistake(
        "adamw-root-missing",
        "the step is divided by the second moment, not by its root",
        "m / (v + eps)",
        _changed(direction=_root_missing),
    ),
    Mistake(
        "adamw-momentum-only",
        "the step is {which}, which no second moment divides",
        "p - rate m",
        _first_moment_alone,
    ),
    Mistake(
        "adamw-lr",
        "the learning rate is {factor:.4g} times what was asked for ({rate:.4g} at the first step){uphill}",
        "another rate",
        _other_rate,
        solved=1,
    ),
    Mistake(
        "adamw-schedule-off-by-one",
        "the learning rates are one step {by}",
        "rate of step t + 1, or t - 1",
        _schedule_off,
    ),
    Mistake("adamw-steps", "{steps} steps were taken", "another number of steps", _other_count),
    Mistake(
        "adamw-decay-in-moment",
        "weight decay is added to the gradient and goes through the moments (L2 in place of decoupled decay){also}",
        "g + decay p",
        _into_moments,
    ),
    Mistake(
        "adamw-decay-on-norms",
        "weight decay acts on {on}; it was asked for on {asked}",
        "decay of the wrong parameters",
        _kinds,
    ),
    Mistake("adamw-decay-unscaled", "weight decay: {by}", "p - rate d - decay p", _unscaled),
    Mistake("adamw-weight-decay", "weight decay is {decay:.4g}", "another decay", _other_decay, solved=1),
    Mistake(
        "adamw-gradient-scaled", "gradients are {factor:.4g} times what they should be", "factor g", _scaled, solved=1
    ),
    Mistake(
        "adamw-gradient-clipped",
        "gradients are clipped: {of} at most {most:.4g}",
        "g min(1, most / |g|)",
        _clipped,
        solved=1,
    ),
    Mistake("adamw-gradient-not-clipped", "gradients are not clipped to the norm {norm:g}", "g", _not_clipped),
    Mistake(
        "adamw-gradient-accumulated",
        "gradients are added to those of the steps before: they are not set to zero",
        "sum of all g so far",
        _changed(taken=_accumulated),
    ),
    Mistake(
        "adamw-gradient-stale", "gradients are those of the step before", "g of step t - 1", _changed(taken=_stale)
    ),
    Mistake("adamw-not-moved", "parameters are as they were before: {parameters}", "p", _not_moved),
    Mistake(
        "adamw-weights-rounded", "parameters are kept in {dtype} between steps", "round(p)", _rounded, chaotic=True
    ),
)
