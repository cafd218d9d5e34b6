"""Dumps of tensor-parallel ranks, put together: columns and heads side by side, what all ranks hold once.

Each rank has its part of what is split by columns (projections, what is computed of them, the logits of a split
vocabulary) and by heads, and a copy of all else. Two mistakes show in no rank alone: ranks that are in another order
than their weights, and parts of a sum over ranks that were never added.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from apr_jax.converters.checkpoint.qwen2 import Qwen2Config
from apr_jax.converters.errors import DumpError
from apr_jax.model.language_model import LanguageModel
from apr_jax.parity.faults.record import Fault
from apr_jax.parity.faults.seen import ALL_REDUCE, RANK_ORDER
from apr_jax.parity.findings import Finding
from apr_jax.trace import stages
from apr_jax.trace.inputs import Inputs
from apr_jax.trace.positions import gather_positions, position_axis
from apr_jax.trace.stages import Key

_RANK = re.compile(r"(?:rank|tp)[_-]?(\d{1,4})(?:[_-].*)?", re.IGNORECASE)
_SPLIT = (
    "qkv_matmul",
    "qkv_bias",
    "q_post_rope",
    "k_post_rope",
    "attn_scores",
    "attn_softmax",
    "attention",
    "ffn_gate",
    "ffn_up",
    "ffn_silu",
    "ffn_swigl",
    "logits",
)
_SUMMED = {"attn_out": "post_attn_residual", "ffn_out": "post_ffn_residual"}
"""What is summed over ranks -> the stage that reads the sum."""
_SAME, _NEAR = 0.02, 0.1
"""Relative L2 up to which values are the same, and share of a difference that another order has to leave."""


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parts of a stage.

    Attributes:
      blocks: One for each rank: [B, T, width of the part], [B, N of the part, T, T], or the whole stage.
      split: Whether they are parts, and not copies.
    """

    blocks: tuple[np.ndarray, ...]
    split: bool


def folders(path: Path) -> list[Path]:
    """Returns the folders of ranks 0, 1, ... below a folder; nothing if there are not at least two.

    Raises:
      RefusedError: A rank is missing.
    """
    if not path.is_dir():
        return []
    found: dict[int, Path] = {}
    with os.scandir(path) as entries:
        for entry in entries:
            if (match := _RANK.fullmatch(entry.name)) and entry.is_dir():
                found.setdefault(int(match[1]), Path(entry.path))
    if len(found) > 1 and sorted(found) != list(range(len(found))):
        raise DumpError(
            "a rank is missing", code="dump-ranks", file=path, found=sorted(found), expected=f"0 to {max(found)}"
        )
    return [found[rank] for rank in sorted(found)] if len(found) > 1 else []


def sort_out(
    key: str, flat: Sequence[np.ndarray], config: Qwen2Config, inputs: Inputs, columns: np.ndarray | None, file: Path
) -> Parts:
    """Tells by their sizes whether ranks hold parts or copies of a stage, and gives them their shapes.

    Raises:
      RefusedError: Sizes that are neither.
    """
    count, length, axis = len(flat), inputs.input_ids.shape[1], position_axis(key)
    whole = (inputs.input_ids.shape[0], *stages.shape(config, Key(key).stage, length))
    for rows in (length, *(() if columns is None else (columns.shape[1],)), 1):
        shape = (*whole[:axis], rows, *whole[axis + 1 :])
        for split in (False, True):
            part = _part_shape(key, shape, count, config) if split else shape
            if part is not None and {each.size for each in flat} == {math.prod(part)}:
                return Parts(tuple(each.reshape(part) for each in flat), split)
    raise DumpError(
        "what the ranks hold is neither this stage nor their parts of it",
        code="dump-size",
        file=file,
        tensor=key,
        found=[each.size for each in flat],
        expected=f"{math.prod(whole)}, or an even share for each of {count} ranks",
    )


