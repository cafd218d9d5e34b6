"""The loss of each token: -log p(token | tokens before it in its window), in nats.

Logits are never whole in memory: the head is applied to some positions at a time, and of their logits only a few
numbers are kept. A batch holds windows of like length, padded on the right.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from apr_jax.converters.checkpoint.qwen2 import Qwen2Config
from apr_jax.loss.documents import Document, Window
from apr_jax.model.language_model import COMPILER_OPTIONS, LanguageModel, LayerOps, model_graph
from apr_jax.model.parameters import Parameters
from apr_jax.model.qwen2 import NO_POSITION, Cache, Ops, Qwen2ForCausalLM, at_least_float32
from apr_jax.model.sharding import to_host
from apr_jax.trace import stages
from apr_jax.trace.inputs import Inputs

_CHUNK = 256
"""Positions whose logits are there at once: 160 MB in float32 at a vocabulary of 151,936."""
_LEAST = 16  # the shortest length that a program is compiled for
AHEAD = (0, 1, 2)
"""Which labels the logits of a position are held against: its own token, the next (right), or the one after."""


class Scores(NamedTuple):
    """What is kept of the logits that predict a token; float32 (float64 for a float64 model), one entry a token.

    Attributes:
      log_total: log of the sum of exp(logits).
      mean: Mean of the logits over the vocabulary.
      labels: The logits of the tokens `AHEAD` of the position, [3, ...]; NaN where the document has none.
    """

    log_total: np.ndarray
    mean: np.ndarray
    labels: np.ndarray

    @property
    def loss(self) -> np.ndarray:
        """-log of the token's probability, in nats."""
        return self.against(1)

    def against(self, ahead: int) -> np.ndarray:
        """The loss if the logits that are a token's were held against another label, one of `AHEAD`."""
        return self.log_total - self.labels[AHEAD.index(ahead)]


class Variant(NamedTuple):
    """How another engine may have computed its logits.

    Attributes:
      rounded: A dtype that they are rounded to.
      vocabulary: How many rows of the head it has; None is all.
    """

    rounded: str | None = None
    vocabulary: int | None = None


RIGHT = Variant()


def score(
    model: LanguageModel,
    documents: Sequence[Document],
    windows: Sequence[Window],
    batch: int,
    variant: Variant = RIGHT,
    progress: Callable[[int], None] | None = None,
) -> list[Scores]:
    """Scores every token of the documents that some window predicts.

    Args:
      model: The model; its tables of operations are used.
      documents: The texts.
      windows: Of `documents.windows`.
      batch: How many windows go through the model at once.
      variant: Another way to compute logits.
      progress: Called with the number of tokens that went through.

    Returns:
      For each document the scores of its N tokens, [N]; NaN where none was made.
    """
    dtype = np.float64 if model.dtype == "float64" else np.float32
    nothing = [np.full(len(document.ids), np.nan, dtype) for document in documents]
    made = [Scores(row.copy(), row.copy(), np.stack([row] * len(AHEAD))) for row in nothing]
    for group, found in _in_turn(model, documents, _batches(windows, batch), batch, variant):
        for row, window in enumerate(group):
            into = made[window.document]
            # Logits of a position are those of the next token.
            of, to = (
                slice(window.first - 1 - window.start, window.end - 1 - window.start),
                slice(window.first, window.end),
            )
            into.log_total[to] = found.log_total[row, of]
            into.mean[to] = found.mean[row, of]
            into.labels[:, to] = found.labels[:, row, of]
        if progress is not None:
            progress(sum(window.end - window.start for window in group))
    for document, scores in zip(documents, made, strict=True):
        # What stands behind the end of a document was padding.
        scores.labels[AHEAD.index(2), len(document.ids) - 1 :] = np.nan
    return made


def _batches(windows: Sequence[Window], batch: int) -> Iterator[list[Window]]:
    """Groups windows of like length, so that little is computed for padding; in order of length, the longest first."""
    order = sorted(windows, key=lambda window: window.start - window.end)
    for at in range(0, len(order), batch):
        yield order[at : at + batch]


def _in_turn(
    model: LanguageModel,
    documents: Sequence[Document],
    groups: Iterator[list[Window]],
    batch: int,
    variant: Variant,
) -> Iterator[tuple[list[Window], Scores]]:
    """Yields each batch with its scores; an accelerator has the next one to do before its result is waited for.

    A CPU has not: it would run two programs at once, in the memory of both.
    """
    ahead = 0 if model.device.platform == "cpu" else 1
    waiting: collections.deque[tuple[list[Window], tuple[Array, ...]]] = collections.deque()
    for group in groups:
        waiting.append((group, _scored(model, documents, group, batch, variant)))
        if len(waiting) > ahead:
            done, found = waiting.popleft()
            yield done, Scores(*map(to_host, found))
    for done, found in waiting:
        yield done, Scores(*map(to_host, found))


