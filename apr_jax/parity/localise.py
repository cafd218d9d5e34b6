"""Which stages of another forward pass are wrong: each is judged on its own inputs.

One run in float64 is forced with the other side's values: it recomputes every stage from what the other side fed into
it, so that a mistake shows at the stage that makes it and nowhere else, also where several are stacked. A second forced
run in the other side's dtype shows what rounding does there. A stage may be off by a small multiple of the larger of
that error and the rounding of its own output; only that multiple is a constant, one for each class of stages.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Protocol

import jax
import numpy as np

from apr_jax.model import rotary
from apr_jax.model.language_model import Context, LanguageModel
from apr_jax.parity.replay import Replay, turn_sizes
from apr_jax.trace import stages
from apr_jax.trace.inputs import Inputs
from apr_jax.trace.positions import Dumped, compared_positions, dumped_columns, gather_positions, position_axis
from apr_jax.trace.stages import Key

EPSILON = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-9, "float16": 2.0**-11}
"""Half a unit in the last place, relative: the largest error of one rounding."""

# Values below the smallest normal number lose bits; only float16's is as large as values are.
_SMALLEST_NORMAL = {"float64": 0.0, "float32": 2.0**-126, "bfloat16": 2.0**-126, "float16": 2.0**-14}

# How many times the larger of our own error and one rounding another right implementation may be off, over a whole
# stage and at its worst position. Measured: tests/battery/RESULTS.md.
_CLASSES = {
    "exact": ("embedding",),
    "sum": ("qkv_bias", "post_attn_residual", "post_ffn_residual", "ffn_swigl"),
    "norm": ("attn_norm", "ffn_norm", "final_norm"),
    "product": ("qkv_matmul", "attn_out", "ffn_gate", "ffn_up", "ffn_out", "attn_scores", "attention", "logits"),
    "rope": ("q_post_rope", "k_post_rope"),
    "softmax": ("attn_softmax",),
    "activation": ("ffn_silu",),
}
CLASS_OF = {stage: name for name, members in _CLASSES.items() for stage in members}
FACTORS = {"exact": 2.0, "sum": 4.0, "norm": 6.0, "product": 6.0, "rope": 6.0, "softmax": 8.0, "activation": 6.0}
ROW_FACTOR = 3.0
"""How much more a single position or channel may be off than the stage as a whole, relative to its own budget."""
TURN_FACTOR = 3.0
"""How many times the roundings of a rotation a rotated value may be off; another right program's worst has 1.6."""
UNWIDENED: Mapping[str, float] = types.MappingProxyType({})
"""No budget is other than rounding asks for."""
STANDINGS = ("as right as the dtype allows", "within budget", "beyond budget")
"""The three verdicts on a stage, the best first; see `Site.allowed`."""
_CHANNEL_ROWS, _FEWEST_ROWS = 64, 16
"""How many positions a channel is judged by, and the fewest that do: what one has is no trait of a channel."""


