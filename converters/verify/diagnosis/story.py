"""Makes one story of the causes of a model's tensors: what befell the model befell all of them.

A fine-tune, a merge or another model is one finding over its tensors: where most were trained on, a few elements that
one number or one bit happens to explain are no cause of their own. A codec that fits some tensors under several names
has the name that fits the most. Factors of channels are held against those of the tensor that they came from.
"""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from apr_jax.converters.checkpoint.tensor import Tensor
from apr_jax.converters.errors import FindingError
from apr_jax.converters.verify.diagnosis.causes import Cause
from apr_jax.converters.verify.diagnosis.context import Context, split_layer
from apr_jax.converters.verify.tensor_pairs import Pair

Told = list[tuple[Pair, Cause]]

DIFFERENT = "different-weights"
# Causes that may come about by chance, or by training, where they explain few elements.
_SLIGHT = frozenset(
    "quantised offset scaled bit-flips changed-rows scaled-rows zeroed zeroed-rows zero-signs truncated rounded-cast "
    "mantissa-cut swapped-tensors rows-permuted columns-permuted shifted non-finite".split()
) - {"non-finite"}
_FEW = 64
# Tensors that make a story, and their share of those that differ.
_ENOUGH, _SHARE = 3, 0.5
# Beyond so many times the largest distance of trained tensors a change is another one.
_FARTHER = 2.0
_LOW_RANK_SHARE = 0.2
_MOST = 0.6


def one_story(causes: Told, context: Context) -> Told:
    """Returns the causes of the tensors of one model, made to agree where they tell the same."""
    told = _moved_factors(causes, context)
    told = _common_readings(told)
    told = _common_rank(told)
    return _trained(_single_steps(told))


# --- codecs under several names


def _common_readings(causes: Told) -> Told:
    counts: collections.Counter[str] = collections.Counter()
    types: collections.Counter[str] = collections.Counter()
    for _, cause in causes:
        if cause.cause == "quantised":
            counts.update({json.dumps(reading, sort_keys=True) for reading in cause.readings or (cause.parameters,)})
            types[cause.parameters["type"]] += 1

    def agreed(cause: Cause) -> Cause:
        if cause.cause != "quantised":
            return cause
        other = next((name for name in cause.alternatives if types[name] > types[cause.parameters["type"]]), None)
        if other is not None:
            return dataclasses.replace(cause, parameters={"type": other}, alternatives=())
        # The first of those that as many tensors share.
        best = max(cause.readings, key=lambda reading: counts[json.dumps(reading, sort_keys=True)], default=None)
        return cause if best is None else dataclasses.replace(cause, parameters=best)

    return [(pair, agreed(cause)) for pair, cause in causes]


def _common_rank(causes: Told) -> Told:
    """Gives the rank that most have to those of a lower one: their smallest values are lost in rounding."""
    ranks = collections.Counter(
        json.dumps(cause.parameters, sort_keys=True) for _, cause in causes if cause.cause == "low-rank"
    )
    if len(ranks) < 2:
        return causes
    common, count = max(ranks.items(), key=lambda item: (item[1], item[0]))
    parameters = json.loads(common)
    if count <= _MOST * sum(ranks.values()) or parameters["rank"] == 1:
        return causes
    return [
        (pair, dataclasses.replace(cause, parameters=parameters))
        if cause.cause == "low-rank" and 1 < cause.parameters["rank"] < parameters["rank"]
        else (pair, cause)
        for pair, cause in causes
    ]


# --- training


def _single_steps(causes: Told) -> Told:
    """Neighbours one step away in several tensors are not flipped bits: something was computed, and a little more."""
    steps = [pair for pair, cause in causes if cause.cause == "bit-flips" and cause.parameters["bits"] == [0]]
    if len(steps) < _ENOUGH:
        return causes
    trained = Cause(DIFFERENT, {"kind": "fine-tuned"}, 0.0, evidence="elements are one step of their type away")
    return [(pair, trained if any(pair is step for step in steps) else cause) for pair, cause in causes]


def _trained(causes: Told) -> Told:
    trained = [(pair, cause) for pair, cause in causes if _is_different(cause)]
    if len(trained) < _ENOUGH or len(trained) < _SHARE * len(causes):
        return causes
    kind = _dominant_kind(trained)
    # A tensor that was zero has no distance from what it was.
    distances = [_distance(pair) for pair, _ in trained if np.isfinite(_distance(pair))]
    farthest = _FARTHER * max(distances, default=np.inf)
    matrices = [cause for pair, cause in causes if len(pair.b.shape) > 1]
    few_ranks = sum(cause.cause == "low-rank" for cause in matrices) <= _LOW_RANK_SHARE * len(matrices)

    def belongs(pair: Pair, cause: Cause) -> bool:
        if _is_different(cause):
            return _same_fate(pair, cause.parameters["kind"], kind)
        if cause.cause == "low-rank":
            return few_ranks and kind != "replaced"
        if cause.cause == "changed-rows":
            return _distance(pair) <= farthest
        slight = pair.weight < _FEW or (kind == "replaced" and len(pair.b.shape) == 1)
        return cause.cause in _SLIGHT and slight and _distance(pair) <= max(farthest, 1.0 * (kind == "replaced"))

    story = Cause(DIFFERENT, {"kind": kind}, 0.0, evidence="as most tensors of the model")
    return [(pair, story if belongs(pair, cause) else cause) for pair, cause in causes]


