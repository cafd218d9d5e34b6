"""What a dump of a few numbers of each stage tells: the first stage that differs, and which mistakes would do that.

Nothing can be computed from such numbers, so a stage is held against a right run from the tokens on, and what comes
behind the first wrong one is its consequence. Rounding is what the same run in the engine's dtype makes of the numbers,
and no less than what that dtype makes of single values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np

from apr_jax.engines.found import Summary
from apr_jax.model.language_model import LanguageModel
from apr_jax.parity.faults.record import Mistake, once
from apr_jax.parity.faults.table import FAULTS
from apr_jax.parity.localise import EPSILON, UNWIDENED
from apr_jax.parity.replay import Replay
from apr_jax.trace import stages
from apr_jax.trace.inputs import Inputs
from apr_jax.trace.positions import position_axis
from apr_jax.trace.stages import Key

_FACTOR = 8.0
"""How many times its own rounding a number may be off: others sum in another order."""
_PRINTED = 1e-6
"""Numbers are written with some seven digits, sums with six behind the point."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """A number of a stage that is not what a right engine has.

    Attributes:
      key: The stage.
      kind: "min", "max", "mean", "l2" or "sum".
      theirs, right: The numbers.
      allowed: By how much they may differ.
    """

    key: Key
    kind: str
    theirs: float
    right: float
    allowed: float


@dataclasses.dataclass(frozen=True)
class Answer:
    """What was found.

    Attributes:
      compared: The stages of which numbers were compared, in order of execution.
      differences: Of the first stage that differs; empty if none does.
      shortlist: Mistakes that, made there, give these numbers.
    """

    compared: tuple[Key, ...]
    differences: tuple[Difference, ...]
    shortlist: tuple[str, ...]


def judge(
    exact: LanguageModel,
    same: LanguageModel,
    inputs: Inputs,
    theirs: Mapping[str, Summary],
    widened: Mapping[str, float] = UNWIDENED,
) -> Answer:
    """Compares the numbers of a dump with those of a right run, in order of execution.

    Args:
      exact: The model in float64.
      same: The model in the dtype that the other side computes in.
      inputs: The batch, without padding.
      theirs: Trace key -> numbers.
      widened: Stage -> how many times more a number may be off; one where it is not named.
    """
    keys = [key for key in stages.trace_keys(exact.config.num_layers) if key in theirs]
    right, own = exact.trace(inputs), same.trace(inputs, keys)
    for place, key in enumerate(keys):
        factor = widened.get(key.stage, 1.0)
        wrong = tuple(_differences(key, theirs[key], right[key], own[key], same.dtype, factor))
        if wrong:
            names = tuple(_shortlist(exact, inputs, right, key, theirs[key], own[key], same.dtype))
            return Answer(tuple(keys[: place + 1]), wrong, names)
    return Answer(tuple(keys), (), ())


def numbers(values: np.ndarray) -> dict[str, float]:
    """Returns all numbers of a stage's values."""
    wide = np.asarray(values, np.float64)
    return {
        "min": float(wide.min()),
        "max": float(wide.max()),
        "mean": float(wide.mean()),
        "l2": float(np.linalg.norm(wide)),
        "sum": float(wide.sum()),
    }


def _differences(
    key: Key, theirs: Summary, right: np.ndarray, own: np.ndarray, dtype: str, widened: float = 1.0
) -> Iterator[Difference]:
    right, own = (_summed(key, values, theirs) for values in (right, own))
    exactly, rounded = numbers(right), numbers(own)
    size, rms = right.size, float(np.sqrt(np.mean(np.square(right, dtype=np.float64))))
    unit = EPSILON[dtype]
    least = {
        "min": unit * abs(exactly["min"]),
        "max": unit * abs(exactly["max"]),
        "mean": unit * rms,
        "l2": unit * exactly["l2"],
        "sum": unit * rms * size**0.5 * max(1.0, np.log2(size)),
    }
    for kind, number in theirs.numbers.items():
        allowed = _FACTOR * max(abs(rounded[kind] - exactly[kind]), least[kind])
        allowed += _PRINTED * max(1.0 if kind == "sum" else 0.0, abs(exactly[kind]), least[kind])
        allowed *= widened
        if not abs(number - exactly[kind]) <= allowed:  # NaN is no right number
            yield Difference(key, kind, number, exactly[kind], allowed)


def _summed(key: Key, values: np.ndarray, theirs: Summary) -> np.ndarray:
    """The values that the numbers are of: all, or those of the last token."""
    axis = position_axis(key)
    if theirs.elements is not None and theirs.elements * values.shape[axis] == values.size:
        return values.take([-1], axis)
    return values


def _shortlist(
    exact: LanguageModel,
    inputs: Inputs,
    right: Mapping[str, np.ndarray],
    key: Key,
    theirs: Summary,
    own: np.ndarray,
    dtype: str,
) -> Iterator[str]:
    replay = Replay(exact.config, exact.parameters, inputs, dict(right))
    for mistake in _candidates(key):
        with np.errstate(all="ignore"):
            made = np.asarray(replay.under((mistake,)).compute(key))
        moved = own + (made - right[key])
        if not any(_differences(key, theirs, made, moved, dtype)):
            yield mistake.fault.said(mistake.parameters)


def _candidates(key: Key) -> Iterator[Mistake]:
    """Mistakes of a stage that need nothing but its inputs to be made: without parameters, or with one from a grid."""
    for fault in FAULTS.values():
        if callable(fault.stages) or key.stage not in fault.stages or fault.unexplained or not fault.mistake:
            continue
        if fault.grid is not None and fault.variants is once:
            yield from (fault.made(**{fault.grid.parameter: value}) for value in fault.grid.values)
        elif fault.grid is None and any("{" not in wording for wording in fault.wordings):
            yield fault.made()
