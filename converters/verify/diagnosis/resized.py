"""Finds tensors that became longer, wider, shorter or narrower, and are the original where both have something."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from apr_jax.converters.verify.diagnosis import pair as pairs
from apr_jax.converters.verify.diagnosis.causes import Found
from apr_jax.converters.verify.diagnosis.context import Context, projection
from apr_jax.converters.verify.diagnosis.pair import Bits, Pair
from apr_jax.converters.verify.diagnosis.sparse import ranges

# Relative L2 up to which a common part that is not equal is still the original's, trained on.
_NEAR = 0.5


def resized(pair: Pair, context: Context) -> Iterator[Found]:
    """Rows or columns added or removed; heads repeated."""
    if len(pair.a.shape) != len(pair.b.shape) or len(pair.b.shape) not in (1, 2) or pair.original.bits.size == 0:
        return
    if pair.size == 0:
        return
    if (repeated := _repeated(pair, context)) is not None:
        yield repeated
        return
    before, after = (_matrix(bits, shape) for bits, shape in ((pair.x, pair.a.shape), (pair.y, pair.b.shape)))
    rows, columns = (min(sizes) for sizes in zip(before.shape, after.shape, strict=True))
    if 2 * rows < max(len(before), len(after)) and 4 * rows < len(before):
        return
    distance, differing = _distance(pair, before[:rows, :columns], after[:rows, :columns])
    if differing and len(after) < len(before) and columns == before.shape[1] == after.shape[1]:
        yield from _picked(before, after)
    if distance > _NEAR:
        return
    parameters: dict[str, Any] = {"first": [rows, columns] if len(pair.b.shape) > 1 else rows}
    if differing:
        parameters["relative_l2"] = float(f"{distance:.3g}")
    names = []
    for axis, name in enumerate(("rows", "columns")):
        more = after.shape[axis] - before.shape[axis]
        if more:
            names.append(f"{name}-{'added' if more > 0 else 'removed'}")
            parameters[name] = abs(more)
    added = [part for part in (after[rows:], after[:rows, columns:]) if part.size]
    if len(before) < len(after) or before.shape[1] < after.shape[1]:
        parameters["holds"] = _content(pair, added)
    evidence = "the common part is equal" if not differing else f"the common part is near, relative L2 {distance:.3g}"
    common = rows * columns
    yield Found(names[0], parameters, (common - differing) / common, evidence)


def _matrix(bits: Bits, shape: tuple[int, ...]) -> Bits:
    return bits.reshape(shape if len(shape) > 1 else (shape[0], 1))


def _distance(pair: Pair, before: Bits, after: Bits) -> tuple[float, int]:
    """Returns relative L2 of the common part, and how many of its elements differ."""
    differing, distance, norm = 0, 0.0, 0.0
    step = max(1, (1 << 18) // max(1, before.shape[1]))
    for begin in range(0, len(before), step):
        one, two = (np.ascontiguousarray(part[begin : begin + step]) for part in (before, after))
        differs = np.count_nonzero(one != two)
        values = pairs.values_of(one, pair.type).astype("<f8")
        norm += float((values * values).sum())
        if differs:
            differing += int(differs)
            distance += float(((pairs.values_of(two, pair.type) - values) ** 2).sum())
    return (distance / norm) ** 0.5 if norm else float(differing > 0), differing


def _content(pair: Pair, added: list[Bits]) -> str:
    values = np.concatenate([pairs.values_of(np.ascontiguousarray(part), pair.type).reshape(-1) for part in added])
    if not values.any():
        return "zeros"
    return "one value" if np.all(values == values[0]) else "values of their own"


def _picked(before: Bits, after: Bits) -> Iterator[Found]:
    """Rows left out elsewhere than at the end; the order of the others is kept."""
    from apr_jax.converters.verify.diagnosis.orders import labels, line_hashes

    one, two = labels(line_hashes(before, 0), line_hashes(after, 0))
    place, kept = 0, []
    order = np.argsort(one, kind="stable")
    ordered = one[order]
    for label in two.tolist():
        found = order[np.searchsorted(ordered, label) : np.searchsorted(ordered, label, side="right")]
        found = found[found >= place]
        if not found.size:
            return
        kept.append(int(found[0]))
        place = kept[-1] + 1
    lost = np.setdiff1d(np.arange(len(one)), kept)
    parameters = {"rows": len(lost), "ranges": ranges(lost)}
    yield Found("rows-removed", parameters, 1.0, "the rows that are left are equal, and in order")


def _repeated(pair: Pair, context: Context) -> Found | None:
    """Every head several times, as tensor-parallel exports repeat KV heads."""
    name = pair.b.name
    role = projection(name)
    axis = 1 if role == "o" and len(pair.b.shape) > 1 else 0
    before, after = (_matrix(bits, shape) for bits, shape in ((pair.x, pair.a.shape), (pair.y, pair.b.shape)))
    if axis:
        before, after = before.T, after.T
    times, rest = divmod(len(after), len(before))
    if role in (None, "qkv") or times < 2 or rest or before.shape[1] != after.shape[1]:
        return None
    for heads, dim in context.head_sizes(name, len(before)):
        blocks = before.reshape(heads, dim, -1)
        for order, wanted in (
            ("each beside itself", np.repeat(blocks, times, 0)),
            ("one set after the other", np.tile(blocks, (times, 1, 1))),
        ):
            if np.array_equal(wanted.reshape(after.shape), after):
                parameters = {"times": times, "head_dim": dim, "order": order}
                return Found("heads-repeated", parameters, 1.0, f"each of {heads} heads of {dim} stands {times} times")
    return None