def _scored(
    model: LanguageModel, documents: Sequence[Document], group: Sequence[Window], batch: int, variant: Variant
) -> tuple[Array, ...]:
    longest = max(window.end - window.start for window in group)
    length = _rounded_up(longest)
    ids = np.zeros((batch, length + AHEAD[-1]), np.int32)
    positions = np.full((batch, length), NO_POSITION, np.int32)
    for row, window in enumerate(group):
        tokens = documents[window.document].ids[window.start : window.end + 1]
        ids[row, : len(tokens)] = tokens
        positions[row, : window.end - window.start] = np.arange(window.end - window.start)
    # A row without a token would see nothing at all.
    positions[len(group) :, 0] = 0
    labels = np.stack([ids[:, ahead : ahead + length] for ahead in AHEAD])
    with model.scope():
        program = _program(model.config, model.dtype, model.fused, model.ops, tuple(model.layer_ops.items()), variant)
        tables = model.rotary_tables(length, longest)
        scores: tuple[Array, ...] = program(model.parameters, ids[:, :length], positions, *tables, labels)
        return scores


def _rounded_up(length: int) -> int:
    """Rounds up to an eighth of a power of two, so that few programs are compiled and little is computed in vain."""
    step = max(_LEAST, 1 << max(0, (length - 1).bit_length() - 3))
    return -(-length // step) * step


@functools.cache
def _program(config: Qwen2Config, dtype: str, fused: bool, ops: Ops, layer_ops: LayerOps, variant: Variant) -> Any:
    graph = model_graph(config, dtype, fused)

    def scored(parameters: Parameters, ids: Array, positions: Array, cos: Array, sin: Array, labels: Array) -> Any:
        model = nnx.merge(graph, parameters)
        # A prompt into an empty cache: what flash attention is there for.
        batch, length = ids.shape
        cache = Cache.empty(config, batch, length, jnp.dtype(dtype))
        x, _ = model.hidden(ids, positions, cos, sin, cache, ops, dict(layer_ops), first=True)
        return _kept(model, x, labels, ops, variant)

    return jax.jit(scored, compiler_options=COMPILER_OPTIONS)


def _kept(model: Qwen2ForCausalLM, x: Array, labels: Array, ops: Ops, variant: Variant) -> tuple[Array, ...]:
    """Hidden states [B, T, D] with labels [3, B, T] -> log_total [B, T], mean [B, T], labels' logits [3, B, T]."""
    batch, length, width = x.shape
    count = -(-batch * length // _CHUNK)
    chunk = -(-batch * length // count)
    padding = count * chunk - batch * length
    rows = jnp.pad(x.reshape(-1, width), ((0, padding), (0, 0))).reshape(count, 1, chunk, width)
    wanted = jnp.pad(labels.reshape(len(AHEAD), -1), ((0, 0), (0, padding)))
    wanted = wanted.reshape(len(AHEAD), count, chunk).transpose(1, 2, 0)

    def one(part: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        states, tokens = part
        logits = model.project(states, ops)[0, :, : variant.vocabulary]
        if variant.rounded is not None:
            logits = lax.optimization_barrier(logits.astype(variant.rounded))
        logits = at_least_float32(logits)
        picked = jnp.take_along_axis(logits, tokens, axis=1, mode="fill", fill_value=jnp.nan)
        return jax.nn.logsumexp(logits, axis=-1), jnp.mean(logits, axis=-1), picked

    total, mean, picked = lax.map(one, (rows, wanted))
    flat = [value.reshape(count * chunk, -1)[: batch * length] for value in (total, mean, picked)]
    return (
        flat[0].reshape(batch, length),
        flat[1].reshape(batch, length),
        flat[2].transpose(1, 0).reshape(len(AHEAD), batch, length),
    )


def logits_before(model: LanguageModel, document: Document, window: Window, tokens: Sequence[int]) -> np.ndarray:
    """Returns the logits that predict some tokens of a window, at least float32 [len(tokens), V]."""
    length = window.end - window.start
    padding = (0, _rounded_up(length) - length)
    inputs = Inputs.of(
        [np.pad(document.ids[window.start : window.end], padding)], [np.pad(np.ones(length, int), padding)]
    )
    states = model.trace(inputs, {stages.FINAL_NORM})[stages.FINAL_NORM][:, np.asarray(tokens) - 1 - window.start]
    with model.scope():
        rows = to_host(model.module.project(jnp.asarray(states), model.ops)[0])
    return rows.astype(np.promote_types(rows.dtype, np.float32))
