"""How far two engines' logits agree: the statistics of upstream's `apr parity`, and how alike the ranks of tokens are.

The first seven are those of `apr parity` (aprender, PMAT-232, "Statistical Process Control for Inference"; its limits
are those of contracts/layer-parity-v1.yaml), made for every position and then put together. With d the differences of a
position's logits over the vocabulary:

    cosine   the angle between the two rows of logits
    KL       KL(softmax(reference) || softmax(judged)), nats
    max abs  max |d|
    sigma    1.0 / rms(d): how many times the spread fits into a tolerance of one logit
    Cpk      (1.0 - mean |d|) / (3 rms(d)), one-sided: how well the differences are centred within it
    top-k    share of the k most likely tokens in common

Rank agreement is Kendall's tau-b and Spearman's rho (Kendall 1945; Spearman 1904, ties have the mean of their ranks)
of the reference's 50 most likely tokens: 1 is the same order, 0 none, -1 the reverse.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from scipy.stats import rankdata

TOLERANCE = 1.0
"""The difference of a logit that `apr parity` tolerates."""
LIMITS = {
    "cosine_min": (">=", 0.999),
    "kl_max": ("<=", 0.01),
    "max_abs": ("<=", TOLERANCE),
    "sigma_min": (">=", 3.0),
    "cpk_min": (">=", 1.33),
}
"""What `apr parity` asks of them. It holds the means of sigma, Cpk and KL against these; here the worst position is."""
PERFECT, _EQUAL = 99.0, 1e-10
"""Sigma and Cpk where rms(d) is less than that, as good as nothing."""
_RANKED = 50
_TOPS = (1, 5, 10)


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How the logits of an engine agree with a reference's, over the positions at which both are finite.

    Attributes:
      positions: Number of positions compared.
      not_finite: Further positions, at which a logit is NaN or infinite.
      cosine_min, cosine_mean: Of all positions.
      kl_max, kl_mean: In nats.
      max_abs: The largest difference of any logit.
      sigma_min, sigma_mean, cpk_min, cpk_mean: As above.
      top1, top5, top10: Mean shares in common.
      kendall_min, kendall_mean, spearman_min, spearman_mean: Of the reference's 50 most likely tokens.
      worst_position: Which of the compared positions has the largest difference, counted from 0.
      worst_token: The token of the vocabulary whose logit that is.
      worst_judged, worst_reference: Its two values.
    """

    positions: int
    not_finite: int
    cosine_min: float
    cosine_mean: float
    kl_max: float
    kl_mean: float
    max_abs: float
    sigma_min: float
    sigma_mean: float
    cpk_min: float
    cpk_mean: float
    top1: float
    top5: float
    top10: float
    kendall_min: float
    kendall_mean: float
    spearman_min: float
    spearman_mean: float
    worst_position: int
    worst_token: int
    worst_judged: float
    worst_reference: float

    def within(self, name: str) -> bool:
        """Whether one of LIMITS holds; with a position that is not finite none does."""
        sign, limit = LIMITS[name]
        value = getattr(self, name)
        return not self.not_finite and bool(value >= limit if sign == ">=" else value <= limit)

    @property
    def all_within(self) -> bool:
        """Whether all limits hold."""
        return all(map(self.within, LIMITS))

    def to_json(self) -> dict[str, Any]:
        """Returns the fields, and under "limits" what is asked of some and whether they keep to it."""
        limits = {name: {"bound": f"{s} {limit:g}", "within": self.within(name)} for name, (s, limit) in LIMITS.items()}
        return dataclasses.asdict(self) | {"limits": limits}


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities over the last axis, float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def parts(count: int, size: int = 64) -> Iterator[slice]:
    """Slices of `size` positions: a vocabulary in float64 is more than a megabyte a position."""
    return (slice(start, start + size) for start in range(0, count, size))


