"""Qwen2 and Qwen2.5 (dense) in Flax NNX.

Covers the family of "Qwen2 Technical Report" (arXiv:2407.10671): pre-norm decoder, RMSNorm, rotary positions on split
halves, grouped-query attention with biases on q, k and v only, SwiGLU, head tied to the embedding or not. The order of
operations, casts included, is that of `modeling_qwen2.py` in HuggingFace transformers with eager attention, so that
bfloat16 agrees as well as bfloat16 can.

Modules hold weights under HuggingFace's names and in its `[out, in]` layout; every operation is a pure function in a
frozen table, `Ops`. A kernel for some device is another table, and so is a mistake that a test plants.

Letters in shapes: B batch, T query positions, S key positions, D hidden, N query heads, K key/value heads, G = N / K,
H head dimension, F intermediate, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from apr_jax.converters.checkpoint.qwen2 import Qwen2Config
from apr_jax.model import rotary
from apr_jax.model.describing import function_name, placed

Tap = Callable[[str, Array], Array]
"""`value = tap(stage, value)`: sees a stage's value and returns the one that the computation goes on with."""

NO_POSITION = -1
"""The position of padding and of unfilled cache slots; such keys are never seen."""


def pass_on(stage: str, value: Array) -> Array:
    """The tap of an ordinary run: looks at nothing and changes nothing."""
    del stage
    return value


def at_least_float32(x: Array) -> Array:
    """Widens bf16 and f16 to f32; f32 and f64 stay as they are."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


# --- Operations ------------------------------------------------------------------------------------------------------


def dot(
    spec: str, a: Array, b: Array, dtype: Any = None, precision: lax.PrecisionLike = lax.Precision.HIGHEST
) -> Array:
    """Contracts `a` and `b` as the einsum `spec` says; the result has `dtype`, or theirs if None is given.

    The precision is part of the program, never a process-wide flag: HIGHEST keeps float32 from becoming TF32 on CUDA.
    """
    return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=dtype or a.dtype)


def embed(ids: Array, table: Array) -> Array:
    """Looks up rows: ids [B, T] in table [V, D] -> [B, T, D]."""
    return jnp.take(table, ids, axis=0)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """RMSNorm (arXiv:1910.07467) over the last axis, as `Qwen2RMSNorm`: in f32, cast back, then the weight."""
    wide = at_least_float32(x)
    mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
    return weight * (wide * lax.rsqrt(mean_square + eps)).astype(x.dtype)


def linear(ops: Ops, x: Array, weight: Array, dtype: Any = None) -> Array:
    """x [B, T, in] times weight [out, in], no bias -> [B, T, out] in `dtype`, or in x's if None is given."""
    return ops.dot("bti,oi->bto", x, weight, dtype)


def add_bias(x: Array, bias: Array) -> Array:
    """x [B, T, out] + bias [out], in the bias's dtype: a product that was kept wider is rounded once, after the sum."""
    return (x + bias.astype(x.dtype)).astype(bias.dtype)


def qkv(ops: Ops, x: Array, weights: Attention, tap: Tap) -> tuple[Array, Array, Array]:
    """Projects x [B, T, D] to q [B, T, N, H], k and v [B, T, K, H], biases added.

    The stage `qkv_matmul` is at least float32: as in a GEMM with a bias, only the sum is rounded to x's dtype.
    """
    projections = weights.projections()
    wide = jnp.promote_types(x.dtype, jnp.float32)
    product = jnp.concatenate([ops.linear(ops, x, p.weight[...], wide) for p in projections], axis=-1)
    product = tap("qkv_matmul", product)
    biased = ops.add_bias(product, jnp.concatenate([p.bias[...] for p in projections]))
    biased = tap("qkv_bias", biased)
    config, (batch, length) = weights.config, x.shape[:2]
    q_end, k_end = config.num_heads, config.num_heads + config.num_kv_heads
    heads = biased.reshape(batch, length, -1, config.head_dim)
    return heads[:, :, :q_end], heads[:, :, q_end:k_end], heads[:, :, k_end:]


