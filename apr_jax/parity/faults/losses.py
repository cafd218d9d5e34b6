"""Mistakes of the loss that a backward pass begins with: its labels, what it is divided by, what counts in it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from apr_jax.parity.backward.loss import Loss, behind
from apr_jax.parity.backward.replay import Place
from apr_jax.parity.faults.record import Fault
from apr_jax.trace.positions import token_mask
from apr_jax.trace.stages import Key

_LOGITS = ("grad.logits",)


def _times(loss: Loss, factor: float) -> Loss:
    return dataclasses.replace(loss, weights=loss.weights * factor)


def _over(loss: Loss, targets: np.ndarray, wanted: np.ndarray) -> Loss:
    """The mean over other positions, or against other tokens."""
    return dataclasses.replace(loss, targets=targets, weights=wanted / max(1, int(wanted.sum())))


def _not_shifted(loss: Loss, at: Place, first: bool = True) -> Loss:
    ids, wanted = loss.inputs.input_ids, token_mask(loss.inputs)
    wanted = wanted if loss.counted is None else wanted & loss.counted
    return _over(loss, ids, wanted if first else wanted & behind(np.ones_like(wanted[:, 1:]), 1))


def _shifted_twice(loss: Loss, at: Place) -> Loss:
    tokens = token_mask(loss.inputs)
    counted = tokens if loss.counted is None else tokens & loss.counted
    return _over(loss, np.roll(loss.inputs.input_ids, -2, axis=1), behind(tokens[:, :-2] & counted[:, 2:], 2))


_ALL, _BEHIND_TOKENS, _NOT_IGNORED = "padding", "padding behind the texts", "tokens that the labels leave out"


def _more_counted(loss: Loss, at: Place, what: str, divided: str = "their number") -> Loss:
    tokens = token_mask(loss.inputs)
    if what == _ALL:
        wanted = np.ones_like(tokens[:, 1:])
    else:
        wanted = tokens[:, :-1] if what == _BEHIND_TOKENS else tokens[:, :-1] & tokens[:, 1:]
    more = _over(loss, loss.targets, behind(wanted, 1))
    return more if divided == "their number" else _times(more, int(wanted.sum()) / loss.count)


def _what_is_left_out(question: Any, node: Key) -> Iterator[Mapping[str, Any]]:
    loss = question.back.loss
    whats = (_ALL, _BEHIND_TOKENS) if not token_mask(loss.inputs).all() else ()
    for what in (*whats, *((_NOT_IGNORED,) if loss.counted is not None else ())):
        yield {"what": what}


def _counts(question: Any, node: Key) -> Iterator[Mapping[str, Any]]:
    """What a loss may be divided by: what is there to be counted, and what the values ask for."""
    loss = question.back.loss
    tokens, pairs = token_mask(loss.inputs), loss.inputs.input_ids[:, 1:]
    known = [int(tokens.sum()), tokens.size, pairs.size, len(tokens), tokens.shape[1]]
    known.append(int((tokens[:, :-1] & tokens[:, 1:]).sum()))
    factor = question.factor()
    if factor is not None and factor > 0:
        count = loss.count / factor
        if abs(count - round(count)) < 1e-3 * count and 1 < round(count) <= tokens.size:
            known.append(round(count))
    for count in dict.fromkeys(known):
        if count not in (1, loss.count):
            yield {"count": count, "expected": loss.count}


def _batches(question: Any, node: Key) -> Iterator[Mapping[str, Any]]:
    """Micro-batches of as many rows, of which not all have the same number of tokens."""
    loss = question.back.loss
    counts = (loss.weights != 0).sum(axis=1)
    for rows in range(1, len(counts)):
        sums = np.add.reduceat(counts, np.arange(0, len(counts), rows))
        if len(set(sums.tolist())) > 1 and (sums > 0).all():
            yield {"rows": rows}


def _mean_of_means(loss: Loss, at: Place, rows: int) -> Loss:
    wanted = loss.weights != 0
    starts = np.arange(0, len(wanted), rows)
    sums = np.add.reduceat(wanted.sum(axis=1), starts)
    weights = np.repeat(1 / (sums * len(starts)), rows)[: len(wanted)]
    return dataclasses.replace(loss, weights=wanted * weights[:, None])


def _factors(question: Any, node: Key) -> Iterator[Mapping[str, Any]]:
    factor = question.factor()
    if factor is not None:
        yield {"factor": factor}


def round_factor(factor: float, precision: float = 1e-4) -> float:
    """Returns the power of two, or the whole number or its inverse, that a factor is; else the factor in 6 digits."""
    if factor > 0:
        power = 2.0 ** round(math.log2(factor))
        for near in (power, float(round(factor)), 1 / max(1, round(1 / factor))):
            if near and abs(factor / near - 1) < precision:
                return near
    return float(f"{factor:.6g}")


LOSS_SUM = Fault(
    "loss-sum",
    "the loss is summed over the tokens, not averaged",
    _LOGITS,
    {"loss": lambda loss, at: _times(loss, loss.count)},
    formula="dz = softmax(z) − 1[label]",
)
LOSS_COUNT = Fault(
    "loss-count",
    "the loss is divided by {count}, not by the {expected} tokens that count",
    _LOGITS,
    {"loss": lambda loss, at, count, expected: _times(loss, loss.count / count)},
    variants=_counts,
    formula="dz = (softmax(z) − 1[label]) / {count}",
)
SCALED = Fault(
    "gradient-scaled",
    "gradients are {factor:.6g} times the right ones",
    _LOGITS,
    {"loss": lambda loss, at, factor: _times(loss, factor)},
    variants=_factors,
    formula="dx = {factor:.6g} · {right}",
)
FAULTS = (
    LOSS_SUM,
    LOSS_COUNT,
    Fault(
        "labels-not-shifted",
        "each position is compared with its own token, not the next one",
        _LOGITS,
        {"loss": _not_shifted},
        ways=lambda: ({"first": False},),
        formula="dz[t] = (softmax(z[t]) − 1[id[t]]) / N",
    ),
    Fault(
        "labels-shifted-twice",
        "each position is compared with the token after the next one",
        _LOGITS,
        {"loss": _shifted_twice},
        formula="dz[t] = (softmax(z[t]) − 1[id[t + 2]]) / N",
    ),
    Fault(
        "padding-in-loss",
        "{what} is counted in the loss",
        _LOGITS,
        {"loss": _more_counted},
        variants=_what_is_left_out,
        ways=lambda what: ({"divided": "the right number"},),
        formula="dz = {right}, for {what} too",
    ),
    Fault(
        "accumulation-averaged",
        "the loss is the mean of the means of micro-batches of {rows} rows, which have unequal numbers of tokens",
        _LOGITS,
        {"loss": _mean_of_means},
        variants=_batches,
        formula="dz = (softmax(z) − 1[label]) / (N of its {rows} rows · micro-batches)",
    ),
    SCALED,
)
