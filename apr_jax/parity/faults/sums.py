"""Sums of products that leave some of their terms out: a tail of split K, a tile, a loop that ends too early."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from apr_jax.parity.faults.products import MULTIPLIED, columns_of
from apr_jax.parity.faults.record import Fault, Instead, Mistakes
from apr_jax.parity.question import Question
from apr_jax.parity.replay import PRODUCTS, QKV, At, Replay, Value
from apr_jax.trace.stages import Key

_SAMPLED = 2048
"""Results of the product that shares of its terms are solved from."""
_GROUPS = 256
"""Terms are first solved for in as many groups, then one by one where the run of missing ones ends."""
_MISSING = 0.5
"""A term counts as left out if more than this share of it is missing."""
_TILES = (32, 64, 128, 256)

_Pair = tuple[Value, Value]


def _names(question: Question, stage: str) -> list[str]:
    """The products of a stage: by tensor or, where none is multiplied with or it may be the embedding, by stage."""
    if stage == "qkv_matmul":
        return [name for name in (f"self_attn.{part}.weight" for part in QKV) if question.only in name]
    return [PRODUCTS[stage][1] if stage in PRODUCTS else stage]


def _stages(replay: Replay, product: str, **_: Any) -> tuple[str, ...]:
    if any(part in product for part in QKV):
        return ("qkv_matmul",)
    return tuple(stage for stage in MULTIPLIED if product in (stage, PRODUCTS.get(stage, ("", ""))[1]))


def _without(pair: _Pair, at: At, product: str, first: int, last: int) -> _Pair:
    x, weight = pair
    if at.what == product:
        weight = weight.copy()
        weight[..., first : last + 1] = 0
    return x, weight


def _missing(question: Question) -> Iterator[Mistakes]:
    """The run of columns whose terms theirs lack: the share of each that is missing is solved for."""
    if question.stage not in MULTIPLIED or (question.parts() and not question.only):
        return
    for product in _names(question, question.stage):
        terms, lacking = _sample(question, product)
        columns = terms.shape[1]
        edges = np.unique(np.linspace(0, columns, min(columns, _GROUPS) + 1).astype(int))
        found = _run(np.add.reduceat(terms, edges[:-1], axis=1), lacking)
        if found is None:
            continue
        first, end = edges[found[0]], edges[found[1] + 1]
        if len(edges) <= columns:
            first, end = _ends(terms, lacking, edges, *found)
        if end - first < columns:
            yield (CUT_SHORT.made(product=product, first=int(first), last=int(end) - 1),)


def _sample(question: Question, product: str) -> _Pair:
    """Some results of a product: their terms [n, K], and what theirs lack of their sum [n]."""
    seen: list[_Pair] = []
    watch = Fault("watched", "", changes={"terms": lambda pair, at: _watched(seen, pair, at.what == product)})
    lacking = question.value((watch.made(),)) - question.their_rows()
    x, weight = seen[-1]
    counted = np.broadcast_to(question.counted(), lacking.shape)
    if question.stage == "attention":
        lacking, counted = (_by_head(each, x.shape[1]) for each in (lacking, counted))
    if question.stage == "attn_scores":
        lacking = lacking * question.replay.config.head_dim**0.5
    places = np.argwhere(counted)
    places = places[np.random.default_rng(0).permutation(len(places))[:_SAMPLED]].T
    *batch, row, column = places
    right = weight[(*batch, column)] if weight.ndim == x.ndim == 4 else weight[column]
    return x[(*batch, row)] * right, lacking[tuple(places)]


def terms_of(replay: Replay, key: Key) -> list[tuple[str, Value, Value, slice]]:
    """Returns the products of a stage: the name, what is multiplied, and which of the stage's channels it gives.

    Args:
      replay: Where all that the stage is computed from is known.
      key: The stage; it may have none.
    """
    seen: list[tuple[str, _Pair]] = []

    def watched(pair: _Pair, at: At) -> _Pair:
        seen.append((at.what, pair))
        return pair

    replay.under((Fault("watched", "", changes={"terms": watched}).made(),)).compute(key)
    if len(seen) == 1:
        return [(what, *pair, slice(None)) for what, pair in seen]
    ends = np.cumsum([0, *(len(weight) for _, (_, weight) in seen)])
    return [(what, *pair, slice(ends[n], ends[n + 1])) for n, (what, pair) in enumerate(seen)]


def _watched(seen: list[_Pair], pair: _Pair, wanted: bool) -> _Pair:
    if wanted:
        seen.append(pair)
    return pair


def _by_head(values: Value, heads: int) -> Value:
    """[B, T, N H] -> [B, N, T, H]."""
    return values.reshape(*values.shape[:2], heads, -1).swapaxes(1, 2)


def _run(terms: Value, lacking: Value) -> tuple[int, int] | None:
    """First and last of the run of terms [n, K] that are missing, if any are: least squares for the share of each."""
    shares = np.linalg.lstsq(terms, lacking, rcond=None)[0] - _MISSING
    sums = np.concatenate([[0.0], np.cumsum(shares)])
    ends = np.maximum.accumulate(sums[::-1])[::-1]
    first = int(np.argmax(ends[1:] - sums[:-1]))
    last = first + int(np.argmax(sums[first + 1 :]))
    return (first, last) if sums[last + 1] > sums[first] else None


def _ends(terms: Value, lacking: Value, edges: np.ndarray, first: int, last: int) -> tuple[int, int]:
    """The exact ends of a run of groups: the terms of the groups around both are solved for one by one."""
    start, end = edges[max(first - 1, 0)], edges[min(last + 2, len(edges) - 1)]
    inside = slice(edges[first + 1], edges[last]) if last - first > 1 else slice(0, 0)
    open_ones = np.r_[start : inside.start, inside.stop : end] if inside.stop else np.arange(start, end)
    rest = lacking - terms[:, inside].sum(axis=1)
    shares = np.linalg.lstsq(terms[:, open_ones], rest, rcond=None)[0]
    missing = np.concatenate([open_ones[shares > _MISSING], np.arange(inside.start, inside.stop)])
    return (int(missing.min()), int(missing.max()) + 1) if len(missing) else (edges[first], edges[last + 1])


def _tails(question: Question, node: Key) -> Iterator[Mapping[str, Any]]:
    """Behind a gap: what is left over behind whole tiles, and the last tile."""
    if node.stage not in MULTIPLIED:
        return
    columns = columns_of(question.replay)[node.stage]
    firsts = dict.fromkeys((*(columns - columns % tile for tile in _TILES), *(columns - tile for tile in (1, *_TILES))))
    for product in _names(question, node.stage):
        yield from (
            {"product": product, "first": first, "last": columns - 1} for first in firsts if 0 < first < columns
        )


CUT_SHORT = Fault(
    "sum-cut-short",
    "{product}: the sum leaves out columns {first} to {last}",
    _stages,
    {"terms": _without},
    solve=_missing,
    variants=_tails,
    alone=True,
    formula=Instead("y = Σ_i x[i] W[:, i], i from {first} to {last} left out", "y = Σ_i x[i] W[:, i]"),
)
FAULTS = (CUT_SHORT,)
