"""Holds another engine's parameters after some steps of AdamW against ours, and names what is wrong with its steps.

All that is needed is what every engine can show: its parameters. A mistake is named only if AdamW with that mistake,
replayed in float64 from the parameters before along its own way, ends where the engine did.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from apr_jax.converters.checkpoint.checkpoint import Checkpoint
from apr_jax.converters.errors import DumpError
from apr_jax.converters.formats.dtypes import DType
from apr_jax.model.language_model import LanguageModel
from apr_jax.model.parameters import named
from apr_jax.model.sharding import to_host
from apr_jax.optimizer.mistakes import MISTAKES
from apr_jax.optimizer.question import Fit, Question
from apr_jax.optimizer.reference import gradients_at
from apr_jax.optimizer.rule import Rule, Vector
from apr_jax.optimizer.settings import Layout, Settings
from apr_jax.trace.inputs import Inputs

_DEEPEST = 2  # mistakes at once
_STACKED = 6  # mistakes that a second one is tried beside: those that leave least


@dataclasses.dataclass(frozen=True)
class Named:
    """A mistake of an engine.

    Attributes:
      name: Its name in the table; "unknown", or "not-finite".
      says: The same as a sentence.
      numbers: What was solved for.
    """

    name: str
    says: str
    numbers: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How another engine's parameters compare with ours.

    Attributes:
      parameters: How many tensors were compared.
      elements: And how many elements.
      right: How near the right steps come to them.
      mistakes: What is wrong; nothing if nothing is.
      alternatives: Other mistakes that explain the same.
      explained: How near the steps with the mistakes come to them; as `right` where there are none.
    """

    parameters: int
    elements: int
    right: Fit
    mistakes: tuple[Named, ...]
    alternatives: tuple[tuple[Named, ...], ...]
    explained: Fit

    @property
    def within(self) -> bool:
        """Whether nothing is wrong."""
        return not self.mistakes

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as JSON values."""
        return {
            "within": self.within,
            "parameters": self.parameters,
            "elements": self.elements,
            "step_error": self.right.error,
            "worst": {"parameter": self.right.where, "times_allowance": self.right.worst},
            "mistakes": [vars(mistake) for mistake in self.mistakes],
            "alternatives": [[vars(mistake) for mistake in others] for others in self.alternatives],
            "explained_to": self.explained.error,
        }


def check(
    exact: LanguageModel,
    engine: LanguageModel,
    inputs: Inputs,
    settings: Settings,
    theirs: Checkpoint,
    counted: np.ndarray | None = None,
) -> Verdict:
    """Compares parameters after some steps, and looks for what is wrong.

    Args:
      exact: The model before the steps, in float64.
      engine: The same in the other engine's dtype: how far its gradients are off is what another engine's may be.
      inputs: The batch of every step.
      settings: What the engine was asked to do.
      theirs: Its parameters after the last step, under their names in the checkpoint.
      counted: Which tokens the loss is over, bool [B, T]; None is all.

    Raises:
      DumpError: Parameters are missing or of other shapes, or are none of numbers.
    """
    layout = Layout.of(exact.config)
    values, stored = _read(theirs, layout)
    finite = np.isfinite(values)
    start = layout.flat({name: to_host(array) for name, array in named(engine.parameters).items()})
    question = Question(
        settings,
        layout,
        start,
        values,
        _gradients_of(exact, layout, inputs, counted),
        _gradients_of(engine, layout, inputs, counted),
        np.maximum(_spacing(start, engine.dtype), _spacing(start, stored)),
        float(ml_dtypes.finfo(engine.dtype).eps) / 2,
    )
    right = question.fit(question.right)
    found: tuple[_Trial, ...] = ()
    if not finite.all():
        count = int((~finite).sum())
        says = f"{count} elements are not finite; a step counter that begins at 0 divides by zero, which gives this too"
        found = (_Trial((Named("not-finite", says, {"elements": count}),), question.right, right),)
    elif not right.within:
        found = _explanations(question)
    best, others = (found[0], found[1:]) if found else (_Trial((), question.right, right), ())
    return Verdict(len(layout.shapes), len(start), right, best.made, tuple(other.made for other in others), best.fit)


@dataclasses.dataclass(frozen=True, eq=False)
class _Trial:
    """Mistakes that may have been made, and how well they explain the other side's parameters."""

    made: tuple[Named, ...]
    rule: Rule
    fit: Fit
    solved: int = 0

    @property
    def names(self) -> frozenset[str]:
        return frozenset(named.name for named in self.made)