def rope(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates the pairs (i, i + H/2) of x [B, T, heads, H] by the angles of cos, sin [B, T, H/2] (arXiv:2104.09864).

    The tables are float32 and are cast to x's dtype first, as `apply_rotary_pos_emb` gets them.
    """
    cos, sin = (table.astype(x.dtype)[:, :, None, :] for table in (cos, sin))
    low, high = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def attention_scores(ops: Ops, q: Array, k: Array) -> Array:
    """q [B, T, N, H] with k [B, S, K, H] -> q k^T / sqrt(H), [B, N, T, S]; query head h reads KV head h // G."""
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    scores = ops.dot("btkgh,bskh->bkgts", grouped, k) * jnp.asarray(head_dim**-0.5, q.dtype)
    return scores.reshape(batch, heads, length, k.shape[1])


def visible(q_positions: Array, kv_positions: Array, window: int | None = None) -> Array:
    """Which keys each query sees: q_positions [B, T], kv_positions [B, S] -> bool [B, T, S].

    A key is seen at the query's own position and before it, with a window at that many positions in all; position -1
    (padding, unfilled cache) is never seen.
    """
    keys, queries = kv_positions[:, None, :], q_positions[:, :, None]
    seen = (keys >= 0) & (keys <= queries)
    return seen if window is None else seen & (keys > queries - window)


def attention_softmax(scores: Array, q_positions: Array, kv_positions: Array, window: int | None = None) -> Array:
    """Masked softmax of scores [B, N, T, S] over the last axis, in f32, cast back.

    The mask value is finite, so that a row which sees nothing (padding) gives a uniform row and not NaN.
    """
    wide = at_least_float32(scores)
    seen = visible(q_positions, kv_positions, window)[:, None, :, :]
    return jax.nn.softmax(jnp.where(seen, wide, jnp.finfo(wide.dtype).min), axis=-1).astype(scores.dtype)


def attention_values(ops: Ops, weights: Array, v: Array) -> Array:
    """weights [B, N, T, S] with v [B, S, K, H] -> [B, T, N, H]."""
    batch, heads, length, slots = weights.shape
    kv_heads, head_dim = v.shape[2:]
    grouped = weights.reshape(batch, kv_heads, heads // kv_heads, length, slots)
    return ops.dot("bkgts,bskh->btkgh", grouped, v).reshape(batch, length, heads, head_dim)


def attention(
    ops: Ops,
    q: Array,
    k: Array,
    v: Array,
    q_positions: Array,
    kv_positions: Array,
    tap: Tap,
    window: int | None = None,
) -> Array:
    """Grouped-query attention (arXiv:2305.13245) of q [B, T, N, H] over k, v [B, S, K, H] -> [B, T, N * H].

    With a window a query sees the keys at that many positions, its own the last.
    """
    scores = tap("attn_scores", ops.attention_scores(ops, q, k))
    weights = tap("attn_softmax", ops.attention_softmax(scores, q_positions, kv_positions, window))
    values = ops.attention_values(ops, weights, v)
    return tap("attention", values.reshape(*values.shape[:2], -1))


def residual(x: Array, update: Array) -> Array:
    """x + update, both [B, T, D]."""
    return x + update


def silu(x: Array) -> Array:
    """x * sigmoid(x), rounded once: in f32 for 16-bit inputs, as torch does."""
    wide = at_least_float32(x)
    return (wide * jax.nn.sigmoid(wide)).astype(x.dtype)


def multiply(a: Array, b: Array) -> Array:
    """a * b, both [B, T, F]."""
    return a * b


def glu(ops: Ops, x: Array, weights: MLP, tap: Tap) -> Array:
    """SwiGLU before the down projection (arXiv:2002.05202): x [B, T, D] -> silu(gate) * up, [B, T, F]."""
    if weights.fused:
        gate, up = jnp.split(ops.linear(ops, x, weights.gate_up_proj.weight[...]), 2, axis=-1)
    else:
        gate, up = (ops.linear(ops, x, p.weight[...]) for p in (weights.gate_proj, weights.up_proj))
    gate, up = tap("ffn_gate", gate), tap("ffn_up", up)
    activated = tap("ffn_silu", ops.activation(gate))
    return tap("ffn_swigl", ops.multiply(activated, up))


def attention_block(
    ops: Ops, x: Array, layer: DecoderLayer, step: Step, cache: LayerCache | None, tap: Tap
) -> tuple[Array, LayerCache | None]:
    """The first half of a layer: residual stream x [B, T, D] -> x + attention(norm(x)), and the cache with the keys.

    Of the tokens that the step keeps; keys and values come from all of them.
    """
    normed = tap("attn_norm", layer.input_layernorm(x, ops))
    attended, cache = layer.self_attn(normed, step, cache, ops, tap)
    return tap("post_attn_residual", ops.residual(step.keep(x), attended)), cache


def mlp_block(ops: Ops, x: Array, layer: DecoderLayer, tap: Tap) -> Array:
    """The second half of a layer: residual stream x [B, T, D] -> x + mlp(norm(x))."""
    normed = tap("ffn_norm", layer.post_attention_layernorm(x, ops))
    return tap("post_ffn_residual", ops.residual(x, layer.mlp(normed, ops, tap)))


def decoder_layers(
    ops: Ops,
    x: Array,
    layers: Sequence[DecoderLayer],
    step: Step,
    caches: Sequence[LayerCache | None],
    layer_ops: Mapping[int, Ops],
) -> tuple[Array, tuple[Any, ...]]:
    """Takes the residual stream x [B, T, D] through all layers; `layer_ops` has tables for single layers, by index.

    The last layer alone leaves out what the step does not keep: the others' outputs are keys and values for it.
    """
    after = []
    for index, (layer, cache) in enumerate(zip(layers, caches, strict=True)):
        here = step if index + 1 == len(layers) else step._replace(kept=None)
        x, cache = layer(x, here, cache, layer_ops.get(index, ops))
        after.append(cache)
    return x, tuple(after)


def head(ops: Ops, x: Array, weight: Array) -> Array:
    """Final hidden states [B, T, D] with the head or the embedding [V, D] -> logits [B, T, V]."""
    return ops.linear(ops, x, weight)


@dataclasses.dataclass(frozen=True)
class Ops:
    """The operations of a layer and of the model around the layers; each field is a function of this module's name.

    Composite operations (`qkv`, `attention`, `glu`, the two blocks of a layer, and all layers) take the table itself
    and call its elementary ones, so a variant replaces as much or as little as it means to. A composite that is fused
    need not report its inner stages.
    """

    dot: Callable[..., Array] = dot
    embed: Callable[[Array, Array], Array] = embed
    rms_norm: Callable[[Array, Array, float], Array] = rms_norm
    linear: Callable[..., Array] = linear
    add_bias: Callable[[Array, Array], Array] = add_bias
    qkv: Callable[[Ops, Array, Attention, Tap], tuple[Array, Array, Array]] = qkv
    rope: Callable[[Array, Array, Array], Array] = rope
    attention_scores: Callable[[Ops, Array, Array], Array] = attention_scores
    attention_softmax: Callable[[Array, Array, Array, int | None], Array] = attention_softmax
    attention_values: Callable[[Ops, Array, Array], Array] = attention_values
    attention: Callable[[Ops, Array, Array, Array, Array, Array, Tap, int | None], Array] = attention
    residual: Callable[[Array, Array], Array] = residual
    activation: Callable[[Array], Array] = silu
    multiply: Callable[[Array, Array], Array] = multiply
    glu: Callable[[Ops, Array, MLP, Tap], Array] = glu
    attention_block: Callable[..., tuple[Array, LayerCache | None]] = attention_block
    mlp_block: Callable[[Ops, Array, DecoderLayer, Tap], Array] = mlp_block
    layers: Callable[..., tuple[Array, tuple[Any, ...]]] = decoder_layers
    head: Callable[[Ops, Array, Array], Array] = head

    def __repr__(self) -> str:
        """Names the operations that are not the plain ones."""
        own = [
            f"{field.name}={function_name(getattr(self, field.name))}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) is not field.default
        ]
        return f"Ops({', '.join(own)})" if own else "OPS"


OPS = Ops()
"""The right operations, in the dtype of the parameters; float32 stays float32 on every backend."""

TF32_OPS = dataclasses.replace(OPS, dot=functools.partial(dot, precision=lax.DotAlgorithmPreset.TF32_TF32_F32))
"""Float32 with dot inputs rounded to TF32 (CUDA only)."""

NO_OVERRIDES: Mapping[int, Ops] = MappingProxyType({})


# --- Modules ---------------------------------------------------------------------------------------------------------


class Linear(nnx.Module):
    """A projection: weight [out, in] and, where asked for, bias [out]."""

    def __init__(self, in_features: int, out_features: int, bias: bool, dtype: Any):
        self.weight = nnx.Param(jnp.zeros((out_features, in_features), dtype))
        if bias:
            self.bias = nnx.Param(jnp.zeros((out_features,), dtype))


class Embedding(nnx.Module):
    """A table of rows: weight [V, D]."""

    def __init__(self, rows: int, width: int, dtype: Any):
        self.weight = nnx.Param(jnp.zeros((rows, width), dtype))


class RMSNorm(nnx.Module):
    """The weight [D] of an RMSNorm, and its eps."""

    def __init__(self, width: int, eps: float, dtype: Any):
        self.eps = eps
        self.weight = nnx.Param(jnp.ones((width,), dtype))

    def __call__(self, x: Array, ops: Ops) -> Array:
        return ops.rms_norm(x, self.weight[...], self.eps)


class LayerCache(NamedTuple):
    """Keys and values of one layer, [B, S, K, H] each."""

    keys: Array
    values: Array


class Step(NamedTuple):
    """Where the tokens of one call stand; shared by all layers.

    Attributes:
      cos: cos of the rotary angles, float32 [B, T, H/2].
      sin: sin of the rotary angles, float32 [B, T, H/2].
      q_positions: Positions of the tokens, int32 [B, T]; -1 is padding.
      kv_positions: Positions of the keys, int32 [B, S]: the tokens themselves, or every slot of the cache.
      slot: First cache slot that the tokens are written to, int32 scalar; None without a cache. The Python integer 0
        says that the cache was empty: the tokens see nothing but each other.
      kept: The only token of each row that the result is asked for, int32 [B]; None means all.
    """

    cos: Array
    sin: Array
    q_positions: Array
    kv_positions: Array
    slot: Array | int | None
    kept: Array | None

    def keep(self, x: Array) -> Array:
        """Picks the tokens that are kept from x [B, T, ...]: [B, 1, ...], or all."""
        if self.kept is None:
            return x
        return jnp.take_along_axis(x, self.kept.reshape(-1, *[1] * (x.ndim - 1)), axis=1)


class Attention(nnx.Module):
    """Self-attention: q, k and v with bias, as three projections or fused into one; o without.

    Attributes:
      config: The model's configuration.
      window: How many keys a query sees, its own included; None is all before it.
    """

    def __init__(self, config: Qwen2Config, dtype: Any, fused: bool = False, window: int | None = None):
        self.config = config
        self.window = window
        self.fused = fused
        q_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        if fused:
            self.qkv_proj = Linear(config.hidden_size, q_width + 2 * kv_width, bias=True, dtype=dtype)
        else:
            self.q_proj = Linear(config.hidden_size, q_width, bias=True, dtype=dtype)
            self.k_proj = Linear(config.hidden_size, kv_width, bias=True, dtype=dtype)
            self.v_proj = Linear(config.hidden_size, kv_width, bias=True, dtype=dtype)
        self.o_proj = Linear(q_width, config.hidden_size, bias=False, dtype=dtype)

    def projections(self) -> tuple[Linear, ...]:
        """The projections that give q, k and v, in this order."""
        return (self.qkv_proj,) if self.fused else (self.q_proj, self.k_proj, self.v_proj)

    def __call__(
        self, x: Array, step: Step, cache: LayerCache | None, ops: Ops, tap: Tap
    ) -> tuple[Array, LayerCache | None]:
        q, k, v = ops.qkv(ops, x, self, tap)
        q = _tap_heads(tap, "q_post_rope", ops.rope(q, step.cos, step.sin))
        k = _tap_heads(tap, "k_post_rope", ops.rope(k, step.cos, step.sin))
        if cache is not None and step.slot is not None:
            cache = LayerCache(
                lax.dynamic_update_slice_in_dim(cache.keys, k, step.slot, axis=1),
                lax.dynamic_update_slice_in_dim(cache.values, v, step.slot, axis=1),
            )
            if not isinstance(step.slot, int):
                k, v = cache
        positions = step.keep(step.q_positions), step.kv_positions
        values = ops.attention(ops, step.keep(q), k, v, *positions, tap, self.window)
        return tap("attn_out", ops.linear(ops, values, self.o_proj.weight[...])), cache


class MLP(nnx.Module):
    """The gated feed-forward block: gate and up as two projections or fused into one."""

    def __init__(self, config: Qwen2Config, dtype: Any, fused: bool = False):
        hidden, ffn = config.hidden_size, config.intermediate_size
        self.fused = fused
        if fused:
            self.gate_up_proj = Linear(hidden, 2 * ffn, bias=False, dtype=dtype)
        else:
            self.gate_proj = Linear(hidden, ffn, bias=False, dtype=dtype)
            self.up_proj = Linear(hidden, ffn, bias=False, dtype=dtype)
        self.down_proj = Linear(ffn, hidden, bias=False, dtype=dtype)

    def __call__(self, x: Array, ops: Ops, tap: Tap) -> Array:
        return tap("ffn_out", ops.linear(ops, ops.glu(ops, x, self, tap), self.down_proj.weight[...]))


class DecoderLayer(nnx.Module):
    """One layer: attention and MLP, each behind a norm and beside the residual stream."""

    def __init__(self, config: Qwen2Config, dtype: Any, fused: bool = False, window: int | None = None):
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.self_attn = Attention(config, dtype, fused, window)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.mlp = MLP(config, dtype, fused)

    def __call__(
        self, x: Array, step: Step, cache: LayerCache | None = None, ops: Ops = OPS, tap: Tap = pass_on
    ) -> tuple[Array, LayerCache | None]:
        """Takes the residual stream [B, T, D] through the layer; returns it with the cache that holds the new keys.

        Where the step keeps one token of each row, that alone is returned, [B, 1, D].
        """
        x, cache = ops.attention_block(ops, x, self, step, cache, tap)
        return ops.mlp_block(ops, x, self, tap), cache


class Cache(NamedTuple):
    """The keys and values of a sequence in the making. A value: every step returns the next one.

    Attributes:
      layers: One pair of arrays a layer.
      positions: Position of the token in each slot, int32 [B, S]; -1 is padding or not filled yet.
      length: Number of slots filled, int32 scalar, the same for all rows.
    """

    layers: tuple[LayerCache, ...]
    positions: Array
    length: Array

    @classmethod
    def empty(cls, config: Qwen2Config, batch: int, capacity: int, dtype: Any) -> Cache:
        """Returns a cache of `capacity` slots with nothing in it."""
        shape = (batch, capacity, config.num_kv_heads, config.head_dim)
        layers = tuple(LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.num_layers))
        return cls(layers, jnp.full((batch, capacity), NO_POSITION, jnp.int32), jnp.zeros((), jnp.int32))

    def __repr__(self) -> str:
        rows, slots = self.positions.shape
        return f"Cache({rows} rows of {slots} slots, {len(self.layers)} layers, {placed(self.layers[0].keys)})"


class Decoder(nnx.Module):
    """Embedding, layers and final norm: what HuggingFace's checkpoints call `model`."""

    def __init__(self, config: Qwen2Config, dtype: Any, fused: bool = False):
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype)
        layers = range(config.num_layers)
        self.layers = nnx.List([DecoderLayer(config, dtype, fused, config.window_of(layer)) for layer in layers])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)


