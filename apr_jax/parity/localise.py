"""Which stages of another forward pass are wrong: each is judged on its own inputs.

One run in float64 is forced with the other side's values: it recomputes every stage from what the other side fed into
it, so that a mistake shows at the stage that makes it and nowhere else, also where several are stacked. A second forced
run in the other side's dtype shows what rounding does there. A stage may be off by a small multiple of the larger of
that error and the rounding of its own output; only that multiple is a constant, one for each class of stages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np

from apr_jax.model import rotary
from apr_jax.model.language_model import LanguageModel
from apr_jax.trace import stages
from apr_jax.trace.inputs import Inputs
from apr_jax.trace.positions import Dumped, compared_positions, dumped_columns, gather_positions, position_axis
from apr_jax.trace.stages import Key

EPSILON = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-9, "float16": 2.0**-11}
"""Half a unit in the last place, relative: the largest error of one rounding."""

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
"""How much more a single position may be off than the stage as a whole, relative to its own budget."""


@dataclasses.dataclass(frozen=True)
class Site:
    """One stage of the other side, judged on its own inputs.

    Attributes:
      key: Its key in a trace.
      error: |theirs - float64| over the compared elements (L2).
      own: |ours - float64| in the other side's dtype.
      budget: What `error` may be.
      norm: |float64|.
      worst: The largest error of a position over that position's budget.
      row_budgets: What each position may be off (L2 over the last axis), in the shape of the stage without that axis.
      elements: Number of elements compared.
      finite: Whether all of theirs are finite.
      constant: Whether all of theirs are one value, where ours are not.
    """

    key: Key
    error: float
    own: float
    budget: float
    norm: float
    worst: float
    row_budgets: np.ndarray = dataclasses.field(repr=False, compare=False)
    elements: int
    finite: bool
    constant: bool

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
        """How much of its budget the error takes, over the whole stage or at its worst position; 0 without an error."""
        if not self.error:
            return 0.0
        return max(self.error / self.budget if self.budget else float("inf"), self.worst)

    @property
    def wrong(self) -> bool:
        """Whether the stage is beyond rounding."""
        return not (self.finite and not self.constant and self.error <= self.budget and self.worst <= 1.0)


@dataclasses.dataclass(frozen=True)
class Localisation:
    """What one forced run shows.

    Attributes:
      sites: One for every stage that the other side dumped, in order of execution.
      reference: Every stage in float64, recomputed from the other side's inputs.
      dtype: The dtype that the other side was judged in.
      theirs: The other side's values, [B, T, ...]; positions that it did not dump hold ours.
      columns: For the stages of which it dumped some positions only: which, [B, R].
    """

    sites: tuple[Site, ...]
    reference: Mapping[str, np.ndarray]
    dtype: str
    theirs: Mapping[str, np.ndarray]
    columns: Mapping[str, np.ndarray]


def infer_dtype(values: Mapping[str, np.ndarray]) -> str:
    """Returns the coarsest dtype that holds all of the values: what the other side seems to compute in.

    `qkv_matmul` does not count: a 16-bit engine may well keep that sum in float32 until the bias is added.
    """
    values = {key: array for key, array in values.items() if Key(key).stage != "qkv_matmul"}
    if any(array.dtype == np.float64 and (array != array.astype(np.float32)).any() for array in values.values()):
        return "float64"
    singles = [np.ascontiguousarray(array, np.float32) for array in values.values()]
    if all(not (single.view(np.uint32) & 0xFFFF).any() for single in singles):
        return "bfloat16"
    return "float32"


def localise(
    exact: LanguageModel,
    same: LanguageModel,
    inputs: Inputs,
    dumped: Dumped,
) -> Localisation:
    """Judges every stage of a dump.

    Args:
      exact: The model in float64.
      same: The model in the dtype that the other side computes in.
      inputs: The batch.
      dumped: The other side's values, over ours in float64 where it dumped some positions only; stages may be missing.
        There the run that shows rounding goes on with values of another right engine in the other side's dtype, so
        that the budget holds what keys and values that were not dumped may be off.
    """
    keys: list[str] = [key for key in stages.trace_keys(exact.config.num_layers) if key in dumped.values]
    theirs = {key: dumped.values[key] for key in keys}
    rounded = dumped.over(_other_engine(same).trace(inputs)).values if dumped.partial else theirs
    reference = exact.trace(inputs, force=_to_force(theirs))
    own = same.trace(inputs, keys, force=_to_force({key: rounded[key] for key in keys}))
    sites, judged = [], inputs
    for key in keys:
        sites.append(judge(key, theirs[key], reference[key], own[key], judged, same.dtype, dumped.columns.get(key)))
        judged = _before_the_first_nan(key, judged, theirs[key])
    return Localisation(tuple(sites), reference, same.dtype, theirs, dumped.columns)


class _WithAnotherPow(LanguageModel):
    """A model whose rotation is another engine's, that has another pow: every frequency is off by one unit.

    Where rotated keys were dumped, their budget allows that (`_rounding`). Where they were not, what reads them shows
    it, and what the next layers make of that.
    """

    def rotary_tables(self, length: int) -> tuple[jax.Array, jax.Array]:
        """Returns cos and sin of the other rotation, as the model's own."""
        tables = rotary.tables(self.config.rope_theta, self.config.head_dim, length, another_pow=True)
        cos, sin = (jax.device_put(table, self.device) for table in tables)
        return cos, sin


def _other_engine(model: LanguageModel) -> LanguageModel:
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
) -> Site:
    """Judges one stage: theirs [B, T, ...] against float64, with our own error in their dtype as the measure.

    With `columns` [B, R] only those positions are judged; values may be whole or hold just them.
    """
    axis, positions = position_axis(key), inputs.positions()
    mask = compared_positions(key, inputs, (*theirs.shape[:axis], positions.shape[1], *theirs.shape[axis + 1 :]))
    if columns is None:
        columns = dumped_columns(key, theirs.shape[axis], inputs, None)
    if columns is not None:
        theirs, reference, own, mask = (gather_positions(key, x, columns) for x in (theirs, reference, own, mask))
        positions = np.take_along_axis(positions, columns, axis=1)
    finite = bool(np.isfinite(theirs[mask]).all())
    error = row_norms(theirs.astype(np.float64) - reference, mask)
    self_error = row_norms(own.astype(np.float64) - reference, mask)
    size = row_norms(reference, mask)
    own_total = float(np.linalg.norm(self_error))
    budget, row_budget = budgets(key, dtype, self_error, size, positions)
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = np.where(error > 0, error / row_budget, 0.0)
    chosen = theirs[mask]
    return Site(
        Key(key),
        error=float(np.linalg.norm(error)) if finite else float("inf"),
        own=own_total,
        budget=budget,
        norm=float(np.linalg.norm(size)),
        worst=float(shares.max()) if finite else float("inf"),
        row_budgets=row_budget,
        elements=int(chosen.size),
        finite=finite,
        constant=finite
        and chosen.size > 1
        and bool((chosen == chosen.flat[0]).all())
        and float(np.ptp(reference[mask])) > 0,
    )


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