@dataclasses.dataclass(frozen=True)
class Site:
    """One stage of the other side, judged on its own inputs.

    Attributes:
      key: Its key in a trace.
      error: |theirs - float64| over the compared elements (L2).
      own: |ours - float64| in the other side's dtype.
      budget: What `error` may be.
      norm: |float64|.
      worst: The largest error of a position, channel or rotated value over its own budget.
      row_budgets: What each position may be off (L2 over the last axis), in the shape of the stage without that axis.
      channel_budgets: What each channel may be off, relative to the position: `channel_medians`; None where it is not
        judged.
      first: Row and column (of the sequence) of the first position that is beyond its budget; None if none is.
      elements: Number of elements compared.
      finite: Whether all of theirs are finite.
      constant: Whether all of theirs are one value, where ours are not.
      widened: How many times the budgets above are applied, because somebody asked for it; rounding asks for one.
    """

    key: Key
    error: float
    own: float
    budget: float
    norm: float
    worst: float
    row_budgets: np.ndarray = dataclasses.field(repr=False, compare=False)
    channel_budgets: np.ndarray | None = dataclasses.field(repr=False, compare=False)
    elements: int
    finite: bool
    constant: bool
    widened: float = 1.0
    first: tuple[int, int] | None = None

    @property
    def stage(self) -> str:
        """The bare stage name."""
        return self.key.stage

    @property
    def layer(self) -> int | None:
        """The layer, None outside the layers."""
        return self.key.layer

    @property
    def share(self) -> float:
        """How much of its budget the error takes, over the whole stage or where it is worst; 0 without an error."""
        if not self.error:
            return 0.0
        return max(self.error / self.budget if self.budget else float("inf"), self.worst) / self.widened

    @property
    def wrong(self) -> bool:
        """Whether the stage is beyond its budget; what is not finite, or all one value, always is."""
        return not (self.finite and not self.constant and self.share <= 1.0)

    @property
    def allowed(self) -> float:
        """What the dtype itself makes of the stage: the larger of our own error in it and one rounding."""
        return self.budget / FACTORS[CLASS_OF[self.stage]]

    @property
    def standing(self) -> str:
        """Where theirs stands between float64 and the budget: one of STANDINGS."""
        return STANDINGS[2 if self.wrong else int(self.error > self.allowed)]


@dataclasses.dataclass(frozen=True)
class Localisation:
    """What one forced run shows.

    Attributes:
      sites: One for every stage that the other side dumped, in order of execution.
      reference: Every stage in float64, recomputed from the other side's inputs.
      dtype: The dtype that the other side was judged in.
      theirs: The other side's values, [B, T, ...]; positions that it did not dump hold ours.
      columns: For the stages of which it dumped some positions only: which, [B, R].
      widened: Stage -> how many times its budget was applied; one where it is not named.
    """

    sites: tuple[Site, ...]
    reference: Mapping[str, np.ndarray]
    dtype: str
    theirs: Mapping[str, np.ndarray]
    columns: Mapping[str, np.ndarray]
    widened: Mapping[str, float] = dataclasses.field(default_factory=dict)


def infer_dtype(values: Mapping[str, np.ndarray]) -> str:
    """Returns the coarsest dtype that holds all of the values: what the other side seems to compute in.

    `qkv_matmul` does not count: a 16-bit engine may well keep that sum in float32 until the bias is added. Nor do
    zeros; where there is nothing else it is float32. One array is looked at after the other: gradients are as large as
    the model.
    """
    narrow, seen = list(_NARROW), False
    for key in values:
        if Key(key).stage == "qkv_matmul" or not (array := values[key]).any():
            continue
        if array.dtype == np.float64 and (array != array.astype(np.float32)).any():
            return "float64"
        single, seen = np.ascontiguousarray(array, np.float32), True
        narrow = [dtype for dtype in narrow if _NARROW[dtype](single)]
    return narrow[0] if seen and narrow else "float32"


def _in_bfloat16(values: np.ndarray) -> bool:
    """Whether bfloat16 holds all of the float32 values."""
    return not (values.view(np.uint32) & 0xFFFF).any()


def _in_float16(values: np.ndarray) -> bool:
    """Whether float16 holds all of the float32 values: a few are asked first."""
    for some in (values.ravel()[:4096], values):
        with np.errstate(over="ignore", invalid="ignore"):
            if not np.array_equal(some, some.astype(np.float16).astype(np.float32), equal_nan=True):
                return False
    return True


_NARROW = {"bfloat16": _in_bfloat16, "float16": _in_float16}
"""The coarsest first."""


