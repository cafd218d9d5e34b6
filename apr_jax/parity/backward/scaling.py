"""What all gradients of parameters have in common: a factor, a clipped norm, other tokens; how each is rounded."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

import ml_dtypes
import numpy as np

from apr_jax.converters.checkpoint.qwen2 import EMBEDDING
from apr_jax.parity.backward import nodes
from apr_jax.parity.backward.localise import Bench, GradientSite, Judged, judge
from apr_jax.parity.backward.search import Question, factor_of
from apr_jax.parity.faults.losses import LOSS_COUNT, LOSS_SUM, SCALED, round_factor
from apr_jax.parity.faults.parameter_gradients import (
    ANOTHER_STEP,
    CLIPPED,
    ROUNDED,
    ROUNDED_AT_RANDOM,
    TRUNCATED,
    in_dtype,
)
from apr_jax.parity.faults.record import Fault, Mistake
from apr_jax.parity.faults.seen import UNKNOWN
from apr_jax.parity.findings import Explanation, Finding
from apr_jax.parity.localise import EPSILON
from apr_jax.parity.wording import sentence
from apr_jax.trace.stages import LOGITS, Key

_FEWEST = 3
"""From as many parameters a factor is one of all of them."""
_SHARE = 0.9
"""Of the parameters that are some multiple of the right gradient as many have the same one."""
_SAME = 2e-3
_POWERS_OF_TWO = [2.0**power for power in range(-20, 41)]
"""What losses are scaled by, and accumulated gradients are not divided by."""
_ROUND = 64.0
"""As many roundings a norm may be from a number of one digit that gradients are clipped to."""
_AT_RANDOM = 0.02
"""The share of values that have to be rounded to the farther neighbour."""
_WITHIN = 0.99
_TOLD, _FEWEST_TOLD = 0.05, 16
"""A value tells how it was rounded if it is known to that share of a unit; as many have to."""
_LARGE_ROWS = 5.0
"""Times the largest right row of a token that is not in the batch."""


@dataclasses.dataclass(frozen=True)
class Common:
    """A factor of all parameters' gradients.

    Attributes:
      factor: What the right ones are multiplied by.
      finding: The mistake that it is.
    """

    factor: float
    finding: Finding


def common_factor(bench: Bench, order: Sequence[Key], gradients: Mapping[str, np.ndarray]) -> Common | None:
    """Returns what all gradients of parameters are multiplied by, if they are, and if that shows in no stage's."""
    if not any(key.of_parameter for key in order):
        return None
    judged = [_Measured.of(judge(bench, key, gradients[key])) for key in order if key.of_parameter]
    if not any(each.site.wrong for each in judged):
        return None
    factors = [each.multiple if each.site.wrong else 1.0 for each in judged if each.multiple is not None]
    if len(factors) < _FEWEST:
        return None
    middle = float(np.median(factors))
    same = [abs(factor / middle - 1) < _SAME for factor in factors] if middle else []
    if not middle or abs(middle - 1) < _SAME or np.mean(same) < _SHARE:
        return None
    if _is_adapters_scale(bench, judged, middle):
        return None
    exact = _precisely([each for each in judged if abs((each.multiple or 0.0) / middle - 1) < _SAME])
    return Common(exact, _finding_of(bench, order, gradients, judged, round_factor(exact)))


@dataclasses.dataclass(frozen=True)
class _Measured:
    """What is kept of a judged gradient: of all of them the values would not fit into memory.

    Attributes:
      site: The verdict.
      multiple: What the right one is multiplied by, None where that is not told.
      power: The square of the right one's L2.
      along: Theirs along the right one.
    """

    site: GradientSite
    multiple: float | None
    power: float
    along: float

    @classmethod
    def of(cls, judged: Judged) -> _Measured:
        """Measures a gradient."""
        if not judged.site.wrong:
            return cls(judged.site, 1.0 if judged.site.norm else None, judged.site.norm**2, judged.site.norm**2)
        power, along = (float(np.vdot(judged.right, values)) for values in (judged.right, judged.theirs))
        return cls(judged.site, factor_of(judged), power, along)