def agreement(judged: np.ndarray, reference: np.ndarray) -> Agreement:
    """Compares logits.

    Args:
      judged: [positions, V].
      reference: The same of the reference.
    """
    finite = np.isfinite(judged).all(axis=-1) & np.isfinite(reference).all(axis=-1)
    rows = np.flatnonzero(finite)
    if not rows.size:
        return _nothing(len(judged))
    found: dict[str, list[np.ndarray]] = {}
    for part in parts(len(rows)):
        chosen = rows[part]
        measured = _positions(judged[chosen].astype(np.float64), reference[chosen].astype(np.float64))
        for name, values in measured.items():
            found.setdefault(name, []).append(values)
    each = {name: np.concatenate(values) for name, values in found.items()}
    place = int(np.argmax(each["max_abs"]))
    row, token = int(rows[place]), int(each["token"][place])
    return Agreement(
        positions=len(rows),
        not_finite=int((~finite).sum()),
        **{f"{name}_min": float(each[name].min()) for name in ("cosine", "sigma", "cpk", "kendall", "spearman")},
        **{
            f"{name}_mean": float(each[name].mean()) for name in ("cosine", "kl", "sigma", "cpk", "kendall", "spearman")
        },
        **{f"top{count}": float(each[f"top{count}"].mean()) for count in _TOPS},
        kl_max=float(each["kl"].max()),
        max_abs=float(each["max_abs"].max()),
        worst_position=row,
        worst_token=token,
        worst_judged=float(judged[row, token]),
        worst_reference=float(reference[row, token]),
    )


def _nothing(positions: int) -> Agreement:
    """Where no position is finite nothing can be said, and no limit holds."""
    numbers: dict[str, Any] = {field.name: math.nan for field in dataclasses.fields(Agreement)}
    return Agreement(**numbers | {"positions": 0, "not_finite": positions, "worst_position": -1, "worst_token": -1})


def _positions(judged: np.ndarray, reference: np.ndarray) -> dict[str, np.ndarray]:
    """The statistics of each position of float64 logits [P, V], each [P]."""
    difference = np.abs(judged - reference)
    mean, spread = difference.mean(axis=-1), np.sqrt((difference * difference).mean(axis=-1))
    norms = np.linalg.norm(judged, axis=-1) * np.linalg.norm(reference, axis=-1)
    log_judged, log_reference = log_softmax(judged), log_softmax(reference)
    with np.errstate(divide="ignore", invalid="ignore"):
        cosine = np.where(norms > 0, (judged * reference).sum(axis=-1) / norms, (judged == reference).all(axis=-1))
        sigma = np.where(spread < _EQUAL, PERFECT, TOLERANCE / spread)
        cpk = np.where(spread < _EQUAL, PERFECT, (TOLERANCE - mean) / (3 * spread))
    ordered, theirs = (_most_likely(side) for side in (log_reference, log_judged))
    kendall, spearman = _ranks(
        *(np.take_along_axis(side, ordered[:, :_RANKED], axis=-1) for side in (reference, judged))
    )
    return {
        "cosine": cosine,
        "kl": np.maximum((np.exp(log_reference) * (log_reference - log_judged)).sum(axis=-1), 0.0),
        "max_abs": difference.max(axis=-1),
        "token": difference.argmax(axis=-1),
        "sigma": sigma,
        "cpk": cpk,
        "kendall": kendall,
        "spearman": spearman,
        **{f"top{count}": _in_common(ordered[:, :count], theirs[:, :count]) for count in _TOPS},
    }


def _most_likely(values: np.ndarray) -> np.ndarray:
    """The tokens of each position, the most likely first, the lower id first of equals: [P, at most 50]."""
    return np.argsort(-values, axis=-1, kind="stable")[:, :_RANKED]


def _in_common(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return (one[:, :, None] == other[:, None, :]).any(axis=-1).mean(axis=-1)


def _ranks(reference: np.ndarray, judged: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Kendall's tau-b and Spearman's rho of each row; 0 where one side has no order at all."""
    signs = [np.sign(side[:, :, None] - side[:, None, :]) for side in (reference, judged)]
    squares = [(sign * sign).sum(axis=(1, 2)) for sign in signs]
    ranks = [rankdata(side, axis=-1) for side in (reference, judged)]
    centred = [rank - rank.mean(axis=-1, keepdims=True) for rank in ranks]
    powers = [(rank * rank).sum(axis=-1) for rank in centred]

    def share(product: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        whole = np.sqrt(one * other)
        return np.divide(product, whole, out=np.zeros_like(whole), where=whole > 0)

    tau = share((signs[0] * signs[1]).sum(axis=(1, 2)), *squares)
    return tau, share((centred[0] * centred[1]).sum(axis=-1), *powers)