def localise(
    exact: LanguageModel,
    same: LanguageModel,
    inputs: Inputs,
    dumped: Dumped,
    widened: Mapping[str, float] = UNWIDENED,
    beyond: Beyond | None = None,
) -> Localisation:
    """Judges every stage of a dump.

    Args:
      exact: The model in float64.
      same: The model in the dtype that the other side computes in.
      inputs: The batch.
      dumped: The other side's values, over ours in float64 where it dumped some positions only; stages may be missing.
        There the run that shows rounding goes on with values of another right engine in the other side's dtype, so
        that the budget holds what keys and values that were not dumped may be off.
      widened: Stage -> how many times its budget is applied; one where it is not named.
      beyond: Where the inputs are an excerpt, the sequence that they are taken from.
    """
    keys: list[str] = [key for key in stages.trace_keys(exact.config.num_layers) if key in dumped.values]
    theirs = {key: dumped.values[key] for key in keys}
    rounded = dumped.over(other_engine(same).trace(inputs)).values if dumped.partial else theirs
    forced = _to_force(theirs)
    if beyond is None:
        reference = exact.trace(inputs, force=forced)
        own = same.trace(inputs, keys, force=_to_force({key: rounded[key] for key in keys}))
    else:
        reference = exact.trace(inputs, keys, forced, beyond.context(exact, inputs))
        own = same.trace(inputs, keys, forced, beyond.context(same, inputs))
    replay = Replay(exact.config, exact.parameters, inputs, theirs, beyond=None if beyond is None else beyond.replay)
    sites, judged = [], inputs
    for key in keys:
        values, part = (theirs[key], reference[key], own[key]), dumped.columns.get(key)
        each, window = turn_budgets(replay, key, same.dtype), exact.config.window_of(Key(key).layer)
        site = judge(key, *values, judged, same.dtype, part, each, window)
        sites.append(dataclasses.replace(site, widened=widened.get(site.stage, 1.0)))
        judged = _before_the_first_nan(key, judged, theirs[key])
    return Localisation(tuple(sites), reference, same.dtype, theirs, dumped.columns, widened)


class Beyond(Protocol):
    """The sequence that an excerpt is taken from."""

    @property
    def replay(self) -> Replay:
        """The replay of all of it, from the stages that were dumped at all positions."""

    def context(self, model: LanguageModel, inputs: Inputs) -> Context:
        """Returns what gives a layer's keys and values, as the model's dtype has them, for an excerpt."""


class _WithAnotherPow(LanguageModel):
    """A model whose rotation is another engine's, that has another pow: every frequency is off by one unit.

    Where rotated keys were dumped, their budget allows that (`_rounding`). Where they were not, what reads them shows
    it, and what the next layers make of that.
    """

    def rotary_tables(self, length: int, reach: int | None = None) -> tuple[jax.Array, jax.Array]:
        """Returns cos and sin of the other rotation, as the model's own."""
        tables = rotary.tables(self.config, length, reach, another_pow=True)
        cos, sin = (jax.device_put(table, self.device) for table in tables)
        return cos, sin


def other_engine(model: LanguageModel) -> LanguageModel:
    """A right engine other than the model, in its dtype."""
    if model.dtype == "float64":
        return model
    return _WithAnotherPow(model.config, model.parameters, model.device, model.ops, model.layer_ops)


