"""From logits to the next token, on the device: HuggingFace's logits processors in its order, then one draw a row.

The order is that of `GenerationMixin._get_logits_processor`: repetition penalty, temperature, top-k, top-p. What is a
number to a user (temperature, k, p, penalty) is an argument of the compiled program; only what decides how much work
there is (`Method`) is compiled in, so that changing a number compiles nothing.

Letters in shapes: B batch, V vocabulary, C candidates.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from apr_jax import blocks
from apr_jax.generation_config import GenerationConfig

# A token is drawn from the C highest logits where top-k leaves no more. There is room above k, because tokens that tie
# with the k-th one stay, and bfloat16 logits tie often.
_CANDIDATES = ((100, 128), (1000, 1280))


@dataclasses.dataclass(frozen=True)
class Method:
    """What a program that picks tokens is compiled for.

    Attributes:
      sampled: Drawn, or the highest.
      candidates: How many of the highest logits are sorted; 0 where nothing is cut off and nothing needs sorting.
      penalised: Whether tokens that occurred are penalised.
    """

    sampled: bool
    candidates: int
    penalised: bool

    @classmethod
    def of(cls, config: GenerationConfig, vocab_size: int) -> Method:
        """Returns the least work that does what `config` says."""
        penalised = config.repetition_penalty != 1.0
        if not config.do_sample:
            return cls(False, 0, penalised)
        if 0 < config.top_k < vocab_size:
            sizes = (size for most, size in _CANDIDATES if config.top_k <= most)
            return cls(True, min(next(sizes, vocab_size), vocab_size), penalised)
        return cls(True, vocab_size if config.top_p < 1.0 else 0, penalised)


class Numbers(NamedTuple):
    """The numbers of a `GenerationConfig`, as arguments of a compiled program.

    Attributes:
      temperature: float32.
      top_k: int32; the number of candidates where there is no limit.
      tail: 1 - top_p, float32: the probability that may be cut off.
      repetition_penalty: float32.
    """

    temperature: Array | np.ndarray
    top_k: Array | np.ndarray
    tail: Array | np.ndarray
    repetition_penalty: Array | np.ndarray

    @classmethod
    def of(cls, config: GenerationConfig, method: Method) -> Numbers:
        """Returns the numbers of `config` for a program of this method."""
        return cls(
            np.asarray(config.temperature, np.float32),
            np.asarray(config.top_k or max(method.candidates, 1), np.int32),
            np.asarray(1.0 - config.top_p, np.float32),
            np.asarray(config.repetition_penalty, np.float32),
        )


def row_keys(seed: int | Array | np.ndarray, rows: int) -> Array:
    """Returns a random key for each row: keys [B], of which row r depends on the seed and on r alone."""
    return jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed), row))(jnp.arange(rows, dtype=jnp.uint32))


def pick(
    logits: Array, keys: Array, index: Array | np.ndarray, seen: Array | None, numbers: Numbers, method: Method
) -> Array:
    """Picks the next token of every row.

    Args:
      logits: [B, V], any float dtype; judged in float32 (float64 stays).
      keys: One random key a row, [B].
      index: Which token of the row this is, int32 scalar; the draw depends on key and index only.
      seen: Tokens of the prompt and of what was generated, bool [B, V]; None without a penalty.
      numbers: Temperature and so on.
      method: What is compiled in.

    Returns:
      Tokens, int32 [B].
    """
    scores = blocks.cast(logits, jnp.promote_types(logits.dtype, jnp.float32))
    if method.penalised and seen is not None:
        scores = penalise(scores, seen, numbers.repetition_penalty)
    if not method.sampled:
        return jnp.argmax(scores, axis=-1).astype(jnp.int32)
    scores, tokens = warp(scores, numbers, method.candidates)
    drawn = jax.vmap(lambda key, row: jax.random.categorical(jax.random.fold_in(key, index), row))(keys, scores)
    if tokens is None:
        return drawn.astype(jnp.int32)
    return jnp.take_along_axis(tokens, drawn[:, None], axis=-1)[:, 0].astype(jnp.int32)


def penalise(scores: Array, seen: Array, penalty: Array | np.ndarray) -> Array:
    """Makes tokens that occurred less likely (arXiv:1909.05858), as `RepetitionPenaltyLogitsProcessor`: [B, V]."""
    return jnp.where(seen, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)


def warp(scores: Array, numbers: Numbers, candidates: int) -> tuple[Array, Array | None]:
    """Applies temperature, top-k and top-p to scores [B, V].

    Returns:
      Scores with -inf for what is cut off, and the tokens they belong to, int32: both [B, C], the highest first; or
      all of them [B, V] in the vocabulary's order and None, where `candidates` is 0.
    """
    scores = scores / numbers.temperature.astype(scores.dtype)
    if candidates == 0:
        return scores, None
    scores, tokens = jax.lax.top_k(scores, candidates)
    return _top_p(_top_k(scores, numbers.top_k), numbers.tail), tokens


def _top_k(scores: Array, k: Array | np.ndarray) -> Array:
    """Cuts off what is lower than the k-th of scores [B, C], highest first; as `TopKLogitsWarper`, ties stay."""
    least = jax.lax.dynamic_slice_in_dim(scores, jnp.minimum(k, scores.shape[-1]) - 1, 1, axis=-1)
    return jnp.where(scores < least, -jnp.inf, scores)


def _top_p(scores: Array, tail: Array | np.ndarray) -> Array:
    """Cuts off the least likely of scores [B, C], highest first, as long as their sum stays within `tail`.

    Summed from the least likely on, as `TopPLogitsWarper` does; the most likely token always stays.
    """
    probabilities = jax.nn.softmax(scores, axis=-1)
    from_below = jnp.flip(jnp.cumsum(jnp.flip(probabilities, axis=-1), axis=-1), axis=-1)
    cut = (from_below <= tail).at[:, 0].set(False)
    return jnp.where(cut, -jnp.inf, scores)