def _explanations(question: Question) -> tuple[_Trial, ...]:
    """Returns what explains the other side's parameters, the likeliest first: one mistake, or two where none does."""
    bases: Sequence[_Trial] = (_Trial((), question.right, Fit(math.inf, "", math.inf, math.inf)),)
    nearest = math.inf
    for _ in range(_DEEPEST):
        tried = [trial for base in bases for trial in _beside(question, base)]
        fitting = sorted((each for each in tried if each.fit.explains), key=_likelihood)
        if fitting:
            return tuple(_first_of_each(fitting))
        tried.sort(key=lambda trial: trial.fit.left)
        nearest = min(nearest, tried[0].fit.error)
        bases = _first_of_each(tried)[:_STACKED]
    says = (
        f"nothing that is known gives these parameters: what comes nearest is off by {nearest:.1e} of the step. Fewer "
        "steps tell more, and gradients that are wrong show here too (golden.py --gradients)"
    )
    return (_Trial((Named("unknown", says),), question.right, question.fit(question.right)),)


def _likelihood(trial: _Trial) -> tuple[int, int, int]:
    """Sorts explanations: few numbers that are solved for first, then what leaves little, then round numbers."""
    numbers = [number for named in trial.made for number in named.numbers.values() if isinstance(number, float)]
    digits = sum(len(f"{number:.5e}".split("e")[0].rstrip("0")) for number in numbers)
    return trial.solved, round(max(1.0, trial.fit.typical)), digits


def _first_of_each(trials: Iterable[_Trial]) -> list[_Trial]:
    """Returns of trials with the same mistakes the first."""
    found: dict[frozenset[str], _Trial] = {}
    for trial in trials:
        found.setdefault(trial.names, trial)
    return list(found.values())


def _beside(question: Question, base: _Trial) -> Iterator[_Trial]:
    """Yields what each mistake of the table explains, made beside those of a trial."""
    for mistake in MISTAKES:
        if mistake.name not in base.names:
            for numbers, rule in mistake.ways(question, base.rule):
                made = Named(mistake.name, mistake.says.format(**numbers), numbers)
                fit = question.fit(rule, mistake.chaotic)
                yield _Trial((*base.made, made), rule, fit, base.solved + mistake.solved)


def _read(theirs: Checkpoint, layout: Layout) -> tuple[Vector, str]:
    """Returns the other side's parameters as one vector, and the coarsest dtype that they are stored in."""
    found = {name: tensor.shape for name, tensor in theirs.tensors.items()}
    wrong = {name: found.get(name, "missing") for name, shape in layout.shapes.items() if found.get(name) != shape}
    if wrong:
        name = next(iter(wrong))
        raise DumpError(
            "the parameters after the steps are not the model's",
            code="nothing-compared" if len(wrong) == len(layout.shapes) else "parameters-differ",
            file=theirs.path,
            tensor=name,
            found=f"{wrong[name]}; {len(wrong)} of {len(layout.shapes)} do not fit",
            expected=list(layout.shapes[name]),
            hint="Save them under their names in the checkpoint, as `model.state_dict()` has them",
        )
    types = {theirs.tensors[name].dtype for name in layout.shapes}
    if strange := [each.name for each in types if not each.is_float]:
        raise DumpError("parameters are not floating point", code="parameter-dtype", file=theirs.path, found=strange)
    coarsest = min(types, key=lambda each: _mantissa(each))
    return layout.flat({name: theirs.tensors[name].read() for name in layout.shapes}), str(coarsest.numpy)


def _mantissa(dtype: DType) -> int:
    return int(ml_dtypes.finfo(dtype.numpy).nmant)


def _spacing(values: Vector, dtype: str) -> Vector:
    """Returns the distance of neighbouring numbers of a dtype at each value, [P]."""
    limits = ml_dtypes.finfo(dtype)
    sizes = np.maximum(np.abs(values), float(limits.smallest_normal))
    return np.exp2(np.floor(np.log2(sizes)) - limits.nmant)


def _gradients_of(
    model: LanguageModel, layout: Layout, inputs: Inputs, counted: np.ndarray | None
) -> Callable[[int, Vector], Vector]:
    at = gradients_at(model, inputs, counted)

    def gradient(step: int, parameters: Vector) -> Vector:
        del step
        if not np.isfinite(parameters).all():
            return np.full_like(parameters, np.nan)
        return layout.flat({name: np.asarray(value) for name, value in at(layout.arrays(parameters))[1].items()})

    return gradient