def _to_force(values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a run is forced with: finite, and without the logits, which nothing follows."""
    return {
        key: value if np.isfinite(value).all() else np.where(np.isfinite(value), value, 0).astype(value.dtype)
        for key, value in values.items()
        if key != stages.LOGITS
    }


def _before_the_first_nan(key: str, inputs: Inputs, theirs: np.ndarray) -> Inputs:
    """Leaves out, for the stages that follow, what a value that is not finite has gone into: it and all behind it."""
    finite = np.isfinite(theirs)
    if finite.all():
        return inputs
    axes = tuple(axis for axis in range(1, theirs.ndim) if axis != position_axis(key))
    sound = np.logical_and.accumulate(finite.all(axis=axes) | (inputs.attention_mask == 0), axis=1)
    return dataclasses.replace(inputs, attention_mask=inputs.attention_mask * sound)


def judge(
    key: str,
    theirs: np.ndarray,
    reference: np.ndarray,
    own: np.ndarray,
    inputs: Inputs,
    dtype: str,
    columns: np.ndarray | None = None,
    each: np.ndarray | None = None,
    window: int | None = None,
) -> Site:
    """Judges one stage: theirs [B, T, ...] against float64, with our own error in their dtype as the measure.

    With `columns` [B, R] only those positions are judged; values may be whole or hold just them. `each` is what every
    value may be off, where that is known; `window` is the layer's.
    """
    axis, positions = position_axis(key), inputs.positions()
    whole = (*theirs.shape[:axis], positions.shape[1], *theirs.shape[axis + 1 :])
    mask = compared_positions(key, inputs, whole, window=window)
    if columns is None:
        columns = dumped_columns(key, theirs.shape[axis], inputs, None)
    if columns is not None:
        theirs, reference, own, mask = (gather_positions(key, x, columns) for x in (theirs, reference, own, mask))
        positions = np.take_along_axis(positions, columns, axis=1)
    chosen = theirs[mask]
    finite = bool(np.isfinite(chosen).all())
    difference = theirs.astype(np.float64) - reference
    error, size = row_norms(difference, mask), row_norms(reference, mask)
    # Where our own arithmetic overflows it is no measure.
    own_difference = np.nan_to_num(own.astype(np.float64) - reference, nan=0.0, posinf=0.0, neginf=0.0)
    own_error = row_norms(own_difference, mask)
    budget, row_budget = budgets(key, dtype, own_error, size, positions)
    if CLASS_OF[Key(key).stage] == "softmax":
        row_budget = row_budget + size * lost_in_sums(reference, dtype)
    own_channels = channel_medians(key, own_difference, size, mask)
    channels = channel_budgets(key, dtype, own_channels, channel_medians(key, reference, size, mask))
    worst = worst_share(error, row_budget)
    beyond = error > row_budget
    if channels is not None and finite:
        worst = max(worst, worst_share(channel_medians(key, difference, size, mask), channels))
    if each is not None and finite:
        each = each if columns is None else gather_positions(key, each, columns)
        turned = np.where(mask[..., None], np.abs(difference), 0.0)
        worst = max(worst, worst_share(turned, each))
        beyond = beyond | (turned > each).any(axis=-1)
    return Site(
        Key(key),
        error=float(np.linalg.norm(error)) if finite else float("inf"),
        own=float(np.linalg.norm(own_error)),
        budget=budget,
        norm=float(np.linalg.norm(size)),
        worst=worst if finite else float("inf"),
        row_budgets=row_budget,
        channel_budgets=channels,
        elements=int(chosen.size),
        finite=finite,
        constant=finite
        and chosen.size > 1
        and bool((chosen == chosen.flat[0]).all())
        and float(np.ptp(reference[mask])) > 0,
        first=_first(beyond | ~np.isfinite(error), inputs, columns),
    )


def _first(beyond: np.ndarray, inputs: Inputs, columns: np.ndarray | None) -> tuple[int, int] | None:
    """Row and column of the first of the positions [B, T] or [B, N, T] that are marked, by column."""
    found = np.argwhere(beyond.any(axis=1) if beyond.ndim == 3 else beyond)
    if not len(found):
        return None
    places = [(int(inputs.places()[t if columns is None else columns[b, t]]), int(b)) for b, t in found]
    column, row = min(places)
    return row, column


def worst_share(error: np.ndarray | None, budget: np.ndarray) -> float:
    """Returns the largest of some errors over their own budgets; 0 where there are none."""
    if error is None:
        return 0.0
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.where(error > 0, error / budget, 0.0).max(initial=0.0))


def budgets(key: str, dtype: str, own: np.ndarray, size: np.ndarray, positions: np.ndarray) -> tuple[float, np.ndarray]:
    """What a stage may be off as a whole, and each of its rows.

    Args:
      key: Its key in a trace.
      dtype: The dtype that is judged in.
      own: Our own error in that dtype, row by row.
      size: L2 of each row of the right values, in the same shape.
      positions: Positions of the rows, [B, T].
    """
    rounding = size * _rounding(key, dtype, positions, size.shape)
    factor = FACTORS[CLASS_OF[Key(key).stage]]
    own_total, rounding_total = float(np.linalg.norm(own)), float(np.linalg.norm(rounding))
    # A position where we happen to round well is no measure: the stage's typical error is the floor.
    typical = own_total / max(1, int(np.count_nonzero(size))) ** 0.5
    return factor * max(own_total, rounding_total), ROW_FACTOR * factor * np.maximum(np.maximum(own, rounding), typical)


def channel_medians(key: str, values: np.ndarray, size: np.ndarray, mask: np.ndarray) -> np.ndarray | None:
    """The median magnitude of each channel, relative to its position; None of stages of pairs and of few positions.

    A mistake of a channel is in most of its positions. The median does not hang on one position whose activations are
    a thousand times as large as the others', as trained models have them.

    Args:
      key: The stage's key in a trace.
      values: Errors or values, [B, T, C].
      size: L2 of each position of the right values, [B, T].
      mask: Which positions count, [B, T].
    """
    if Key(key).per_pair:
        return None
    rows = np.argwhere(mask & (size > 0))
    if len(rows) < _FEWEST_ROWS:
        return None
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, _CHANNEL_ROWS).astype(int))]
    chosen = tuple(rows.T)
    return np.median(np.abs(values[chosen]) / size[chosen][:, None], axis=0)


def channel_budgets(
    key: str, dtype: str, own: np.ndarray | None, right: np.ndarray | None, floor: float = 0.25
) -> np.ndarray | None:
    """What each channel may be off: medians as `channel_medians` gives them, of our own error and of the right values.

    Args:
      key: The stage's key in a trace.
      dtype: The dtype that is judged in.
      own: Our own error, [C].
      right: The right values, [C].
      floor: The share of the typical channel's error that every one may have.
    """
    if own is None or right is None:
        return None
    rounding = right * (EPSILON[dtype] / np.sqrt(3))
    least = floor * max(float(np.median(own)), float(np.median(rounding)))
    return ROW_FACTOR * FACTORS[CLASS_OF[Key(key).stage]] * np.maximum(np.maximum(own, rounding), least)


def turn_budgets(replay: Replay, key: str, dtype: str) -> np.ndarray | None:
    """What each rotated value may be off, [B, T, C]: a rotation of known values is a few roundings, whoever makes it.

    x cos - y sin has two roundings of each product, with cos and sin in the dtype, and one of the difference: at most
    three of |x cos| + |y sin|. An angle in float32 is known to a unit in its last place.

    Returns:
      None for other stages, and where what was rotated is not known.
    """
    key = Key(key)
    if CLASS_OF[key.stage] != "rope" or not replay.dumped(Key.of(key.layer, "qkv_bias")):
        return None
    terms, moved = turn_sizes(replay, key, _SMALLEST_NORMAL[dtype])
    return TURN_FACTOR * (3 * EPSILON[dtype] * terms + (2.0**-23 if dtype != "float64" else 0.0) * moved)


def lost_in_sums(shares: np.ndarray, dtype: str) -> np.ndarray:
    """What a sum of shares, one after the other, may leave out, relatively: those too small to be added to the largest.

    Where one key has nearly all of the attention, hundreds of others are; sums in pairs, as ours, keep them.
    """
    # Half precisions are summed in float32.
    smallest = 2.0 ** (-53 if dtype == "float64" else -24) * shares.max(-1, keepdims=True, initial=0.0)
    return np.asarray(np.where(shares < smallest, shares, 0.0).sum(-1))


def row_norms(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """L2 over the last axis of float64 values, with what is not compared left out."""
    if mask.ndim == values.ndim:
        values = np.where(mask, values, 0.0)
        return np.sqrt(np.einsum("...i,...i->...", values, values))
    return np.where(mask, np.sqrt(np.einsum("...i,...i->...", values, values)), 0.0)


def _rounding(key: str, dtype: str, positions: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The relative rounding of one result, per row; typical rather than worst: uniform errors have 1/sqrt(3) of it."""
    epsilon = EPSILON[dtype] / np.sqrt(3)
    if CLASS_OF[Key(key).stage] != "rope":
        return np.full(shape, epsilon)
    # A frequency that is off by one unit in the last place (another pow) turns position p by p such units.
    angles = 2.0**-24 * np.maximum(positions, 0) if dtype != "float64" else 0.0
    return np.broadcast_to(np.maximum(epsilon, angles / np.sqrt(3)), shape)