class Divided(Mapping[str, np.ndarray]):
    """Gradients, those of parameters divided by a factor."""

    def __init__(self, gradients: Mapping[str, np.ndarray], factor: float):
        self._gradients, self._factor = gradients, factor

    def __getitem__(self, key: str) -> np.ndarray:
        value = self._gradients[key]
        return value / self._factor if Key(key).of_parameter else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._gradients)

    def __len__(self) -> int:
        return len(self._gradients)


def _is_adapters_scale(bench: Bench, judged: Sequence[_Measured], factor: float) -> bool:
    """Whether all gradients are those of adapters' matrices, and lack their scale."""
    scales = {part.scale for part in bench.exact.adapter.values()}
    alone = all(each.site.kind == nodes.LOW_RANK for each in judged)
    return alone and len(scales) == 1 and abs(factor * scales.pop() - 1) < _SAME


def _precisely(judged: Sequence[_Measured]) -> float:
    """The factor of some gradients by all of their values."""
    return sum(each.along for each in judged) / sum(each.power for each in judged)


def _finding_of(
    bench: Bench, order: Sequence[Key], gradients: Mapping[str, np.ndarray], judged: Sequence[_Measured], factor: float
) -> Finding:
    possible = list(_possible(bench, order, gradients, factor)) or [SCALED.made(factor=factor)]
    best, others = possible[0], tuple(dict.fromkeys(m.name for m in possible[1:] if m.fault is not possible[0].fault))
    first = judged[0].site
    before = max(each.site.error / each.site.norm for each in judged if each.site.norm)
    text = sentence(best.fault, (), first.stage, best.shown, before, None)
    certainty = "ambiguous" if others else "certain"
    return Finding(best.name, (), first.stage, best.shown, before, None, others, certainty, text)


def _possible(
    bench: Bench, order: Sequence[Key], gradients: Mapping[str, np.ndarray], factor: float
) -> Iterator[Mistake]:
    """Yields what makes just such a factor, the likeliest first."""
    loss = bench.exact.loss
    # Where the gradient of the logits is there and right, the loss is none of it.
    from_loss = nodes.of_stage(None, LOGITS) not in gradients
    if from_loss and abs(factor / loss.count - 1) < _SAME:
        yield LOSS_SUM.made()
    whole = [key for key in order if key.of_parameter and not key.endswith((".as_head", ".as_embedding"))]
    norm = float(np.sqrt(sum(float(np.sum(np.square(np.asarray(gradients[key], np.float64)))) for key in whole)))
    digit, bar = float(f"{norm:.0e}"), _ROUND * max(EPSILON[bench.dtype], EPSILON["float32"])
    if factor < 1 and abs(norm / digit - 1) < bar and len(whole) == len(bench.exact.config.tensor_shapes()):
        yield CLIPPED.made(norm=digit, expected=norm / factor)
    count = loss.count / factor
    is_count = from_loss and abs(count - round(count)) < _SAME * count and 1 < round(count) <= loss.targets.size
    divided = LOSS_COUNT.made(count=round(count), expected=loss.count)
    if is_count and round(count) in (loss.inputs.tokens, loss.targets.size, loss.targets[:, 1:].size):
        yield divided
    if factor in _POWERS_OF_TWO:
        yield SCALED.made(factor=factor)
    if is_count:
        yield divided


def without_loss_scale(findings: Sequence[Finding]) -> tuple[list[Finding], tuple[str, ...]]:
    """Takes out a loss scale that stages' gradients hold and parameters' no longer do: that is how it is meant."""
    scaled = [finding for finding in findings if finding.fault == SCALED.name]
    factors = [float(finding.parameters["factor"]) for finding in scaled]
    if len(scaled) == 2 and abs(factors[0] * factors[1] - 1) < _SAME:
        note = f"the gradients of stages are {max(factors):.6g} times the right ones, those of parameters are not:"
        return (
            [finding for finding in findings if finding not in scaled],
            (f"{note} a loss scale that is taken out at the end, as it should be",),
        )
    return list(findings), ()