def _part_shape(key: str, shape: tuple[int, ...], count: int, config: Qwen2Config) -> tuple[int, ...] | None:
    stage = Key(key).stage
    if stage not in _SPLIT or config.num_heads % count:
        return None
    kv = max(config.num_kv_heads // count, 1)
    if stage in stages.PER_PAIR:
        return (shape[0], shape[1] // count, *shape[2:])
    if stage == "k_post_rope":
        return (*shape[:2], kv * config.head_dim)
    if stage in ("qkv_matmul", "qkv_bias"):
        return (*shape[:2], (config.num_heads // count + 2 * kv) * config.head_dim)
    return None if shape[2] % count else (*shape[:2], shape[2] // count)


def merged(key: str, parts: Parts, config: Qwen2Config) -> np.ndarray:
    """Returns a stage of all ranks; of copies, the first."""
    if not parts.split:
        return parts.blocks[0]
    stage, count = Key(key).stage, len(parts.blocks)
    # Fewer KV heads than ranks: each is held by several, one behind the other.
    copies = max(count // config.num_kv_heads, 1)
    if stage in stages.PER_PAIR:
        return np.concatenate(parts.blocks, axis=1)
    if stage == "k_post_rope":
        return np.concatenate(parts.blocks[::copies], axis=-1)
    if stage in ("qkv_matmul", "qkv_bias"):
        kv = max(config.num_kv_heads // count, 1) * config.head_dim
        queries = config.num_heads // count * config.head_dim
        split = [np.split(block, [queries, queries + kv], axis=-1) for block in parts.blocks]
        q, k, v = ([each[place] for each in split] for place in range(3))
        return np.concatenate([*q, *k[::copies], *v[::copies]], axis=-1)
    return np.concatenate(parts.blocks, axis=-1)


def _cut(key: str, whole: np.ndarray, count: int, config: Qwen2Config) -> list[np.ndarray]:
    """The parts of a whole stage that each rank should hold; those of k and v, which ranks may share, are left out."""
    stage = Key(key).stage
    if stage in ("qkv_matmul", "qkv_bias"):
        whole = whole[..., : config.num_heads * config.head_dim]
    return np.split(whole, count, axis=1 if stage in stages.PER_PAIR else -1)


def judge(
    exact: LanguageModel, inputs: Inputs, ranks: Mapping[str, Parts], columns: np.ndarray | None
) -> tuple[dict[str, np.ndarray], list[Finding]]:
    """Finds what ranks alone do not show, and puts the stages together as they should have been.

    Args:
      exact: The model in float64.
      inputs: The batch.
      ranks: Trace key -> the ranks' parts.
      columns: The columns that the rows of a partial dump stand for.

    Returns:
      Trace key -> values, and the findings. Behind a sum that was never made nothing is kept: ranks go on from
      different values there.
    """
    order = [key for key in stages.trace_keys(exact.config.num_layers) if key in ranks]
    right = exact.trace(inputs, order)
    right = {key: _rows(key, right[key], ranks[key], columns) for key in order}
    findings: list[Finding] = []
    places = _order(exact.config, ranks, right)
    if places != tuple(range(len(places))):
        ranks = {
            key: Parts(tuple(parts.blocks[place] for place in places), parts.split) for key, parts in ranks.items()
        }
        findings.append(_finding(RANK_ORDER, None, "qkv_bias", {"order": ", ".join(map(str, places))}))
    values: dict[str, np.ndarray] = {}
    for key in order:
        parts = ranks[key]
        values[key] = merged(key, parts, exact.config)
        if key.stage in _SUMMED and not parts.split and _apart(parts.blocks):
            total = np.sum(parts.blocks, axis=0)
            if _distance(total, right[key]) > _SAME:
                continue
            values[key] = total
            after = ranks.get(Key.of(key.layer, _SUMMED[key.stage]))
            if after is not None and _apart(after.blocks):
                findings.append(_finding(ALL_REDUCE, key.layer, key.stage, {"ranks": len(parts.blocks)}))
                break
    return values, findings


def _rows(key: str, whole: np.ndarray, parts: Parts, columns: np.ndarray | None) -> np.ndarray:
    rows = parts.blocks[0].shape[position_axis(key)]
    if rows == whole.shape[position_axis(key)]:
        return whole
    return gather_positions(key, whole, columns) if columns is not None else whole.take([-1], position_axis(key))


def _order(config: Qwen2Config, ranks: Mapping[str, Parts], right: Mapping[str, np.ndarray]) -> tuple[int, ...]:
    """Where the part of each rank is found: the same place for every stage, or the order is as it should be."""
    count = len(next(iter(ranks.values())).blocks)
    as_is, found = tuple(range(count)), set[tuple[int, ...]]()
    for key, parts in ranks.items():
        if not parts.split or Key(key).stage == "k_post_rope":
            continue
        ours, theirs = _cut(key, right[key], count, config), list(parts.blocks)
        if Key(key).stage in ("qkv_matmul", "qkv_bias"):
            theirs = [block[..., : ours[0].shape[-1]] for block in theirs]
        cost = [[float(np.linalg.norm(their - our)) ** 2 for their in theirs] for our in ours]
        places = tuple(int(place) for place in linear_sum_assignment(cost)[1])
        here, there = (sum(cost[part][place] for part, place in enumerate(each)) for each in (as_is, places))
        found.add(places if there < _NEAR**2 * here else as_is)
    return found.pop() if len(found) == 1 else as_is


def _apart(blocks: Sequence[np.ndarray]) -> bool:
    return any(_distance(block, blocks[0]) > _SAME for block in blocks[1:])


def _distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.linalg.norm(one - other) / (np.linalg.norm(other) or 1.0))


def _finding(fault: Fault, layer: int | None, stage: str, parameters: Mapping[str, Any]) -> Finding:
    where = f"layer {layer}, {stage}: " if layer is not None else ""
    text = where + fault.said(parameters)
    layers = () if layer is None else (layer,)
    return Finding(fault.name, layers, stage, parameters, float("nan"), None, (), "certain", text)
