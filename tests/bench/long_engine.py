"""A Qwen2 engine for long prompts that can go wrong at one position: attention in blocks of queries, in JAX's float32.

It shares no code with the model: formulas and rotary angles are written here once more. What it dumps are layer outputs
and keys of all positions, and every stage but scores and shares of some.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.oracle import inv_freq

MISTAKES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "restart": ("rope-position", {"restart": None}),
    "window": ("mask-window", {"window": None}),
    "chunk": ("mask-chunk", {"size": None}),
    "stale": ("positions-permuted", {}),
}
"""Mistake -> the name that it has to be given, and the parameters that have to be the position. From there on positions
are rotated from 0 again; no more keys than that many are seen; none before it are; in "stale" one slot of the cache of
keys holds what the slot before it holds."""
_BLOCK = 128
_dot = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def sampled(length: int, step: int) -> np.ndarray:
    """The positions of which all stages are dumped: the first 64, then one of every `step`, and the last."""
    return np.unique([*range(64), *range(0, length, step), length - 1])


def dump(
    weights: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    ids: np.ndarray,
    mistake: str | None,
    position: int,
    columns: np.ndarray,
    layers: tuple[int, ...] | None = None,
) -> dict[str, np.ndarray]:
    """Runs the prompt ids [1, T] and returns trace key -> float32 [1, T or R, ...], rows at `columns`.

    Args:
      weights: HuggingFace's names -> arrays.
      config: The content of config.json.
      ids: Token ids.
      mistake: One of MISTAKES, made from `position` on; None is a right run.
      position: Where it begins.
      columns: The positions of which all stages are returned.
      layers: Where it is made; None is everywhere.
    """
    some, values = jnp.asarray(columns), {}
    heads, width = config["num_attention_heads"], config["hidden_size"]
    head_dim = config.get("head_dim") or width // heads
    places = np.arange(ids.shape[1])

    def tables(moved: np.ndarray) -> tuple[jax.Array, jax.Array]:
        frequencies = np.asarray(inv_freq(config["rope_theta"], head_dim), np.float32)
        angles = (moved.astype(np.float32)[:, None] * frequencies).astype(np.float64)
        return jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)

    right, wrong = tables(places), tables(places % position)
    table = jnp.asarray(weights["model.embed_tokens.weight"], jnp.float32)
    x = table[ids[0]]
    values["stage.embedding"] = np.asarray(x[some])[None]
    eps = config["rms_norm_eps"]
    run = jax.jit(functools.partial(_layer, heads, config["num_key_value_heads"], head_dim, eps), static_argnums=(4, 5))
    for layer in range(config["num_hidden_layers"]):
        start = f"model.layers.{layer}."
        own = {name.removeprefix(start): jnp.asarray(w, jnp.float32) for name, w in weights.items() if start in name}
        made = mistake if layers is None or layer in layers else None
        x, keys, stages = run(own, x, wrong if made == "restart" else right, some, made, position)
        values |= {f"stage.{layer}.{name}": np.asarray(value)[None] for name, value in stages.items()}
        values[f"stage.{layer}.k_post_rope"] = np.asarray(keys)[None]
        values[f"stage.{layer}.post_ffn_residual"] = np.asarray(x)[None]
    normed = _norm(x[some], jnp.asarray(weights["model.norm.weight"], jnp.float32), eps)
    head = table if config.get("tie_word_embeddings") else jnp.asarray(weights["lm_head.weight"], jnp.float32)
    values["stage.final_norm"] = np.asarray(normed)[None]
    values["logits"] = np.asarray(_dot("td,vd->tv", normed[-1:], head))[None]
    return values


def _norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    return weight * (x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps))


def _turn(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    low, high = jnp.split(x, 2, -1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], -1)


def _layer(
    heads: int,
    kv_heads: int,
    head_dim: int,
    eps: float,
    weights: Mapping[str, jax.Array],
    x: jax.Array,
    tables: tuple[jax.Array, jax.Array],
    some: jax.Array,
    mistake: str | None,
    position: int,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """One layer on x [T, D]: its output, the keys [T, K H], and the stages at `some` positions."""
    length = len(x)
    linear: Callable[..., jax.Array] = lambda y, name: _dot("td,od->to", y, weights[f"{name}.weight"])  # noqa: E731
    normed = _norm(x, weights["input_layernorm.weight"], eps)
    products = [linear(normed, f"self_attn.{name}") for name in ("q_proj", "k_proj", "v_proj")]
    biases = [weights[f"self_attn.{name}.bias"] for name in ("q_proj", "k_proj", "v_proj")]
    biased = [product + bias for product, bias in zip(products, biases, strict=True)]
    q, k, v = (each.reshape(length, -1, head_dim) for each in biased)
    cos, sin = (table[:, None] for table in tables)
    q, k = _turn(q, cos, sin), _turn(k, cos, sin)
    if mistake == "stale":
        k = k.at[position].set(k[position - 1])
    places = jnp.arange(length)

    def block(start: jax.Array) -> jax.Array:
        queries = jax.lax.dynamic_slice_in_dim(q, start, _BLOCK, 0).reshape(_BLOCK, kv_heads, -1, head_dim)
        scores = _dot("tkgh,skh->kgts", queries, k) * head_dim**-0.5
        at = start + jnp.arange(_BLOCK)
        seen = places <= at[:, None]
        if mistake == "window":
            seen &= places > at[:, None] - position
        if mistake == "chunk":
            seen &= places >= at[:, None] // position * position
        shares = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), -1)
        return _dot("kgts,skh->tkgh", shares, v).reshape(_BLOCK, -1)

    # The last block begins early enough to be whole.
    starts = jnp.minimum(jnp.arange(0, length, _BLOCK), length - _BLOCK)
    parts = jax.lax.map(block, starts)
    attention = jnp.zeros((length, heads * head_dim), x.dtype)
    attention = jax.lax.fori_loop(
        0, len(starts), lambda i, whole: jax.lax.dynamic_update_slice_in_dim(whole, parts[i], starts[i], 0), attention
    )
    attended = linear(attention, "self_attn.o_proj")
    middle = x + attended
    ffn_norm = _norm(middle, weights["post_attention_layernorm.weight"], eps)
    gate, up = linear(ffn_norm, "mlp.gate_proj"), linear(ffn_norm, "mlp.up_proj")
    activated = gate * jax.nn.sigmoid(gate)
    down = linear(activated * up, "mlp.down_proj")
    stages = {
        "attn_norm": normed,
        "qkv_matmul": jnp.concatenate(products, -1),
        "qkv_bias": jnp.concatenate(biased, -1),
        "q_post_rope": q.reshape(length, -1),
        "attention": attention,
        "attn_out": attended,
        "post_attn_residual": middle,
        "ffn_norm": ffn_norm,
        "ffn_gate": gate,
        "ffn_up": up,
        "ffn_silu": activated,
        "ffn_swigl": activated * up,
        "ffn_out": down,
    }
    return middle + down, k.reshape(length, -1), {name: value[some] for name, value in stages.items()}