def _is_different(cause: Cause) -> bool:
    return cause.cause == DIFFERENT and cause.parameters.get("kind") != "other shape"


def _dominant_kind(trained: Told) -> str:
    """Returns what most elements of matrices met with; vectors are alike even in models that have nothing in common."""
    sizes: collections.Counter[str] = collections.Counter()
    for pair, cause in trained:
        if len(pair.b.shape) > 1 and cause.parameters["kind"] != "from zero":
            sizes[cause.parameters["kind"]] += pair.weight
    if not sizes:
        sizes.update(cause.parameters["kind"] for _, cause in trained if cause.parameters["kind"] != "from zero")
    if not sizes:
        return "from zero"
    near = sizes["fine-tuned"] + sizes["related"]
    if sizes["replaced"] > near:
        return "replaced"
    return "fine-tuned" if sizes["fine-tuned"] >= sizes["related"] else "related"


def _same_fate(pair: Pair, kind: str, of_model: str) -> bool:
    if len(pair.b.shape) == 1 or kind == "from zero":
        return True
    near = ("fine-tuned", "related")
    return kind == of_model or (kind in near and of_model in near)


def _distance(pair: Pair) -> float:
    return pair.sums.relative_l2 if pair.sums is not None else np.inf


# --- factors of channels, and where they came from


@dataclasses.dataclass(frozen=True)
class _Move:
    """Tensors between which factors of channels cancel: what is in front, and the matrices that read it."""

    source: str
    into: tuple[str, ...]
    heads: bool = False