class Qwen2ForCausalLM(nnx.Module):
    """Qwen2 with its language-model head; `lm_head` is absent where the head is tied to the embedding.

    Freshly made it has zero weights: parameters come from a checkpoint (`apr_jax.load_model(...).module`). With `fused`
    each layer has one leaf for q, k and v and one for gate and up: fewer, larger products, the same values.
    """

    def __init__(self, config: Qwen2Config, dtype: Any = jnp.float32, fused: bool = False):
        self.config = config
        self.model = Decoder(config, dtype, fused)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype)

    def __call__(self, input_ids: Any, positions: Any = None, attention_mask: Any = None) -> Array:
        """Computes next-token logits: a pure, differentiable function of the parameters, for use in JAX's transforms.

        It makes its own positions and rotary tables. To save memory in training, write its five lines yourself and
        wrap the layer's into `jax.checkpoint`. Masks come from positions: padding may stand on either side.

        Args:
          input_ids: Token ids, integers [B, T].
          positions: Position of each token in its sequence, integers that broadcast to [B, T], rising along a row. None
            counts each row's tokens from 0, those that the mask hides left out.
          attention_mask: 0 at padding, else not, [B, T]; None means no padding.

        Returns:
          Logits [B, T, V] in the parameters' dtype; those at padding mean nothing. Float64 parameters need
          `jax.enable_x64` around the call. A token beyond the vocabulary gives NaN, as does a position from
          `config.max_position_embeddings` on where the positions are traced: nothing can be raised there.

        Raises:
          ValueError: The ids have another number of axes than two; or RoPE is of the rule "dynamic", the tokens may
            reach beyond `config.max_position_embeddings`, and how far is traced.
        """
        step = self.place(input_ids, positions, attention_mask)
        x = self.embed(jnp.asarray(input_ids))
        for layer in self.model.layers:
            x, _ = layer(x, step)
        return self.project(self.norm(x))

    def place(self, input_ids: Any, positions: Any = None, attention_mask: Any = None) -> Step:
        """Returns what every layer needs to know of a batch without a cache; arguments as `__call__`."""
        shape = jnp.shape(input_ids)
        if len(shape) != 2:
            raise ValueError(
                f"input_ids have shape {list(shape)}, expected [batch, tokens]; under jax.vmap add an axis"
            )
        # The rotary tables are constants of the program that is traced, so no longer than has to be.
        length = shape[1]
        if positions is not None:
            known = not isinstance(positions, jax.core.Tracer)
            length = int(np.max(positions)) + 1 if known else self.config.max_position_embeddings
        elif attention_mask is not None:
            positions = jnp.cumsum(jnp.asarray(attention_mask) != 0, axis=1, dtype=jnp.int32) - 1
        else:
            positions = jnp.arange(length, dtype=jnp.int32)
        positions = jnp.broadcast_to(jnp.asarray(positions, jnp.int32), shape)
        if attention_mask is not None:
            positions = jnp.where(jnp.asarray(attention_mask) != 0, positions, NO_POSITION)
        return make_step(positions, *_tables_for(self.config, max(length, 1), positions))[0]

    def forward(
        self,
        input_ids: Array,
        positions: Array,
        cos: Array,
        sin: Array,
        cache: Cache | None = None,
        ops: Ops = OPS,
        layer_ops: Mapping[int, Ops] = NO_OVERRIDES,
        first: bool = False,
    ) -> tuple[Array, Cache | None]:
        """Computes next-token logits with tables and operations of the caller's, and with a cache.

        Args:
          input_ids: Token ids, int32 [B, T].
          positions: Position of each token in its sequence, int32 [B, T], rising along a row; -1 is padding.
          cos: cos of the rotary angles of positions 0 .. P-1, float32 [P, H/2] (`rotary.tables`), or for each row its
            own [B, P, H/2].
          sin: sin of the same.
          cache: Keys and values of earlier tokens; the new ones are added.
          ops: The table of operations.
          layer_ops: Tables for single layers, by index.
          first: The cache is empty, so that the tokens need not look into it. Padding has to stand behind a row's
            tokens: a kernel may take the mask as causal along the row.

        Returns:
          Logits [B, T, V] in the parameters' dtype, and the cache after this step (None without one).
        """
        x, cache = self.hidden(input_ids, positions, cos, sin, cache, ops, layer_ops, first)
        return self.project(x, ops), cache

    def hidden(
        self,
        input_ids: Array,
        positions: Array,
        cos: Array,
        sin: Array,
        cache: Cache | None = None,
        ops: Ops = OPS,
        layer_ops: Mapping[int, Ops] = NO_OVERRIDES,
        first: bool = False,
        kept: Array | None = None,
    ) -> tuple[Array, Cache | None]:
        """As `forward`, up to the final norm: hidden states [B, T, D] for `project`, and the cache.

        With `kept`, int32 [B], they are those of one token of each row, [B, 1, D]: a prompt asks for no others.
        """
        step, filled = make_step(positions, cos, sin, cache, first, kept)
        x = self.embed(input_ids, ops)
        caches = (None,) * self.config.num_layers if cache is None else cache.layers
        x, layers = ops.layers(ops, x, self.model.layers, step, caches, layer_ops)
        if cache is not None:
            cache = Cache(layers, filled, cache.length + jnp.int32(input_ids.shape[1]))
        return self.norm(x, ops), cache

    def embed(self, input_ids: Array, ops: Ops = OPS) -> Array:
        """Token ids [B, T] -> residual stream [B, T, D], in the norms' dtype: matrices may be stored in fewer bits."""
        rows = ops.embed(input_ids, self.model.embed_tokens.weight[...])
        # Those of quantised tables are padded to whole blocks.
        return rows[..., : self.config.hidden_size].astype(self.model.norm.weight[...].dtype)

    def norm(self, x: Array, ops: Ops = OPS) -> Array:
        """The final norm, [B, T, D]."""
        return self.model.norm(x, ops)

    def project(self, x: Array, ops: Ops = OPS) -> Array:
        """Normed hidden states [B, T, D] -> logits [B, T, V], through the head or the tied embedding."""
        source = self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return ops.head(ops, x, source.weight[...])


