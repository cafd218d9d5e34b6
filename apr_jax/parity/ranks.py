"""Dumps of tensor-parallel ranks, put together: columns and heads side by side, what all ranks hold once.

Each rank has its part of what is split by columns (projections, what is computed of them, the logits of a split
vocabulary) and by heads, and of all else a copy or, under sequence parallelism, some of the positions. Three mistakes
show in no rank alone: ranks that are in another order than their weights, parts of a sum over ranks that were never
added, and ranks that hold other values where they should hold the same.

What is right is computed from the ranks' own values of the stages before, so that other mistakes hide none of these.
"""

from __future__ import annotations

import dataclasses
import functools
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
from apr_jax.parity.faults.seen import ALL_REDUCE, APART, RANK_ORDER
from apr_jax.parity.findings import Finding
from apr_jax.parity.localise import EPSILON
from apr_jax.parity.replay import Replay
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
_SUMMED = {"embedding": "attn_norm", "attn_out": "post_attn_residual", "ffn_out": "post_ffn_residual"}
"""What is summed over ranks (the embedding where the vocabulary is split) -> the stage that reads the sum."""
_UPDATES = {reader: update for update, reader in _SUMMED.items() if update != "embedding"}
_SAME, _NEAR = 0.02, 0.1
"""Relative L2 up to which values are the same, and share of a difference that another order has to leave."""
_LAST_BITS = 16
"""Copies may differ by as many roundings: not all libraries add up in one order on every rank."""


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parts of a stage.

    Attributes:
      blocks: One for each rank: [B, T, width of the part], [B, N of the part, T, T], [B, positions, C], or the whole
        stage.
      split: Whether they are parts of the columns or heads, and not copies.
      rows: Whether they are parts of the positions.
    """

    blocks: tuple[np.ndarray, ...]
    split: bool
    rows: bool = False


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
        positions = (*shape[:axis], rows // count, *shape[axis + 1 :])
        if (
            Key(key).stage not in _SPLIT
            and rows % count == 0
            and {each.size for each in flat} == {math.prod(positions)}
        ):
            return Parts(tuple(each.reshape(positions) for each in flat), split=False, rows=True)
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
    if parts.rows:
        return np.concatenate(parts.blocks, axis=position_axis(key))
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


def _cut(key: str, whole: np.ndarray, parts: Parts, config: Qwen2Config) -> list[np.ndarray]:
    """The parts of a whole stage that each rank should hold; those of k and v, which ranks may share, are left out."""
    stage, count = Key(key).stage, len(parts.blocks)
    if parts.rows:
        return np.split(whole, count, axis=position_axis(key))
    if stage in ("qkv_matmul", "qkv_bias"):
        whole = whole[..., : config.num_heads * config.head_dim]
    return np.split(whole, count, axis=1 if stage in stages.PER_PAIR else -1)


def judge(
    exact: LanguageModel, inputs: Inputs, ranks: Mapping[str, Parts], columns: np.ndarray | None, dtype: str = "float32"
) -> tuple[dict[str, np.ndarray], list[Finding]]:
    """Finds what ranks alone do not show, and puts the stages together as they should have been.

    Args:
      exact: The model in float64.
      inputs: The batch.
      ranks: Trace key -> the ranks' parts.
      columns: The columns that the rows of a partial dump stand for.
      dtype: What the ranks compute in.

    Returns:
      Trace key -> values, and the findings. Behind a sum that was never made nothing is kept, and nothing behind a
      stage of which ranks hold different copies: they go on from different values there.
    """
    order = [key for key in stages.trace_keys(exact.config.num_layers) if key in ranks]
    findings: list[Finding] = []
    judged = _Judged(exact, inputs, columns, {key: ranks[key] for key in order})
    places = judged.order()
    if places != tuple(range(len(places))):
        judged = judged.in_order(places)
        findings.append(_finding(RANK_ORDER, None, "qkv_bias", {"order": ", ".join(map(str, places))}))
    slack = _LAST_BITS * EPSILON[dtype]
    values: dict[str, np.ndarray] = {}
    for key in order:
        parts = judged.parts[key]
        values[key] = merged(key, parts, exact.config)
        if parts.split:
            if (apart := _copies_apart(key, parts, exact.config, slack)) is not None:
                findings.append(_finding(APART, key.layer, key.stage, {"ranks": apart}))
            continue
        if parts.rows or _spread(parts.blocks) <= slack:
            continue
        summed = judged.summed(key, values)
        if summed is None:
            values[key], apart = judged.odd(key, values)
            findings.append(_finding(APART, key.layer, key.stage, {"ranks": apart}))
            break
        values[key], missing = summed
        if missing:
            findings.append(_finding(ALL_REDUCE, key.layer, missing, {"ranks": len(parts.blocks)}))
            break
    return values, findings


def attributed(finding: Finding, ranks: Mapping[str, Parts], config: Qwen2Config) -> Finding:
    """Returns a finding that is confined to what one rank holds, and says so; any other as it is."""
    key = next((key for key in map(Key, ranks) if key.stage == finding.stage), None)
    places = finding.parameters.get("channels", finding.parameters.get("heads"))
    if key is None or places is None or not ranks[key].split:
        return finding
    # A stage that holds the number of the rank in place of each value.
    numbered = tuple(np.full_like(block, rank) for rank, block in enumerate(ranks[key].blocks))
    held = merged(key, Parts(numbered, split=True), config)
    holder = held[0, :, 0, 0] if key.per_pair else held[0, 0]
    if "heads" in finding.parameters and not key.per_pair:
        firsts = {"k": config.num_heads, "v": config.num_heads + config.num_kv_heads}
        part = str(finding.parameters["where"]).rpartition(" of ")[2]
        first = firsts.get(part, 0) if key.stage in ("qkv_matmul", "qkv_bias") else 0
        number = config.num_heads if first == 0 and key.stage != "k_post_rope" else config.num_kv_heads
        holder = holder.reshape(-1, config.head_dim)[first : first + number, 0]
    found = set(holder[list(places)].astype(int))
    if len(found) > 1 or len(places) < (holder == min(found)).sum():
        return finding
    rank = min(found)
    text = f"{finding.sentence}; these are all that rank {rank} holds"
    return dataclasses.replace(finding, parameters={**finding.parameters, "rank": rank}, sentence=text)


@dataclasses.dataclass(frozen=True)
class _Judged:
    """The parts of all ranks, and what their stages should be."""

    exact: LanguageModel
    inputs: Inputs
    columns: np.ndarray | None
    parts: Mapping[str, Parts]

    @functools.cached_property
    def _trace(self) -> Mapping[str, np.ndarray]:
        return self.exact.trace(self.inputs)

    def right(self, key: Key, values: Mapping[str, np.ndarray]) -> np.ndarray:
        """A stage as it should be, from the ranks' own values of the stages before; of partial dumps from ours."""
        length, axis, parts = self.inputs.input_ids.shape[1], position_axis(key), self.parts[key]
        if all(value.shape[position_axis(name)] == length for name, value in values.items()):
            known = Replay(self.exact.config, self.exact.parameters, self.inputs, values).compute(key)
        else:
            known = self._trace[key]
        if sum(block.shape[axis] for block in parts.blocks[: len(parts.blocks) if parts.rows else 1]) == length:
            return known
        return known.take([-1], axis) if self.columns is None else gather_positions(key, known, self.columns)

    def in_order(self, places: Sequence[int]) -> _Judged:
        """The same with the parts of each rank in the place where they belong."""
        moved = {
            key: dataclasses.replace(parts, blocks=tuple(parts.blocks[place] for place in places))
            for key, parts in self.parts.items()
        }
        return dataclasses.replace(self, parts=moved)

    def order(self) -> tuple[int, ...]:
        """Where the part of each rank is found: what the stages say that can tell, if they say the same."""
        count = len(next(iter(self.parts.values())).blocks)
        said = {places for key in self.parts if (places := self._places(Key(key))) is not None}
        return said.pop() if len(said) == 1 else tuple(range(count))

    def _places(self, key: Key) -> tuple[int, ...] | None:
        """The order of one stage's parts; None where no order, the given one included, is clearly nearest."""
        parts = self.parts[key]
        if not (parts.split or parts.rows) or key.stage == "k_post_rope":
            return None
        before = {name: merged(name, each, self.exact.config) for name, each in self._whole_before(key).items()}
        ours, theirs = _cut(key, self.right(key, before), parts, self.exact.config), list(parts.blocks)
        if key.stage in ("qkv_matmul", "qkv_bias"):
            theirs = [block[..., : ours[0].shape[-1]] for block in theirs]
        cost = np.array([[float(np.linalg.norm(their - our)) ** 2 for their in theirs] for our in ours])
        places = linear_sum_assignment(cost)[1]
        # A part that is as far from its place as from the others tells nothing.
        elsewhere = (cost.sum() - cost[np.arange(len(ours)), places].sum()) / max(len(ours) - 1, 1)
        clear = cost[np.arange(len(ours)), places].sum() < _NEAR**2 * elsewhere
        return tuple(map(int, places)) if clear else None

    def _whole_before(self, key: Key) -> dict[str, Parts]:
        """The stages that all ranks hold whole, up to the last one before a stage; what comes of them is computed."""
        found: dict[str, Parts] = {}
        for other, parts in self.parts.items():
            if other == key:
                break
            if not (parts.split or parts.rows) and _spread(parts.blocks) <= _SAME:
                found[other] = parts
        return found

    def summed(self, key: Key, values: Mapping[str, np.ndarray]) -> tuple[np.ndarray, str] | None:
        """What the parts of a sum over ranks come to, and whose sum was never made, ""; None if they are no parts."""
        before = {name: value for name, value in values.items() if name != key}
        blocks, total, right = self.parts[key].blocks, np.sum(self.parts[key].blocks, axis=0), self.right(key, before)
        if key.stage in _SUMMED:
            reader = self.parts.get(Key.of(0 if key.layer is None else key.layer, _SUMMED[key.stage]))
            if reader is not None and (reader.rows or _spread(reader.blocks) <= _SAME):
                return total, ""
            if _distance(total, right) > _SAME:
                return None
            return total, key.stage if reader is not None else ""
        if key.stage not in _UPDATES:
            return None
        # Each rank added its own part to the residual stream, which is in the total once for every rank.
        sources = Replay(self.exact.config, self.exact.parameters, self.inputs, {}).sources(key)
        stream = before.get(next(source for source in sources if source.stage != _UPDATES[key.stage]))
        total = total if stream is None else total - (len(blocks) - 1) * stream
        return None if stream is None or _distance(total, right) > _SAME else (total, _UPDATES[key.stage])

    def odd(self, key: Key, values: Mapping[str, np.ndarray]) -> tuple[np.ndarray, tuple[int, ...]]:
        """The copy that is farthest from what is right, and the ranks that hold it."""
        blocks = self.parts[key].blocks
        right = self.right(key, {name: value for name, value in values.items() if name != key})
        off = [_distance(block, right) for block in blocks]
        odd = blocks[int(np.argmax(off))]
        return odd, tuple(rank for rank, block in enumerate(blocks) if _distance(block, odd) <= _SAME * max(off))


