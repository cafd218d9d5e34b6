"""A Flax NNX engine of the tests with kernels [in, out] and names of its own; `mistake` plants one of MISTAKES."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

MISTAKES = {
    "pairs": "rope-adjacent-pairs",
    "eps": "rms-norm-eps",
    "heads": "kv-heads-interleaved",
    "mask": "mask-off-by-one",
    "scale": "softmax-scale",
}


def rope(x, theta, mistake):
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None] * (1.0 / theta ** (jnp.arange(half) / half))
    cos, sin = jnp.cos(angles)[None, :, None].astype(x.dtype), jnp.sin(angles)[None, :, None].astype(x.dtype)
    if mistake == "pairs":
        even, odd = x[..., 0::2], x[..., 1::2]
        return jnp.stack([even * cos - odd * sin, odd * cos + even * sin], -1).reshape(x.shape)
    low, high = jnp.split(x, 2, -1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], -1)


class Attention(nnx.Module):
    def __init__(self, c, mistake, rngs):
        self.c, self.mistake = c, mistake
        self.query = nnx.Linear(c.hidden_size, c.num_heads * c.head_dim, rngs=rngs)
        self.key = nnx.Linear(c.hidden_size, c.num_kv_heads * c.head_dim, rngs=rngs)
        self.value = nnx.Linear(c.hidden_size, c.num_kv_heads * c.head_dim, rngs=rngs)
        self.out = nnx.Linear(c.num_heads * c.head_dim, c.hidden_size, use_bias=False, rngs=rngs)

    def __call__(self, x):
        c, (batch, length) = self.c, x.shape[:2]
        q, k, v = (part(x).reshape(batch, length, -1, c.head_dim) for part in (self.query, self.key, self.value))
        q, k = rope(q, c.rope_theta, self.mistake), rope(k, c.rope_theta, self.mistake)
        groups = c.num_heads // c.num_kv_heads
        repeated = (
            (lambda x: jnp.tile(x, (1, 1, groups, 1)))
            if self.mistake == "heads"
            else (lambda x: jnp.repeat(x, groups, 2))
        )
        precise = jax.lax.Precision.HIGHEST
        scores = jnp.einsum("btnh,bsnh->bnts", q, repeated(k), precision=precise)
        scores = scores if self.mistake == "scale" else scores / c.head_dim**0.5
        seen = jnp.tril(jnp.ones((length, length), bool), -1 if self.mistake == "mask" else 0).at[0, 0].set(True)
        weights = nnx.softmax(jnp.where(seen, scores, jnp.finfo(scores.dtype).min), -1)
        return self.out(
            jnp.einsum("bnts,bsnh->btnh", weights, repeated(v), precision=precise).reshape(batch, length, -1)
        )


class MLP(nnx.Module):
    def __init__(self, c, rngs):
        self.gate = nnx.Linear(c.hidden_size, c.intermediate_size, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(c.hidden_size, c.intermediate_size, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(c.intermediate_size, c.hidden_size, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    def __init__(self, c, mistake, rngs):
        eps = 1e-3 if mistake == "eps" else c.rms_norm_eps
        self.norm1 = nnx.RMSNorm(c.hidden_size, epsilon=eps, rngs=rngs)
        self.attention = Attention(c, mistake, rngs)
        self.norm2 = nnx.RMSNorm(c.hidden_size, epsilon=eps, rngs=rngs)
        self.feed_forward = MLP(c, rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.feed_forward(self.norm2(x))


class Engine(nnx.Module):
    def __init__(self, c, mistake: str | None = None):
        rngs = nnx.Rngs(0)
        self.embedder = nnx.Embed(c.vocab_size, c.hidden_size, rngs=rngs)
        self.blocks = nnx.List(Block(c, mistake, rngs) for _ in range(c.num_layers))
        self.norm = nnx.RMSNorm(c.hidden_size, epsilon=1e-3 if mistake == "eps" else c.rms_norm_eps, rngs=rngs)

    def __call__(self, tokens):
        x = self.embedder(tokens)
        for block in self.blocks:
            x = block(x)
        return self.embedder.attend(self.norm(x))


def load(model: Engine, tensors) -> Engine:
    """Fills the engine with HuggingFace's tensors, name -> float32 array."""

    def put(param, name):
        value = jnp.asarray(tensors[name])
        param[...] = value.T if name.endswith("proj.weight") else value

    put(model.embedder.embedding, "model.embed_tokens.weight")
    put(model.norm.scale, "model.norm.weight")
    for index, block in enumerate(model.blocks):
        at = f"model.layers.{index}"
        put(block.norm1.scale, f"{at}.input_layernorm.weight")
        put(block.norm2.scale, f"{at}.post_attention_layernorm.weight")
        for part, name in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o")):
            linear = getattr(block.attention, part)
            put(linear.kernel, f"{at}.self_attn.{name}_proj.weight")
            if name != "o":
                put(linear.bias, f"{at}.self_attn.{name}_proj.bias")
        for part in ("gate", "up", "down"):
            put(getattr(block.feed_forward, part).kernel, f"{at}.mlp.{part}_proj.weight")
    return model