_tables = functools.lru_cache(maxsize=4)(rotary.tables)


def _tables_for(config: Qwen2Config, length: int, positions: Array) -> tuple[Any, Any]:
    """Returns rotary tables of `length` positions for tokens at `positions`, which may be traced."""
    rule, cut = config.rope_scaling, rotary.relevant_length(config, 0)
    if rule is None or not rule.depends_on_length or length <= cut:
        return _tables(config, length, 0)
    reach = jnp.max(positions) + 1
    if not isinstance(reach, jax.core.Tracer):
        return _tables(config, length, rotary.relevant_length(config, int(reach)))
    if rule.rule == "dynamic":
        raise ValueError(
            f"the RoPE rule 'dynamic' has another base for each length beyond {cut}, and under jit the length of the "
            "tokens is not known: give positions that are not traced"
        )
    short, long = (_tables(config, length, rotary.relevant_length(config, reach)) for reach in (0, length))
    cos, sin = (jnp.where(reach > cut, *pair) for pair in zip(long, short, strict=True))
    return cos, sin


def make_step(
    positions: Array,
    cos: Array | np.ndarray,
    sin: Array | np.ndarray,
    cache: Cache | None = None,
    first: bool = False,
    kept: Array | None = None,
) -> tuple[Step, Array]:
    """Gathers the rotary tables at `positions` [B, T] and places the tokens in the cache, empty if `first`.

    The tables are [P, H/2], or for each row its own [B, P, H/2].

    Returns:
      The step, and the positions of all keys after it, int32 [B, S].
    """
    rows = jnp.maximum(positions, 0)
    if cos.ndim == 3:
        cos, sin = (jnp.take_along_axis(table, rows[..., None], axis=1) for table in (cos, sin))
    else:
        cos, sin = (jnp.take(table, rows, axis=0) for table in (cos, sin))
    slot: Array | int | None = None
    filled = positions
    if cache is not None:
        slot = 0 if first else cache.length
        filled = lax.dynamic_update_slice_in_dim(cache.positions, positions, slot, axis=1)
    keys = positions if first else filled
    return Step(cos, sin, positions, keys, slot, kept), filled


def _tap_heads(tap: Tap, stage: str, x: Array) -> Array:
    """Shows x [B, T, heads, H] to the tap as [B, T, heads * H]."""
    return tap(stage, x.reshape(*x.shape[:2], -1)).reshape(x.shape)
