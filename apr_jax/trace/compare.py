"""Compares two traces tensor by tensor: how far apart they are, whether within a bar, and how far logits agree."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from apr_jax.converters.checkpoint.qwen2 import Qwen2Config
from apr_jax.converters.errors import DumpError, RefusedError
from apr_jax.trace import stages
from apr_jax.trace.agreement import Agreement, agreement, log_softmax, parts
from apr_jax.trace.inputs import Inputs
from apr_jax.trace.positions import (
    compared_positions,
    dumped_columns,
    gather_positions,
    position_axis,
    predicted_pairs,
)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How one tensor compares with its reference, over positions that are not padding.

    Attributes:
      key: Its key in the trace.
      elements: Number of elements compared.
      max_abs: Largest absolute difference.
      relative_l2: |left - right| / |right|.
      cosine: Cosine of the angle between the two.
      bar: What relative_l2 may be.
      logits: For logits, how the distributions agree, position by position.
      note: What else stands out ("all zero", "not finite").
    """

    key: str
    elements: int
    max_abs: float
    relative_l2: float
    cosine: float
    bar: float
    logits: Agreement | None = None
    note: str = ""

    @property
    def within(self) -> bool:
        """Whether the bar holds; what is not finite never does."""
        return math.isfinite(self.relative_l2) and self.relative_l2 <= self.bar

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as JSON values; a number that is not finite becomes a string."""
        values = vars(self) | {"within": self.within, "logits": self.logits and self.logits.to_json()}
        return {
            key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }


def relative_l2(left: np.ndarray, right: np.ndarray) -> float:
    """Returns |left - right| / |right| in float64; 0 where both are 0, infinite where only the right side is."""
    left, right = left.astype(np.float64), right.astype(np.float64)
    difference, norm = float(np.linalg.norm(left - right)), float(np.linalg.norm(right))
    if norm == 0:
        return 0.0 if difference == 0 else math.inf
    return difference / norm


def compare(
    left: Mapping[str, np.ndarray],
    right: Mapping[str, np.ndarray],
    inputs: Inputs,
    bar: Callable[[str], float],
    columns: np.ndarray | None = None,
    config: Qwen2Config | None = None,
) -> list[Comparison]:
    """Compares every tensor of the reference; the left side may hold more.

    Args:
      left: key -> array with leading axes [B, T] (attention stages [B, N, T, T]).
      right: The reference; may hold the positions at `columns` only, and of the logits the last token's: [B, 1, V].
      inputs: The batch that both were computed from; positions with mask 1 are compared.
      bar: Gives the largest relative L2 that is let through for a key.
      columns: Columns of the batch, [B, R].
      config: The model's, for the windows of its layers; None is a model without.

    Raises:
      RefusedError: The reference is empty, holds a tensor that the left side lacks, or shapes differ: what is not
        compared is no success.
    """
    keys = [key for key in left if key in right]
    if not keys:
        raise DumpError(
            "nothing to compare: the two sides have no tensor in common",
            code="nothing-compared",
            found=f"{sorted(left)[:5]} and {sorted(right)[:5]}",
        )
    if unknown := sorted(set(right) - set(left)):
        raise RefusedError(
            "the reference holds tensors that this model does not have",
            code="reference-unknown",
            found=", ".join(unknown[:8]),
            hint="Is it another model's, or are the names misspelt?",
        )
    results = []
    for key in keys:
        ours, theirs, part = left[key], right[key], None
        of_parameter = stages.Key(key).of_parameter
        if theirs.ndim == ours.ndim and not of_parameter:
            part = dumped_columns(key, theirs.shape[position_axis(key)], inputs, columns)
            ours = gather_positions(key, ours, part)
        if ours.shape != theirs.shape:
            raise DumpError("shapes differ", code="shape-differs", tensor=key, found=ours.shape, expected=theirs.shape)
        window = None if config is None else config.window_of(stages.Key(key).layer)
        chosen: Any = ... if of_parameter else compared_positions(key, inputs, ours.shape, part, window)
        results.append(_compare_one(key, ours[chosen], theirs[chosen], bar(key)))
    return results


def _compare_one(key: str, left: np.ndarray, right: np.ndarray, bar: float) -> Comparison:
    if left.size == 0:
        raise DumpError("nothing to compare", code="nothing-compared", tensor=key)
    ours, theirs = left.astype(np.float64), right.astype(np.float64)
    norms = float(np.linalg.norm(ours)), float(np.linalg.norm(theirs))
    cosine = float(np.vdot(ours, theirs)) / (norms[0] * norms[1]) if all(norms) else float(norms[0] == norms[1])
    notes = [
        f"{side}: {what}"
        for side, values in (("left", ours), ("right", theirs))
        for what, holds in (("not finite", not np.isfinite(values).all()), ("all zero", not values.any()))
        if holds
    ]
    return Comparison(
        key,
        left.size,
        max_abs=float(np.abs(ours - theirs).max()),
        relative_l2=relative_l2(ours, theirs),
        cosine=cosine,
        bar=bar,
        note=", ".join(notes),
        logits=agreement(ours, theirs) if key == stages.LOGITS else None,
    )


def loss_nats(logits: np.ndarray, inputs: Inputs, counted: np.ndarray | None = None) -> float:
    """Returns the mean next-token cross-entropy in nats, over pairs of neighbouring positions that are both tokens.

    Args:
      logits: [B, T, V].
      inputs: The batch.
      counted: Which tokens count, bool [B, T]; None is all.

    Raises:
      RefusedError: No such pair.
    """
    pairs = predicted_pairs(inputs, counted)
    if not pairs.any():
        raise RefusedError(
            "no next token to predict",
            code="nothing-compared",
            expected="two tokens in a row at least",
            hint="Give a longer text",
        )
    predicting, targets = logits[:, :-1][pairs], inputs.input_ids[:, 1:][pairs]
    total = 0.0
    for part in parts(len(targets)):
        total -= np.take_along_axis(log_softmax(predicting[part]), targets[part][:, None], axis=-1).sum()
    return float(total / len(targets))