_MOVES = (
    _Move("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    _Move("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    _Move("self_attn.v_proj", ("self_attn.o_proj",), heads=True),
    _Move("mlp.up_proj", ("mlp.down_proj",)),
)
_LAST = _Move("model.norm", ("lm_head",))


@dataclasses.dataclass(frozen=True)
class _Cancelled:
    """A move that was found.

    Attributes:
      move: Which.
      parts: The tensors that were changed together.
      halves: Of tensors with factors on both sides, of which only the products are known: what has to be taken from
        this side's factors to the other side's. It is the same for both sides, if the function is.
    """

    move: _Move
    parts: tuple[str, ...]
    halves: Mapping[str, float]

    @property
    def words(self) -> dict[str, Any]:
        short = [name.rsplit(".", 1)[-1] for name in (self.move.source, *self.move.into)]
        return {"from": short[0], "into": short[1:]}


def _moved_factors(causes: Told, context: Context) -> Told:
    """Says of factors of channels whether they cancel: then the model computes the same."""
    rescaled = {pair.name: cause for pair, cause in causes if cause.cause == "rescaled-channels"}
    if not rescaled:
        return causes
    named: dict[str, dict[str, Any]] = {}
    found = (_cancel(prefix, move, rescaled, context) for prefix, move in _places(rescaled))
    for together in _joined(cancelled for cancelled in found if cancelled is not None):
        parts = {part for cancelled in together for part in cancelled.parts}
        if all(_on_both_sides(name, together, context) for name in parts if len(_factors(name, rescaled)) > 1):
            words = [cancelled.words for cancelled in together]
            parameters = words[0] if len(words) == 1 else {"moves": words}
            named |= dict.fromkeys(parts, parameters | {"function": "unchanged"})

    def told(pair: Pair, cause: Cause) -> Cause:
        if pair.name in named:
            explained = cause.explained or 1.0
            return Cause("rescaled-channels", named[pair.name], explained, evidence="the factors of both sides cancel")
        if pair.name in rescaled:
            return dataclasses.replace(cause, parameters=cause.parameters | {"function": "changed"})
        return cause

    return [(pair, told(pair, cause)) for pair, cause in causes]


def _joined(moves: Iterable[_Cancelled]) -> list[list[_Cancelled]]:
    """Puts moves together that have a tensor in common, which has factors of both."""
    groups: list[list[_Cancelled]] = []
    for move in moves:
        touching = [group for group in groups if any(set(move.parts) & set(other.parts) for other in group)]
        groups = [group for group in groups if group not in touching]
        groups.append([*(other for group in touching for other in group), move])
    return groups


def _on_both_sides(name: str, together: Sequence[_Cancelled], context: Context) -> bool:
    """Whether the factors of both sides of a tensor cancel, and what one side lacks the other has."""
    halves = [cancelled.halves[name] for cancelled in together if name in cancelled.halves]
    return len(halves) == 2 and abs(halves[0] / halves[1] - 1) <= _slack(context.b[name])


def _places(names: Iterable[str]) -> Iterator[tuple[str, _Move]]:
    prefixes = {name[: name.index(rest)] for name in names for _, rest in (split_layer(name),) if rest != name}
    for prefix in sorted(prefixes):
        for move in _MOVES:
            yield prefix, move
    yield "", _LAST


def _cancel(prefix: str, move: _Move, rescaled: Mapping[str, Cause], context: Context) -> _Cancelled | None:
    """Returns the tensors that were changed together if the factors of the source and of its readers cancel."""
    source = f"{prefix}{move.source}.weight"
    if source not in context.a or source not in context.b:
        return None
    factors = _factors_of(source, rescaled, context)
    if factors is None:
        return None
    # Of a tensor with factors on both sides these are known but for a number.
    open_ = len(_factors(source, rescaled)) > 1
    parts, halves = [source], dict[str, float]()
    if len(context.a[source].shape) > 1 and (bias := f"{prefix}{move.source}.bias") in context.a:
        # What is added in front of the reader has to be scaled, too.
        ratio = _ratio(context.a[bias], context.b.get(bias))
        if ratio is None or ratio.shape != factors.shape:
            return None
        # Zeros stay zeros, whatever they are multiplied by.
        if not np.isnan(ratio).all():
            number = _number(ratio / factors, context.a[bias], ratio == ratio, any_=open_)
            if number is None:
                return None
            factors, open_ = factors * number, False
            halves |= {source: 1 / number} if len(_factors(source, rescaled)) > 1 else {}
            parts.append(bias)
    for reader in (f"{prefix}{name}.weight" for name in move.into):
        if reader not in context.a or 1 not in _factors(reader, rescaled):
            return None
        theirs = _factors(reader, rescaled)
        mine = _repeated(factors, theirs[1], context) if move.heads else factors
        both = len(theirs) > 1
        if mine.shape != theirs[1].shape or (both and open_):
            return None
        number = _number(mine * theirs[1], context.b[reader], any_=both or open_)
        if number is None:
            return None
        if both:
            halves[reader] = 1 / number
        elif open_:
            halves[source], factors, open_ = number, factors / number, False
        parts.append(reader)
    return _Cancelled(move, tuple(parts), halves)


def _factors(name: str, rescaled: Mapping[str, Cause]) -> Mapping[int, np.ndarray]:
    return (rescaled[name].factors if name in rescaled else None) or {}


def _factors_of(name: str, rescaled: Mapping[str, Cause], context: Context) -> np.ndarray | None:
    """Returns the factor that each output channel of a tensor was multiplied by."""
    if len(context.a[name].shape) == 1:
        return _ratio(context.a[name], context.b[name])
    return _factors(name, rescaled).get(0)


def _ratio(before: Tensor, after: Tensor | None) -> np.ndarray | None:
    if after is None or before.shape != after.shape:
        return None
    try:
        one, two = (np.asarray(tensor.read()).astype(np.float64).reshape(-1) for tensor in (before, after))
    except FindingError:
        return None
    with np.errstate(all="ignore"):
        return np.where((one == 0) & (two == 0), np.nan, two / one)


def _repeated(factors: np.ndarray, wanted: np.ndarray, context: Context) -> np.ndarray:
    """Repeats the factors of V's heads for the query heads that read them."""
    config = context.config
    times = len(wanted) // max(1, len(factors))
    if config is None or times < 2 or len(factors) % config.head_dim:
        return factors
    return np.repeat(factors.reshape(-1, config.head_dim), times, 0).reshape(-1)


def _number(
    products: np.ndarray, tensor: Tensor, where: np.ndarray | None = None, *, any_: bool = False
) -> float | None:
    """Returns 1, or `any_` number, if nearly all products are that, as far as the rounding of both factors tells."""
    told = np.isfinite(products) if where is None else np.isfinite(products) & where
    if not told.any():
        return None
    number = float(np.median(products[told])) if any_ else 1.0
    near = np.abs(products[told] - number) <= _slack(tensor) * abs(number)
    return number if number and np.mean(near) >= 0.99 else None


def _slack(tensor: Tensor) -> float:
    return {"f32": 1e-4, "f64": 1e-4, "f16": 2e-3}.get(tensor.dtype.name, 1.2e-2)