def _copies_apart(key: Key, parts: Parts, config: Qwen2Config, slack: float) -> tuple[int, ...] | None:
    """The ranks that hold other values of a KV head than the first that holds it, where several do."""
    count = len(parts.blocks)
    copies, stage = max(count // config.num_kv_heads, 1), key.stage
    if copies == 1 or stage not in ("qkv_matmul", "qkv_bias", "k_post_rope"):
        return None
    queries = 0 if stage == "k_post_rope" else config.num_heads // count * config.head_dim
    shared = [block[..., queries:] for block in parts.blocks]
    apart = [rank for rank in range(count) if _distance(shared[rank], shared[rank - rank % copies]) > slack]
    return tuple(apart) or None


def _spread(blocks: Sequence[np.ndarray]) -> float:
    """How far the farthest copy is from the first, relative to it."""
    return max((_distance(block, blocks[0]) for block in blocks[1:]), default=0.0)


def _distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.linalg.norm(one - other) / (np.linalg.norm(other) or 1.0))


def _finding(fault: Fault, layer: int | None, stage: str, parameters: Mapping[str, Any]) -> Finding:
    where = f"layer {layer}, {stage}: " if layer is not None else ""
    text = where + fault.said(parameters)
    layers = () if layer is None else (layer,)
    return Finding(fault.name, layers, stage, parameters, float("nan"), None, (), "certain", text)
