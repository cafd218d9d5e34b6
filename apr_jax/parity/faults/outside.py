"""Mistakes outside the layers: embedding, logits, the order of layers, and the layout of a dump."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from apr_jax.parity.faults.record import Fault, Instead, Mistakes
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
    ORDER,
    SKIPPED,
    REPEATED,
    LAYOUT,
)
