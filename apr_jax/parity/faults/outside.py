"""Mistakes outside the layers: embedding, logits, the order of layers, and the layout of a dump."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from apr_jax.parity import round_numbers
from apr_jax.parity.faults import soft_cap
from apr_jax.parity.faults.parts import factor_of
from apr_jax.parity.faults.record import IGNORED, Fault, Grid, Instead, Mistakes
from apr_jax.parity.question import Question
from apr_jax.parity.replay import At, Value, head_product
from apr_jax.trace.stages import Key


def _silent(question: Question, node: Key) -> list[Mapping[str, Any]]:
    return [] if node == question.nodes[-1] and np.any(question.theirs) else [{}]


def _shifts(question: Question) -> Iterator[Mistakes]:
    """By how many elements theirs are ours rolled, from their cross-correlation; positive to higher indices."""
    ours, theirs = question.right, np.nan_to_num(question.theirs)
    spectrum = np.fft.rfft(theirs.ravel()) * np.fft.rfft(ours.ravel()).conj()
    shift = int(np.argmax(np.fft.irfft(spectrum, ours.size)))
    shift = shift - ours.size if shift > ours.size // 2 else shift
    if shift:
        yield (SHIFTED.made(shift=shift),)


def _rolled(value: Value, at: At, shift: int) -> Value:
    """The flat buffer of all positions is what moves."""
    whole = head_product(at.replay.whole)
    return at.replay.look("logits", np.roll(whole.ravel(), shift).reshape(whole.shape))


SHIFTED = Fault(
    "logits-shifted",
    "the flat logits buffer is rolled by {shift} elements",
    ("logits",),
    {"logits": _rolled},
    solve=_shifts,
    slight=False,
    formula="y′[n] = y[n − ({shift})], over the flat buffer",
)
ORDER = Fault(
    "layer-order",
    "layers are executed in the order {order}",
    formula=Instead("x → layers {order}", "x → layers 0, 1, 2, …"),
)
SKIPPED = Fault(
    "layer-skipped",
    "layer {layer} is skipped",
    formula=Instead("x → … → layer {layer} left out → …", "x → layers 0, 1, 2, …"),
)
REPEATED = Fault(
    "layer-repeated",
    "layer {layer} is executed twice",
    formula=Instead("x → … → layer {layer} → layer {layer} → …", "x → layers 0, 1, 2, …"),
)


def _moved(right: None, at: At, shift: int = 0, last: bool = False) -> Callable[[np.ndarray], np.ndarray]:
    end = at.replay.inputs.input_ids.shape[1] - 1
    return lambda columns: np.full_like(columns, end) if last else np.clip(columns + shift, 0, end)


def _positions(question: Question, node: Key) -> Iterator[Mapping[str, Any]]:
    """The last column whatever it holds, and positions nearby; of a single row of logits, any position."""
    yield {"last": True}
    reach = question.replay.inputs.input_ids.shape[1] - 1 if question.theirs.shape[1] == 1 else _NEIGHBOURS
    far = range(1, min(reach, _FARTHEST) + 1)
    yield from ({"shift": sign * shift} for shift in far for sign in (-1, 1))


_NEIGHBOURS, _FARTHEST = 2, 64
"""How far away logits are looked for where all positions were dumped, and where one was."""

POSITION = Fault(
    "logits-position",
    ("the logits are those of position {shift:+d}", "the logits are those of the last column, which is padding"),
    ("logits",),
    {"head_rows": _moved},
    variants=_positions,
    merge={"last": IGNORED},
    slight=False,
    alone=True,
    formula=("y[t] = x[t + ({shift})] Wᵀ", "y[t] = x[T − 1] Wᵀ, T − 1 the last column"),
)


def _temperatures(question: Question) -> Iterator[Mistakes]:
    factor = factor_of(question)
    if factor > 0:
        yield from ((TEMPERATURE.made(temperature=value),) for value in round_numbers.near(1 / factor))


TEMPERATURE = Fault(
    "logits-temperature",
    "the logits are divided by a temperature of {temperature:.6g}",
    ("logits",),
    {"logits": lambda value, at, temperature: value / temperature},
    solve=_temperatures,
    grid=Grid("temperature", (0.1, 0.2, 0.5, 0.6, 0.7, 0.8, 0.9, 1.2, 1.5, 2.0, 5.0), round_numbers.near),
    alone=True,
    formula="y = x Wᵀ / {temperature:.6g}",
)
SOFT_CAP = soft_cap.fault("logits-soft-cap", "the logits are bounded softly by {cap:.6g} (tanh)", "logits", "logits")
LAYOUT = Fault("layout", "not a mistake, undone: the dump is {kind} there", mistake=False)

FAULTS = (
    Fault(
        "embedding-row-off-by-one",
        "the embedding reads row id + 1",
        ("embedding",),
        {"row": lambda ids, at: ids + 1},
        formula="y[t] = E[id[t] + 1]",
    ),
    Fault(
        "head-missing",
        "the logits are all zero: the head is missing",
        ("logits",),
        {"logits": lambda value, at: np.zeros_like(value)},
        variants=_silent,
        formula="y = 0",
    ),
    SHIFTED,
    POSITION,
    TEMPERATURE,
    SOFT_CAP,
    ORDER,
    SKIPPED,
    REPEATED,
    LAYOUT,
)
