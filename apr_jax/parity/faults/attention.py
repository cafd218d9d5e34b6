"""Mistakes of attention: masks, scale, the softmax's sum, heads, positions in the cache."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from apr_jax.parity import narrow, round_numbers
from apr_jax.parity.faults import soft_cap
from apr_jax.parity.faults.record import IGNORED, UNION, Fault, Grid, Instead, Mistakes
from apr_jax.parity.localise import EPSILON
from apr_jax.parity.question import Question
from apr_jax.parity.replay import At
from apr_jax.trace.stages import Key

# --- Masks -----------------------------------------------------------------------------------------------------------

_MASKED = ("attn_scores", "attn_softmax")
_MOST_BETWEEN = 64
"""As many positions between two that were dumped are tried."""


def _last_keys(question: Question, node: Key) -> Iterator[Mapping[str, Any]]:
    replay = question.replay
    for last in (-1, 1):
        yield {"last": last}
        seen = replay.under((OFF_BY_ONE.made(last=last),)).visible(node.layer)
        if not seen[replay.tokens()].any(axis=-1).all():
            # What a query that sees nothing gets depends on how the engine masks.
            yield from ({"last": last, "empty": empty} for empty in ("self", "zero"))


def _empty_row(row: np.ndarray, at: At, last: int, empty: str = "uniform") -> np.ndarray:
    if empty == "uniform":
        return row
    if empty == "self":
        return np.arange(at.replay.length) == at.replay.places()[:, None]
    return np.array(0.0)


def _windows(question: Question, node: Key) -> Iterable[Mapping[str, Any]]:
    """How wide a window is: read off the pairs that are not zero or, behind a gap, as wide as the tokens before the
    first one that is off; beside another mistake, which hides that, powers of two."""
    right = question.replay.config.window_of(node.layer)
    if node == question.nodes[-1] and node.stage in _MASKED:
        columns = question.replay.places()
        causal = question.replay.under((WITHOUT_WINDOW.made(),)).visible(node.layer)
        shown = (np.abs(question.theirs).max(axis=1) > 0) & causal & question.tokens[:, :, None]
        width = int(np.where(shown, columns[:, None] - np.arange(question.replay.length) + 1, 0).max(initial=0))
        return [{"window": width}] if 0 < width < question.replay.length and width != right else []
    last = int(question.replay.inputs.positions().max())
    wrong = question.off() > max(1e-3, question.nothing) * np.abs(question.right).max()
    windows = dict.fromkeys(
        (
            *_firsts(question, wrong, question.replay.positions()),
            *(1 << power for power in range(2, (last + 1).bit_length())),
        )
    )
    return [{"window": window} for window in windows if 0 < window <= last and window != right]


def _firsts(question: Question, wrong: np.ndarray, positions: np.ndarray) -> range:
    """Where what is wrong may begin: at the first wrong position or, of an excerpt, behind the last right one."""
    first = int(np.where(wrong, positions, int(positions.max()) + 1).min())
    before = int(np.where(question.tokens & (positions < first), positions, -1).max())
    return range(first, max(before, first - _MOST_BETWEEN), -1)


def _chunks(question: Question, node: Key) -> Iterable[Mapping[str, Any]]:
    """How long chunks are: the first query that is off begins the second one; beside another mistake powers of two."""
    last = int(question.replay.inputs.positions().max())
    wrong = question.off() > max(1e-3, question.nothing) * np.abs(question.right).max()
    # Chunks are of columns, padding included, as a cache is written.
    firsts = _firsts(question, wrong, np.broadcast_to(question.replay.places(), wrong.shape))
    sizes = dict.fromkeys((*firsts, *(1 << power for power in range(2, (last + 1).bit_length()))))
    return [{"size": size} for size in sizes if 0 < size <= last]


WITHOUT_WINDOW = Fault(
    "mask-without-window",
    "the sliding window is not applied: all keys before are seen",
    _MASKED,
    {"window": lambda right, at: None},
    variants=lambda question, node: [{}] if question.replay.config.window_of(node.layer) is not None else [],
    formula="{right}, but for all j ≤ i",
)
OFF_BY_ONE = Fault(
    "mask-off-by-one",
    "the last visible key is i {last:+d}, not i",
    _MASKED,
    {"last_key": lambda right, at, last, empty=None: last, "empty_row": _empty_row},
    variants=_last_keys,
    merge={"empty": IGNORED},
    formula="{right}, but for j ≤ i {last:+d}",
)
_MASKS = (
    Fault(
        "mask-not-causal",
        "the attention mask is not causal: all keys are seen",
        _MASKED,
        {"last_key": lambda right, at: at.replay.length},
        formula="{right}, for all j",
    ),
    OFF_BY_ONE,
    Fault(
        "padding-attended",
        "padded keys are seen",
        _MASKED,
        {"real_keys": lambda real, at: np.ones_like(real)},
        variants=lambda question, node: [{}] if (question.replay.inputs.attention_mask == 0).any() else [],
        formula="{right}, padded j too",
    ),
    Fault(
        "mask-window",
        "only the last {window} keys are seen",
        _MASKED,
        {"window": lambda right, at, window: window},
        variants=_windows,
        formula="{right}, but for i − {window} < j ≤ i",
    ),
    WITHOUT_WINDOW,
    Fault(
        "mask-chunk",
        "queries see the keys of their own chunk of {size} only",
        _MASKED,
        {"first_key": lambda right, at, size: at.replay.places() // size * size},
        variants=_chunks,
        formula="{right}, but for j from i − i mod {size} on",
    ),
)

# --- Scores and shares -----------------------------------------------------------------------------------------------


def _scales(question: Question) -> Iterator[Mistakes]:
    """The factor between their scores and ours, least squares."""
    raw, seen = question.value(()), question.seen()
    theirs = np.where(seen, question.probe.look(question.stage, question.theirs), 0)
    power = float((raw * raw * seen).sum())
    ratio = float((theirs * raw).sum()) / power if power else 1.0
    if abs(ratio - 1) > question.nothing:
        yield from (
            (SCALE.made(scale=scale),) for scale in round_numbers.scales(ratio * question.replay.config.head_dim**-0.5)
        )


def _warp(summed: np.ndarray, at: At) -> np.ndarray:
    """Maximum and sum run over the first 32 of every 64 keys; where those see none, over all."""
    lanes = summed & (np.arange(summed.shape[-1]) % 64 < 32)
    return np.where(lanes.any(axis=-1, keepdims=True), lanes, summed)


SCALE = Fault(
    "softmax-scale",
    "the softmax scale is {scale:.6g}, not 1/sqrt(head_dim)",
    ("attn_scores",),
    {"scale": lambda right, at, scale: scale},
    solve=_scales,
    grid=Grid("scale", tuple(2.0 ** (power / 2) for power in range(-12, 5)), round_numbers.scales),
    formula="s[h, i, j] = {scale:.6g} · q[h, i] · k[h // {group}, j]",
)

# --- Less precise than float32, or bounded ---------------------------------------------------------------------------

SOFT_CAP = soft_cap.fault(
    "softmax-soft-cap", "the scores are bounded softly by {cap:.6g} (tanh)", "attn_scores", "scores"
)
SCORES_PRECISION = Fault(
    "scores-precision",
    "the attention scores are computed in {dtype}",
    ("attn_scores",),
    {
        "raw_scores": lambda raw, at, dtype, product="": narrow.rounded(raw, product) if product else raw,
        "scores": lambda raw, at, dtype, product="": narrow.rounded(raw, dtype),
    },
    variants=lambda question, node: [{"dtype": dtype} for dtype in narrow.FLOATS],
    # Either what is left after the scale is rounded, or the product before it as well: to the same, or to more bits.
    ways=lambda dtype: tuple({"product": each} for each in narrow.FLOATS[: narrow.FLOATS.index(dtype) + 1]),
    alone=True,
    chaotic=True,
    formula="{right}, rounded to {dtype}",
)
SOFTMAX_PRECISION = Fault(
    "softmax-precision",
    "the attention shares are computed in {dtype}",
    ("attn_softmax",),
    {
        "softmax_input": lambda raw, at, dtype, steps="shares": (
            raw if steps == "shares" else narrow.rounded(raw, dtype)
        ),
        "shares": lambda shares, at, dtype, steps="shares": narrow.rounded(shares, dtype),
    },
    variants=lambda question, node: [{"dtype": dtype} for dtype in narrow.FLOATS],
    # Either the shares are rounded, or the scores that they are computed from as well.
    ways=lambda dtype: ({"steps": "scores"},),
    alone=True,
    chaotic=True,
    formula="{right}, rounded to {dtype}",
)
_CACHED = {"k": ("attn_scores",), "v": ("attention",)}


def _caches_held(question: Question, node: Key) -> Iterator[Mapping[str, Any]]:
    for part, stages in _CACHED.items():
        if node.stage in stages:
            yield from ({"part": part, "dtype": dtype} for dtype in narrow.CACHES)


CACHE_PRECISION = Fault(
    "cache-precision",
    "the cache holds {part} in {dtype}",
    lambda replay, part, **_: _CACHED[part],
    {"cached": lambda x, at, part, dtype: narrow.rounded(x, dtype) if at.what == part else x},
    variants=_caches_held,
    merge={"part": UNION},
    alone=True,
    chaotic=True,
    formula=Instead("{part} rounded to {dtype} in the cache", "{part} in the cache as it was computed"),
)

# --- The cache -------------------------------------------------------------------------------------------------------

_SHIFTS = (1, -1, 2, -2, 3, -3, 4, -4)


def _caches(question: Question, node: Key) -> Iterator[Mapping[str, Any]]:
    """Caches written or read at position + n, where positions are right up to some column."""
    off, size = question.off().max(axis=0), float(np.abs(question.right).max())
    # What the first wrong column is off by may be little more than rounding.
    nothings = [max(1e-3, times * EPSILON[question.dtype]) for times in (1.25, 2.5, 5.0)]
    places = question.replay.places()
    firsts = dict.fromkeys(int(places[np.argmax(off > nothing * size)]) for nothing in nothings)
    if node == question.nodes[-1]:
        firsts |= dict.fromkeys(first - 1 for first in firsts)
    for first, shift, side in itertools.product(firsts, _SHIFTS, ("write", "read")):
        if first > 0:
            yield {"shift": shift, "side": side, "prefill": first}


def _tokens_read(right: None, at: At, shift: int, side: str, prefill: int) -> np.ndarray:
    """Which token each query finds at each column of a cache that is written or read at position + n, [T, S]."""
    length, places = at.replay.length, at.replay.places()
    tokens = np.tile(np.arange(length), (len(places), 1))
    slots = np.where(np.arange(length) < prefill, np.arange(length), -1)
    wanted = {token: row for row, token in enumerate(places.tolist())}
    for token in range(prefill, length):
        slot = token + shift if side == "write" else token
        if 0 <= slot < length:
            slots[slot] = token
        if token in wanted:
            found = np.arange(length) + (shift if side == "read" else 0)
            inside = (found >= 0) & (found < length)
            tokens[wanted[token]] = np.where(inside, slots[np.clip(found, 0, length - 1)], -1)
    return tokens


FAULTS = (
    SCALE,
    SOFT_CAP,
    SCORES_PRECISION,
    SOFTMAX_PRECISION,
    CACHE_PRECISION,
    Fault(
        "kv-heads-interleaved",
        "query head h reads KV head h mod n_kv; it needs h // group",
        ("attn_scores", "attention"),
        {"kv_heads": lambda heads, at: np.arange(len(heads)) % at.replay.config.num_kv_heads},
        formula={
            "attn_scores": "s[h, i, j] = q[h, i] · k[h mod {num_kv_heads}, j] / √d",
            "attention": "y[h, i] = Σ_j p[h, i, j] v[h mod {num_kv_heads}, j]",
        },
    ),
    Fault(
        "v-heads-swapped",
        "the heads of v are in reverse order",
        ("attention",),
        {"v_heads": lambda v, at: v[:, :, ::-1]},
        formula="y[h, i] = Σ_j p[h, i, j] v[{num_kv_heads} − 1 − h // {group}, j]",
    ),
    *_MASKS,
    Fault(
        "softmax-partial-warp",
        "the softmax sums over the first 32 keys of every 64 only",
        ("attn_softmax",),
        {"summed": _warp},
        formula="p[i, j] = exp(s[i, j]) / Σ_m exp(s[i, m]), m mod 64 < 32 only",
    ),
    Fault(
        "cache-position",
        "decoding steps {side} the cache at position {shift:+d}",
        ("attn_scores", "attention"),
        {"tokens_read": _tokens_read},
        variants=_caches,
        formula="{right}, where j is {side} at j {shift:+d} in decoding steps",
    ),
)
