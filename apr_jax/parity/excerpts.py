"""Long sequences: judged by excerpts of their positions, so that no attention scores are ever whole in memory.

All stages but attention make a position of that position alone, and attention makes it of all keys and values. So an
excerpt of some positions is judged as a short batch is, with the keys and values of the whole sequence beside it. They
are the other side's where they were dumped at all positions, or computed from the layer's input where that was. Where
neither was, what reads them is not judged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from apr_jax.converters.checkpoint.qwen2 import Qwen2Config
from apr_jax.converters.errors import DumpError, RefusedError
from apr_jax.model.language_model import Context, LanguageModel
from apr_jax.model.qwen2 import rope
from apr_jax.parity.localise import UNWIDENED, Localisation, Site, localise, other_engine
from apr_jax.parity.replay import Replay, join_heads, unjoin
from apr_jax.trace.inputs import Excerpt, Inputs
from apr_jax.trace.positions import Dumped, position_axis
from apr_jax.trace.stages import Key

_MOST_BYTES = 1 << 30
"""Scores in float64 that take more than this are not held whole."""
_EXCERPT_BYTES = {"cpu": 1 << 28}
_ACCELERATED_BYTES = 1 << 31
"""What the scores of an excerpt may take: on a GPU each excerpt costs more to start than to compute."""
_FEWEST, _MOST = 16, 1024
"""Positions of an excerpt."""
_SPREAD, _AROUND = 64, 4
"""Positions that a cause is looked for at: so many of all, and as many on either side of each first wrong one."""
_STEPS, _ACCELERATED_STEPS = {"cpu": 4}, 1
"""Excerpts are given the keys of the first quarter, half, ... of the sequence: programs are compiled for each. On a GPU
compiling one costs more than the keys that are not seen."""
_MOST_KEPT = 4
"""As many stages of the whole sequence are kept that were computed for keys and values."""
_READS_KEYS = ("attn_scores", "attention")


def needed(config: Qwen2Config, inputs: Inputs) -> bool:
    """Whether a batch is too long for its scores to be held whole."""
    return _score_bytes(config, inputs) * inputs.input_ids.shape[1] > _MOST_BYTES


def _score_bytes(config: Qwen2Config, inputs: Inputs) -> int:
    """What the scores of one position of each row take in float64."""
    return 8 * config.num_heads * inputs.input_ids.size


@dataclasses.dataclass(frozen=True)
class Part:
    """Positions at which the same stages were dumped, judged.

    Attributes:
      sites: A judgement of every stage over all of them, in order of execution.
      located: What is looked at where a cause is sought: some of them, the first wrong ones among these.
      replay: The replay of the same.
    """

    sites: tuple[Site, ...]
    located: Localisation
    replay: Replay


class _Recent(dict[Any, Any]):
    """A memory that forgets arrays: those of a whole sequence are large, and each layer has its own."""

    def __setitem__(self, name: Any, value: Any) -> None:
        super().__setitem__(name, value)
        arrays = [other for other, kept in list(self.items()) if isinstance(kept, np.ndarray)]
        for other in arrays[:-_MOST_KEPT]:
            self.pop(other, None)  # another thread may have been here


class LongDump:
    """A dump of a long sequence.

    Attributes:
      inputs: The batch.
      replay: The replay of all of it, from the stages that were dumped at all positions.
      unknown: Layers whose keys or values are not known at all positions.
    """

    def __init__(
        self,
        exact: LanguageModel,
        same: LanguageModel,
        inputs: Inputs,
        theirs: Mapping[str, np.ndarray],
        columns: np.ndarray | None,
        widened: Mapping[str, float] = UNWIDENED,
    ):
        self._exact, self._same, self.inputs, self._theirs = exact, same, inputs, theirs
        self._widened = widened
        self._columns = _common(columns)
        length = inputs.input_ids.shape[1]
        self._whole = {key: value for key, value in theirs.items() if value.shape[position_axis(key)] == length}
        linear = {key: value for key, value in self._whole.items() if not Key(key).per_pair}
        self.replay = Replay(exact.config, exact.parameters, inputs, linear, memo=_Recent())
        self.unknown = {layer for layer in range(exact.config.num_layers) if not self._knows_cache(layer)}
        self._keys: dict[tuple[int, str], Any] = {}
        self._values: dict[int, Any] = {}

    def _knows_cache(self, layer: int) -> bool:
        keys = (Key.of(layer, "k_post_rope"), Key.of(layer, "qkv_bias"))
        nodes = [node for key in keys if not self.replay.dumped(key) for node in self.replay.undumped(key)]
        return not any(node.stage in _READS_KEYS for node in nodes)

    def columns_of(self, key: str) -> np.ndarray | None:
        """Returns which columns were dumped of a stage, [B, R]; None if all."""
        if key in self._whole or self._columns is None:
            return None
        return np.tile(self._columns, (len(self.inputs.input_ids), 1))

    # --- Keys and values -------------------------------------------------------------------------------------------

    def context(self, model: LanguageModel, inputs: Inputs) -> Context:
        """Returns what gives the keys and values of a layer up to the last position of an excerpt, or a little more."""
        length = self.inputs.input_ids.shape[1]
        step = -(-length // _STEPS.get(self._exact.device.platform, _ACCELERATED_STEPS))
        pairs = any(Key(key).per_pair for key in self._theirs)
        end = length if pairs else min(length, step * (1 + int(inputs.places().max()) // step))

        def up_to_the_end(layer: int) -> tuple[Any, Any]:
            keys, values = self._cache(layer, model)
            with self._exact.scope():
                return keys[:, :end].astype(model.dtype), values[:, :end].astype(model.dtype)

        return up_to_the_end

    def _cache(self, layer: int, model: LanguageModel) -> tuple[Any, Any]:
        """Keys and values [B, S, K, H] of a layer on the model's device, as they were dumped or in float64."""
        config, key, memo = self._exact.config, Key.of(layer, "k_post_rope"), _Recent()
        replay = dataclasses.replace(self.replay, memo=memo)
        if layer in self.unknown:
            nothing = jnp.zeros((*self.inputs.input_ids.shape, config.num_kv_heads, config.head_dim), jnp.float32)
            return nothing, nothing
        with self._exact.scope():
            if layer not in self._values:
                self._values[layer] = jnp.asarray(replay.heads(layer)[2])
            name = (layer, "" if replay.dumped(key) else model.dtype)
            if name not in self._keys:
                self._keys[name] = jnp.asarray(unjoin(self._made(replay, key, model), config))
        return self._keys[name], self._values[layer]

    def _made(self, replay: Replay, key: Key, model: LanguageModel) -> np.ndarray:
        """Keys as they were dumped, or right ones: in float64, or another right engine's in the model's dtype."""
        if replay.dumped(key):
            return np.asarray(replay.theirs[key])
        if model.dtype == "float64":
            return replay.compute(key)
        positions = np.maximum(self.inputs.positions(), 0)
        with model.scope():
            cos, sin = (np.asarray(t)[positions] for t in other_engine(model).rotary_tables(int(positions.max()) + 1))
            turned = rope(jnp.asarray(replay.heads(key.layer)[1], model.dtype), jnp.asarray(cos), jnp.asarray(sin))
            return join_heads(np.asarray(turned))

    def sample(self) -> tuple[Excerpt, dict[str, np.ndarray]]:
        """Returns a few positions, and what was dumped of them."""
        some = self.inputs.places() if self._columns is None else self._columns
        excerpt = Excerpt.taken(self.inputs, _looked_at(some, ()))
        return excerpt, self._taken(self._theirs, excerpt)

    # --- Judging ---------------------------------------------------------------------------------------------------

    def parts(self, progress: Callable[[str], None]) -> Iterator[Part]:
        """Judges all that was dumped: first the positions with most stages, then those with the others alone."""
        length = self.inputs.input_ids.shape[1]
        some = np.arange(length) if self._columns is None else self._columns
        yield from self._part(some, self._theirs, progress)
        rest = np.setdiff1d(np.arange(length), some)
        if len(rest) and self._whole:
            yield from self._part(rest, self._whole, progress)

    def _part(
        self, columns: np.ndarray, values: Mapping[str, np.ndarray], progress: Callable[[str], None]
    ) -> Iterator[Part]:
        judged: dict[str, list[Site]] = {}
        blocks = list(self._blocks(columns))
        for number, block in enumerate(blocks):
            progress(
                f"positions {block.columns[0]} to {block.columns[-1]} are judged, part {number + 1} of {len(blocks)}"
            )
            for site in self._located(block, values).sites:
                judged.setdefault(site.key, []).append(site)
        sites = tuple(joined(each) for each in judged.values())
        view = Excerpt.taken(self.inputs, _looked_at(columns, sites))
        located, firsts = self._located(view, values), {site.key: site.first for site in sites}
        shown = tuple(dataclasses.replace(site, first=firsts.get(site.key)) for site in located.sites)
        located = dataclasses.replace(located, sites=shown)
        replay = Replay(self._exact.config, self._exact.parameters, view, located.theirs, beyond=self.replay)
        yield Part(sites, located, replay)

    def _blocks(self, columns: np.ndarray) -> Iterator[Excerpt]:
        """Excerpts of one size; the last is filled up with positions before it, which count as padding there."""
        room = _EXCERPT_BYTES.get(self._exact.device.platform, _ACCELERATED_BYTES)
        most = int(np.clip(room // _score_bytes(self._exact.config, self.inputs), _FEWEST, _MOST))
        size = -(-len(columns) // -(-len(columns) // most))
        for start in range(0, len(columns), size):
            first = max(0, min(start, len(columns) - size))
            block = Excerpt.taken(self.inputs, columns[first : first + size])
            mask = block.attention_mask * (np.arange(len(block.columns)) >= start - first)
            if mask.any():
                yield dataclasses.replace(block, attention_mask=mask.astype(np.int32))

    def _located(self, excerpt: Excerpt, values: Mapping[str, np.ndarray]) -> Localisation:
        taken = self._taken(values, excerpt)
        located = localise(self._exact, self._same, excerpt, Dumped(taken, {}), self._widened, self)
        blind = Replay(self._exact.config, self._exact.parameters, excerpt, taken)
        sites = [site for site in located.sites if self._can_be_judged(site.key, blind)]
        return dataclasses.replace(located, sites=tuple(sites))

    def _can_be_judged(self, key: Key, replay: Replay) -> bool:
        nodes = replay.undumped(key)
        return not any(node.stage in _READS_KEYS and node.layer in self.unknown for node in nodes)

    def _taken(self, values: Mapping[str, np.ndarray], excerpt: Excerpt) -> dict[str, np.ndarray]:
        return {key: rows for key, value in values.items() if (rows := self._rows(key, value, excerpt)) is not None}

    def _rows(self, key: str, value: np.ndarray, excerpt: Excerpt) -> np.ndarray | None:
        """The rows of a stage at an excerpt's positions; None where they were not dumped."""
        axis, length = position_axis(key), self.inputs.input_ids.shape[1]
        if value.shape[axis] == length:
            return value.take(excerpt.columns, axis)
        if self._columns is not None and value.shape[axis] == len(self._columns):
            places = np.searchsorted(self._columns, excerpt.columns)
            inside = places < len(self._columns)
            if not inside.all() or not np.array_equal(self._columns[places], excerpt.columns):
                return None
            return value.take(places, axis)
        return value if excerpt.columns[-1] == length - 1 else None  # the last token's alone


def _common(columns: np.ndarray | None) -> np.ndarray | None:
    """The columns that were dumped of every row of the batch."""
    if columns is None:
        return None
    if (columns != columns[0]).any():
        raise RefusedError(
            "each row of a long batch was dumped at different positions",
            code="positions",
            hint="Dump the same positions of all rows, or the rows one by one.",
        )
    if (np.diff(columns[0]) <= 0).any():
        raise DumpError("the positions of a long dump do not rise", code="positions")
    return columns[0]


def joined(sites: Sequence[Site]) -> Site:
    """One judgement of a stage over several excerpts: it is wrong where one of them is."""

    def total(numbers: Iterable[float]) -> float:
        return float(np.linalg.norm(list(numbers)))

    firsts = [site.first for site in sites if site.wrong and site.first is not None]
    return dataclasses.replace(
        sites[0],
        error=total(site.error for site in sites),
        own=total(site.own for site in sites),
        budget=total(site.budget for site in sites),
        norm=total(site.norm for site in sites),
        worst=max(site.share * site.widened if site.wrong else site.worst for site in sites),
        elements=sum(site.elements for site in sites),
        finite=all(site.finite for site in sites),
        constant=len(sites) > 0 and all(site.constant for site in sites),
        first=min(firsts, key=lambda place: (place[1], place[0]), default=None),
    )


def _looked_at(columns: np.ndarray, sites: Iterable[Site]) -> np.ndarray:
    """The columns at which causes are sought: some of all, and those around each first wrong one."""
    chosen = set(np.linspace(0, len(columns) - 1, min(_SPREAD, len(columns))).astype(int).tolist())
    for place in sorted({site.first[1] for site in sites if site.first is not None})[: _SPREAD // _AROUND]:
        at = int(np.searchsorted(columns, place))
        chosen |= set(range(max(0, at - _AROUND), min(len(columns), at + _AROUND + 1)))
    return columns[sorted(chosen)]
