"""Which stages of another forward pass are wrong: each is judged on its own inputs.

One run in float64 is forced with the other side's values: it recomputes every stage from what the other side fed into
it, so that a mistake shows at the stage that makes it and nowhere else, also where several are stacked. A second forced
run in the other side's dtype shows what rounding does there. A stage may be off by a small multiple of the larger of
that error and the rounding of its own output; only that multiple is a constant, one for each class of stages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from apr_jax import stages
from apr_jax.compare import compared_positions
from apr_jax.inputs import Inputs
from apr_jax.model import LanguageModel

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
      elements: Number of elements compared.
      finite: Whether all of theirs are finite.
      constant: Whether all of theirs are one value, where ours are not.
    """

    key: str
    error: float
    own: float
    budget: float
    norm: float
    worst: float
    elements: int
    finite: bool
    constant: bool

    @property
    def stage(self) -> str:
        """The bare stage name."""
        return stages.stage_of(self.key)

    @property
    def layer(self) -> int | None:
        """The layer, None outside the layers."""
        parts = self.key.split(".")
        return int(parts[1]) if len(parts) == 3 else None

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
    """

    sites: tuple[Site, ...]
    reference: Mapping[str, np.ndarray]
    dtype: str


def infer_dtype(values: Mapping[str, np.ndarray]) -> str:
    """Returns the coarsest dtype that holds all of the values: what the other side seems to compute in."""
    if any(array.dtype == np.float64 and (array != array.astype(np.float32)).any() for array in values.values()):
        return "float64"
    singles = [np.ascontiguousarray(array, np.float32) for array in values.values()]
    if all(not (single.view(np.uint32) & 0xFFFF).any() for single in singles):
        return "bfloat16"
    return "float32"


def localise(
    exact: LanguageModel, same: LanguageModel, inputs: Inputs, theirs: Mapping[str, np.ndarray]
) -> Localisation:
    """Judges every stage of a dump.

    Args:
      exact: The model in float64.
      same: The model in the dtype that the other side computes in.
      inputs: The batch.
      theirs: Trace key -> array; may be partial. Logits may hold the last position only.
    """
    known = list(stages.trace_keys(exact.config.num_layers))
    forced = {key: value for key, value in theirs.items() if key in known and key != stages.LOGITS}
    finite = {key: np.where(np.isfinite(value), value, 0).astype(value.dtype) for key, value in forced.items()}
    keys = [key for key in known if key in theirs]
    reference = exact.trace(inputs, force=finite)
    own = same.trace(inputs, keys, force=finite)
    sites, judged = [], inputs
    for key in keys:
        sites.append(judge(key, theirs[key], reference[key], own[key], judged, same.dtype))
        judged = _before_the_first_nan(judged, theirs[key])
    return Localisation(tuple(sites), reference, same.dtype)


def _before_the_first_nan(inputs: Inputs, theirs: np.ndarray) -> Inputs:
    """Leaves out, for the stages that follow, what a value that is not finite has gone into: it and all behind it."""
    finite = np.isfinite(theirs)
    if finite.all() or theirs.shape[1] != inputs.input_ids.shape[1]:
        return inputs
    sound = np.logical_and.accumulate(finite.all(axis=tuple(range(2, theirs.ndim))), axis=1)
    return dataclasses.replace(inputs, attention_mask=inputs.attention_mask * sound)


def judge(key: str, theirs: np.ndarray, reference: np.ndarray, own: np.ndarray, inputs: Inputs, dtype: str) -> Site:
    """Judges one stage: theirs [B, T, ...] against float64, with our own error in their dtype as the measure."""
    if theirs.shape[1] == 1 and inputs.input_ids.shape[1] > 1:
        last = np.where(inputs.attention_mask == 1, np.arange(inputs.input_ids.shape[1]), -1).max(axis=1)
        rows = np.arange(len(last))
        reference, own = (x if x.shape[1] == 1 else x[rows, last][:, None] for x in (reference, own))
        mask = np.ones(theirs.shape[:2], bool)
        positions = np.take_along_axis(inputs.positions(), last[:, None], axis=1)
    else:
        mask = compared_positions(key, inputs, theirs.shape)
        positions = inputs.positions()
    finite = bool(np.isfinite(theirs[mask]).all())
    error = _rows(theirs.astype(np.float64) - reference, mask)
    self_error = _rows(own.astype(np.float64) - reference, mask)
    size = _rows(reference, mask)
    rounding = size * _rounding(key, dtype, positions, error.shape)
    factor = FACTORS[CLASS_OF[stages.stage_of(key)]]
    own_total, rounding_total = float(np.linalg.norm(self_error)), float(np.linalg.norm(rounding))
    # A position where we happen to round well is no measure: the stage's typical error is the floor.
    typical = own_total / max(1, int(np.count_nonzero(size))) ** 0.5
    row_budget = ROW_FACTOR * factor * np.maximum(np.maximum(self_error, rounding), typical)
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = np.where(error > 0, error / row_budget, 0.0)
    chosen = theirs[mask]
    return Site(
        key,
        error=float(np.linalg.norm(error)) if finite else float("inf"),
        own=float(own_total),
        budget=float(factor * max(own_total, rounding_total)),
        norm=float(np.linalg.norm(size)),
        worst=float(shares.max()) if finite else float("inf"),
        elements=int(chosen.size),
        finite=finite,
        constant=finite
        and chosen.size > 1
        and bool((chosen == chosen.flat[0]).all())
        and float(np.ptp(reference[mask])) > 0,
    )


def _rows(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """L2 over the last axis, with what is not compared left out."""
    if mask.ndim == values.ndim:
        return np.linalg.norm(np.where(mask, values, 0.0), axis=-1)
    return np.linalg.norm(values, axis=-1) * mask


def _rounding(key: str, dtype: str, positions: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The relative rounding of one result, per row; typical rather than worst: uniform errors have 1/sqrt(3) of it."""
    epsilon = EPSILON[dtype] / np.sqrt(3)
    if CLASS_OF[stages.stage_of(key)] != "rope":
        return np.full(shape, epsilon)
    # A frequency that is off by one unit in the last place (another pow) turns position p by p such units.
    angles = 2.0**-24 * np.maximum(positions, 0) if dtype != "float64" else 0.0
    return np.broadcast_to(np.maximum(epsilon, angles / np.sqrt(3)), shape)
