"""Layouts that are not mistakes: the right numbers in another order. Found, said, and undone before anything is judged.

A dump says nothing of the order of its axes. Engines keep q and k head-major, or interleave the two halves of a head
for adjacent-pair RoPE, or write column-major. A reordering that brings a stage from far off to close by is taken as
what the other side does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from apr_jax.converters.checkpoint.qwen2 import Qwen2Config
from apr_jax.model.language_model import LanguageModel
from apr_jax.parity.replay import Replay
from apr_jax.trace import stages
from apr_jax.trace.inputs import Inputs
from apr_jax.trace.positions import Dumped, dumped_tokens, scatter_positions
from apr_jax.trace.stages import Key

_FAR = 0.05
"""Relative L2 from which a stage's layout is doubted: one position with a massive activation may be nearly all of it,
and stand where it should."""
_POSITIONS = 32
"""How many positions of a sequence are looked at."""
_CLOSER = 0.1
"""What a reordering has to leave of the difference."""

_INTERLEAVED = "qk-interleaved"
_HEADED = ("q_post_rope", "k_post_rope", "attention")
_PAIRED = ("qkv_matmul", "qkv_bias", "q_post_rope", "k_post_rope")


@dataclasses.dataclass(frozen=True)
class Layout:
    """A reordering that was undone.

    Attributes:
      key: The stage.
      kind: "heads-major", "qk-interleaved" or "transposed".
    """

    key: Key
    kind: str


def undo(exact: LanguageModel, inputs: Inputs, dumped: Dumped) -> tuple[Dumped, list[Layout]]:
    """Brings a dump into the layout of the stage table.

    Args:
      exact: The model in float64.
      inputs: The batch.
      dumped: The other side's values, over ours where it dumped some positions only.

    Returns:
      The dump with every stage in the right order, and what was reordered.
    """
    values, rows = dict(dumped.values), dumped.rows()
    found: list[Layout] = []
    for key in stages.trace_keys(exact.config.num_layers):
        part = dumped.columns.get(key)
        if key not in values or values[key].ndim != 3 or (part is not None and key == stages.LOGITS):
            continue
        if values[key].shape[1] != inputs.input_ids.shape[1] or not np.isfinite(rows[key]).all():
            continue
        few, tokens = _looked_at(inputs, part)
        shown = values[key][:, few]
        # An engine interleaves all of a layer's q and k, or none: what else is wrong with them is no layout.
        interleaved = Layout(Key.of(key.layer, _PAIRED[0]), _INTERLEAVED) in found and key.stage in _PAIRED
        right = Replay(exact.config, exact.parameters, inputs, values, rows=few).compute(key)
        before = _distance(shown, right, tokens)
        if before <= _FAR * float(np.linalg.norm(right[tokens])) and not interleaved:
            continue
        for kind, reorder in _reorderings(exact.config, key.stage).items():
            if kind == _INTERLEAVED and _rotates_halves(exact.config, inputs, dumped, key.layer):
                continue
            reordered = reorder(rows[key])
            moved = reordered if part is None else scatter_positions(key, values[key], reordered, part)
            other = moved[:, few]
            if (
                (interleaved and kind == _INTERLEAVED)
                or (not interleaved and _distance(other, right, tokens) <= _CLOSER * before)
                or _same_norms(kind, exact.config, shown, other, right, tokens)
            ):
                values[key] = moved
                found.append(Layout(key, kind))
                break
    return Dumped(values, dumped.columns), found


def _looked_at(inputs: Inputs, part: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """A few columns, and which of their positions count; they tell: other layouts put other tokens' values there."""
    dumped = dumped_tokens(inputs, part)
    known = np.flatnonzero(dumped.any(axis=0))
    few = known[np.unique(np.linspace(0, len(known) - 1, _POSITIONS).astype(int))]
    return few, dumped[:, few]


def _distance(x: np.ndarray, y: np.ndarray, tokens: np.ndarray) -> float:
    return float(np.linalg.norm((x - y)[tokens]))


def _same_norms(
    kind: str, config: Qwen2Config, found: np.ndarray, other: np.ndarray, right: np.ndarray, tokens: np.ndarray
) -> bool:
    """Whether reordering heads brings their norms into place: no rotation, right or wrong, changes those."""
    if kind != "heads-major":
        return False
    norms = [np.linalg.norm(x.reshape(*x.shape[:2], -1, config.head_dim), axis=-1) for x in (found, other, right)]
    return _distance(norms[1], norms[2], tokens) <= _CLOSER * _distance(norms[0], norms[2], tokens)


def _rotates_halves(config: Qwen2Config, inputs: Inputs, dumped: Dumped, layer: int | None) -> bool:
    """Whether a layer rotates pairs (i, i + H/2) of q and k as they were dumped: then it means them in that order.

    A rotation, right or wrong, keeps the length of its pairs. Values in another order are then no layout but weights
    whose rows are in another order than the rotation wants.
    """
    keys = [Key.of(layer, stage) for stage in ("qkv_bias", "q_post_rope", "k_post_rope")]
    if any(key not in dumped.values for key in keys):
        return False
    few, tokens = _looked_at(inputs, dumped.columns.get(keys[0]))
    before, *after = (np.asarray(dumped.values[key][:, few][tokens], np.float64) for key in keys)
    rotated = np.concatenate(after, axis=-1)
    if not np.isfinite(rotated).all():
        return False

    def kept(shape: tuple[int, ...], axis: int) -> float:
        lengths = [
            np.linalg.norm(x.reshape(len(x), *shape), axis=axis) for x in (before[:, : rotated.shape[-1]], rotated)
        ]
        return float(np.linalg.norm(lengths[0] - lengths[1]))

    halves, adjacent = kept((-1, 2, config.head_dim // 2), 2), kept((-1, config.head_dim // 2, 2), 3)
    return halves < _CLOSER * adjacent


def _reorderings(config: Qwen2Config, stage: str) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    width = config.head_dim
    kinds: dict[str, Callable[[np.ndarray], np.ndarray]] = {}
    if stage in _HEADED:
        kinds["heads-major"] = lambda x: _from_heads_major(x, width)
    if stage in _PAIRED:
        rotated = (config.num_heads + config.num_kv_heads) * width
        kinds[_INTERLEAVED] = lambda x: _from_interleaved(x, width, rotated)
    kinds["transposed"] = lambda x: x.reshape(len(x), x.shape[2], x.shape[1]).swapaxes(1, 2)
    return kinds


def _from_heads_major(x: np.ndarray, width: int) -> np.ndarray:
    """[B, heads, T, H] in a buffer of [B, T, heads * H] -> the latter."""
    batch, length, total = x.shape
    return x.reshape(batch, total // width, length, width).swapaxes(1, 2).reshape(x.shape)


def _from_interleaved(x: np.ndarray, width: int, rotated: int) -> np.ndarray:
    """Undoes i -> 2i, i + H/2 -> 2i + 1 in each head of q and k; v, behind them, stays."""
    end = min(rotated, x.shape[-1])
    heads = x[..., :end].reshape(*x.shape[:2], -1, width)
    ordered = np.concatenate([heads[..., 0::2], heads[..., 1::2]], axis=-1)
    return np.concatenate([ordered.reshape(*x.shape[:2], end), x[..., end:]], axis=-1)
