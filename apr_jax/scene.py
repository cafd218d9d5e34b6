"""The stage functions one by one, in float64, on the other side's own values: what hypotheses about mistakes are built
from.

The right formulas are those of `modeling.OPS`. A stage that the other side did not dump is computed from the nearest
ones that it did, so that a hypothesis about it is composed over the gap.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from apr_jax import rotary, stages
from apr_jax.inputs import Inputs
from apr_jax.modeling import OPS, attention_scores, attention_values
from apr_jax.parameters import Parameters
from converters.qwen2 import Qwen2Config

Value = np.ndarray
Formula = Callable[["Scene", int], Value]
"""Computes a stage of a layer (-1 outside the layers); asks the scene for its inputs."""


@dataclasses.dataclass
class Scene:
    """Everything that a stage can be computed from.

    Attributes:
      config: The model's configuration.
      parameters: Its parameters in float64, nested as in `LanguageModel`.
      inputs: The batch.
      theirs: The other side's values.
      overrides: Formulas of a hypothesis, by stage name, in place of the right ones.
      target: The key that is being computed and so not taken from `theirs`.
    """

    config: Qwen2Config
    parameters: Parameters
    inputs: Inputs
    theirs: Mapping[str, np.ndarray]
    overrides: Mapping[str, Formula] = dataclasses.field(default_factory=dict)
    target: str = ""

    def compute(self, key: str, overrides: Mapping[str, Formula] | None = None) -> Value:
        """Computes one stage from the other side's values, under a hypothesis."""
        scene = dataclasses.replace(self, overrides=overrides or {}, target=key)
        layer, stage = _split(key)
        with jax.enable_x64(True):
            return scene.formula(stage)(scene, layer)

    def formula(self, stage: str) -> Formula:
        """Returns the formula of a stage: the hypothesis' or the right one."""
        return self.overrides.get(stage, FORMULAS[stage])

    def get(self, layer: int, stage: str) -> Value:
        """Returns an input of the stage that is being computed, float64: theirs, or computed where they lack it."""
        key = _key(layer, stage)
        if key in self.theirs and key != self.target:
            return np.asarray(self.theirs[key], np.float64)
        return self.formula(stage)(self, layer)

    def residual(self, layer: int) -> Value:
        """Returns the input of a layer, or of the final norm for layer = number of layers."""
        return self.get(-1, "embedding") if layer == 0 else self.get(layer - 1, "post_ffn_residual")

    def weight(self, layer: int, name: str) -> Value:
        """Returns a tensor by its name below the layer ("mlp.up_proj.weight"), or by its whole name for layer -1."""
        node: Any = self.parameters if layer < 0 else self.parameters["model"]["layers"][layer]
        for part in name.split("."):
            node = node[part]
        return np.asarray(node, np.float64)

    def heads(self, layer: int) -> tuple[Value, Value, Value]:
        """Returns q [B, T, N, H], k and v [B, T, K, H] before rotation."""
        return split_heads(self.get(layer, "qkv_bias"), self.config)

    def rotary(self) -> tuple[Value, Value]:
        """Returns cos and sin at the batch's positions, [B, T, H/2]."""
        positions = np.maximum(self.inputs.positions(), 0)
        cos, sin = rotary.tables(self.config.rope_theta, self.config.head_dim, int(positions.max()) + 1)
        return cos[positions].astype(np.float64), sin[positions].astype(np.float64)


def split_heads(qkv: Value, config: Qwen2Config) -> tuple[Value, Value, Value]:
    """Cuts [B, T, (N + 2K) H] into q [B, T, N, H], k and v [B, T, K, H]."""
    heads = qkv.reshape(*qkv.shape[:2], -1, config.head_dim)
    end = config.num_heads + config.num_kv_heads
    return heads[:, :, : config.num_heads], heads[:, :, config.num_heads : end], heads[:, :, end:]


def join_heads(x: Value) -> Value:
    """[B, T, heads, H] -> [B, T, heads * H]."""
    return x.reshape(*x.shape[:2], -1)


def unjoin(x: Value, config: Qwen2Config) -> Value:
    """[B, T, heads * H] -> [B, T, heads, H]."""
    return x.reshape(*x.shape[:2], -1, config.head_dim)


def product(x: Value, weight: Value) -> Value:
    """x [B, T, in] times weight [out, in]."""
    return x @ weight.T


QKV = ("q_proj", "k_proj", "v_proj")


