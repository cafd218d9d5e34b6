"""Describes weights that differ without a known cause: fine-tuned, replaced or related, by their correlation.

Where only some rows or columns differ, these are named.
"""

from __future__ import annotations

import math

import numpy as np

from apr_jax.converters.verify.diagnosis import channels, sparse
from apr_jax.converters.verify.diagnosis import pair as pairs
from apr_jax.converters.verify.diagnosis.causes import Cause
from apr_jax.converters.verify.diagnosis.pair import Pair

_MEASURED = 1 << 15
_RUN = 64
# Correlation of trained-on weights with what they were is nearly 1; that of two trainings is nearly 0.
_FINE_TUNED = 0.9
_RELATED = 0.3


def different_weights(pair: Pair) -> Cause:
    """Returns the cause `different-weights`, with what tells fine-tuned weights from replaced ones."""
    if not pair.same_count:
        evidence = f"{list(pair.a.shape)} {pair.a.dtype.name} in place of {list(pair.b.shape)} {pair.b.dtype.name}"
        return Cause("different-weights", {"kind": "other shape"}, 0.0, evidence=evidence)
    lines = channels.single_lines(pair)
    if lines is not None:
        parameters = {"axis": lines[0], "rows": len(lines[1]), "ranges": sparse.ranges(lines[1])}
        return Cause("changed-rows", parameters, 0.0, evidence="no cause fits; all others are equal")
    select = _spread(pair)
    before = pairs.values_of(pair.original.bits[select], pair.original.dtype.name).astype("<f8")
    after = pairs.values_of(pair.y[select], pair.type).astype("<f8")
    changed = pair.differing / pair.size
    finite = np.isfinite(before) & np.isfinite(after)
    before, after = before[finite], after[finite]
    norm = _length(before)
    relative = _length(after - before) / norm if norm else math.inf
    correlation = _correlation(before, after)
    kind = _kind(before.size, correlation, relative) if norm else "from zero"
    correlated = "undefined" if correlation is None else f"{correlation:.4f}"
    evidence = (
        f"no cause fits: {changed:.1%} of the elements differ, correlation with the original {correlated}, "
        f"relative L2 {relative:.3g}"
    )
    return Cause("different-weights", {"kind": kind}, 0.0, evidence=evidence)


def _spread(pair: Pair) -> np.ndarray:
    """Returns indices of runs spread over the whole tensor."""
    if pair.size <= _MEASURED:
        return np.arange(pair.size)
    starts = np.linspace(0, pair.size - _RUN, _MEASURED // _RUN).astype(np.int64)
    return (starts[:, None] + np.arange(_RUN)).reshape(-1)


def _correlation(before: np.ndarray, after: np.ndarray) -> float | None:
    if before.size < 2:
        return None
    before, after = before - before.mean(), after - after.mean()
    scale = _length(before) * _length(after)
    # A constant has nothing to correlate with.
    return float((before * after).sum()) / scale if scale else None


def _length(values: np.ndarray) -> float:
    # Not a BLAS call, whose threads would wait for each other on a busy machine.
    return math.sqrt(float((values * values).sum()))


def _kind(count: int, correlation: float | None, relative: float) -> str:
    if correlation is None:
        return "fine-tuned" if relative < 0.1 else "replaced"
    if correlation >= _FINE_TUNED and relative < 0.5:
        return "fine-tuned"
    # Few elements correlate by chance.
    if abs(correlation) < max(_RELATED, min(0.85, 3.5 / math.sqrt(max(1, count)))):
        return "replaced"
    return "related"