def of_other_tokens(
    bench: Bench, explained: Iterable[Explanation], gradients: Mapping[str, np.ndarray]
) -> Finding | None:
    """Says that nothing that is explained fits because the gradients are those of other tokens: their rows show it."""
    unknown = [one for one in explained if one.mistakes[0].fault is UNKNOWN and one.site.key.of_parameter]
    embedding = nodes.of_tensor(None, EMBEDDING)
    if not unknown or embedding not in gradients:
        return None
    seen = unknown[0]
    theirs = np.linalg.norm(np.asarray(gradients[embedding], np.float64), axis=-1)
    right = np.linalg.norm(bench.exact.compute(embedding), axis=-1)
    inputs = bench.exact.forward.inputs
    absent = np.setdiff1d(np.arange(len(right)), inputs.input_ids)
    if not len(absent):
        return None
    tokens = absent[theirs[absent] > _LARGE_ROWS * max(float(right[absent].max()), 1e-9 * float(right.max()))]
    if not len(tokens):
        return None
    parameters = {"count": len(tokens), "token": int(tokens[0])}
    text = sentence(ANOTHER_STEP, (), seen.site.stage, parameters, seen.before, None)
    return Finding(ANOTHER_STEP.name, (), seen.site.stage, parameters, seen.before, None, (), "certain", text)


def rounding_of(question: Question, known: Sequence[Mistake]) -> Mistake | None:
    """Returns how a parameter's gradient was rounded to a narrower dtype than the one declared, if it was.

    Args:
      question: The gradient.
      known: How others were rounded: values that cancel do not tell.
    """
    if not question.node.of_parameter or question.dtype not in ("float32", "float64"):
        return None
    theirs, right = question.judged.theirs, question.judged.right
    for dtype in ("bfloat16", "float16"):
        if theirs.any() and np.array_equal(in_dtype(theirs, dtype), theirs):
            off = np.broadcast_to(_allowed(question), right.shape)
            low, high = _neighbours(right - off, dtype)[0], _neighbours(right + off, dtype)[1]
            if np.mean((theirs >= low) & (theirs <= high)) < _WITHIN:
                return None
            fault = _direction(theirs, right, off, dtype) or next((m.fault for m in known if m.fault in _WAYS), ROUNDED)
            return fault.made(dtype=dtype, tensor=nodes.tensor_of(question.node)[1])
    return None


_WAYS = (ROUNDED, ROUNDED_AT_RANDOM, TRUNCATED)


def _allowed(question: Question) -> np.ndarray:
    """What every value may be off by rounding on the way to it."""
    site, right = question.judged.site, question.judged.right
    width = right.shape[-1] if right.ndim > 1 else 1
    return np.asarray(site.row_budgets / width**0.5).reshape(-1, *([1] * (right.ndim - 1)))


def _direction(theirs: np.ndarray, right: np.ndarray, off: np.ndarray, dtype: str) -> Fault | None:
    """How values were rounded, by those of which it is known which neighbour is the nearer one; None of too few."""
    low, high = _neighbours(right, dtype)
    unit = high - low
    told = off < _TOLD * unit
    if told.sum() < _FEWEST_TOLD:
        return None
    theirs, right, low, high, unit = (each[told] for each in (theirs, right, low, high, unit))
    farther = np.abs(theirs - right) > np.minimum(right - low, high - right) + 2 * _TOLD * unit
    if np.mean(farther) < _AT_RANDOM:
        return ROUNDED
    outwards = np.abs(theirs) > np.abs(right) + 2 * _TOLD * unit
    return TRUNCATED if np.mean(outwards) < _AT_RANDOM / 2 else ROUNDED_AT_RANDOM


def _neighbours(values: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """The values of a narrow dtype below and above each value."""
    narrow = ml_dtypes.finfo(dtype).dtype
    nearest = values.astype(np.float32).astype(narrow)
    up, down = (np.nextafter(nearest, narrow.type(sign * np.inf)).astype(np.float64) for sign in (1, -1))
    near = nearest.astype(np.float64)
    return np.where(near <= values, near, down), np.where(near >= values, near, up)