def qkv_weights(scene: Scene, layer: int) -> list[Value]:
    """The three projections, [out, in] each."""
    return [scene.weight(layer, f"self_attn.{name}.weight") for name in QKV]


def qkv_biases(scene: Scene, layer: int) -> list[Value]:
    """The three biases."""
    return [scene.weight(layer, f"self_attn.{name}.bias") for name in QKV]


def head_weight(scene: Scene) -> Value:
    """The head, or the embedding where it is tied, [V, D]."""
    return scene.weight(-1, "model.embed_tokens.weight" if scene.config.tie_word_embeddings else "lm_head.weight")


def _norm(scene: Scene, x: Value, weight: Value) -> Value:
    return np.asarray(OPS.rms_norm(jnp.asarray(x), jnp.asarray(weight), scene.config.rms_norm_eps))


def _rope(scene: Scene, x: Value) -> Value:
    cos, sin = (jnp.asarray(table) for table in scene.rotary())
    return join_heads(np.asarray(OPS.rope(jnp.asarray(x), cos, sin)))


def scores(scene: Scene, layer: int) -> Value:
    """q k^T / sqrt(H), [B, N, T, T]."""
    q, k = (jnp.asarray(unjoin(scene.get(layer, name), scene.config)) for name in ("q_post_rope", "k_post_rope"))
    return np.asarray(attention_scores(OPS, q, k))


def _softmax(scene: Scene, layer: int) -> Value:
    positions = jnp.asarray(scene.inputs.positions())
    return np.asarray(OPS.attention_softmax(jnp.asarray(scene.get(layer, "attn_scores")), positions, positions))


def _attention(scene: Scene, layer: int) -> Value:
    weights, v = jnp.asarray(scene.get(layer, "attn_softmax")), jnp.asarray(scene.heads(layer)[2])
    return join_heads(np.asarray(attention_values(OPS, weights, v)))


def _silu(x: Value) -> Value:
    return np.asarray(OPS.activation(jnp.asarray(x)))


FORMULAS: dict[str, Formula] = {
    "embedding": lambda s, _: s.weight(-1, "model.embed_tokens.weight")[s.inputs.input_ids],
    "attn_norm": lambda s, i: _norm(s, s.residual(i), s.weight(i, "input_layernorm.weight")),
    "qkv_matmul": lambda s, i: product(s.get(i, "attn_norm"), np.concatenate(qkv_weights(s, i))),
    "qkv_bias": lambda s, i: s.get(i, "qkv_matmul") + np.concatenate(qkv_biases(s, i)),
    "q_post_rope": lambda s, i: _rope(s, s.heads(i)[0]),
    "k_post_rope": lambda s, i: _rope(s, s.heads(i)[1]),
    "attn_scores": scores,
    "attn_softmax": _softmax,
    "attention": _attention,
    "attn_out": lambda s, i: product(s.get(i, "attention"), s.weight(i, "self_attn.o_proj.weight")),
    "post_attn_residual": lambda s, i: s.residual(i) + s.get(i, "attn_out"),
    "ffn_norm": lambda s, i: _norm(s, s.get(i, "post_attn_residual"), s.weight(i, "post_attention_layernorm.weight")),
    "ffn_gate": lambda s, i: product(s.get(i, "ffn_norm"), s.weight(i, "mlp.gate_proj.weight")),
    "ffn_up": lambda s, i: product(s.get(i, "ffn_norm"), s.weight(i, "mlp.up_proj.weight")),
    "ffn_silu": lambda s, i: _silu(s.get(i, "ffn_gate")),
    "ffn_swigl": lambda s, i: s.get(i, "ffn_silu") * s.get(i, "ffn_up"),
    "ffn_out": lambda s, i: product(s.get(i, "ffn_swigl"), s.weight(i, "mlp.down_proj.weight")),
    "post_ffn_residual": lambda s, i: s.get(i, "post_attn_residual") + s.get(i, "ffn_out"),
    "final_norm": lambda s, _: _norm(s, s.residual(s.config.num_layers), s.weight(-1, "model.norm.weight")),
    "logits": lambda s, _: product(s.get(-1, "final_norm"), head_weight(s)),
}


def _key(layer: int, stage: str) -> str:
    return {"embedding": stages.EMBEDDING, "final_norm": stages.FINAL_NORM, "logits": stages.LOGITS}.get(
        stage
    ) or stages.layer_key(layer, stage)


def _split(key: str) -> tuple[int, str]:
    parts = key.split(".")
    return (int(parts[1]) if len(parts) == 3 else -1), parts[-1]
