"""Planted mistakes: what the tests must see. Each turns a right model into one that computes otherwise.

Names and meanings are those of the fault table that the project works from; `visible` says for which checkpoints a
fault changes anything at all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import Array

from apr_jax.converters.checkpoint.qwen2 import Qwen2Config
from apr_jax.model.language_model import LanguageModel
from apr_jax.model.qwen2 import OPS, Ops, at_least_float32


@dataclasses.dataclass(frozen=True)
class Fault:
    """A mistake, planted in all layers or, where it is one of operations, in the layers asked for.

    Attributes:
      name: Its name.
      plant: Takes the right model.
      visible: Whether it changes the outputs of a model of this configuration.
    """

    name: str
    plant: Callable[[LanguageModel], LanguageModel]
    visible: Callable[[Qwen2Config], bool] = lambda config: True


def adjacent_pairs(x: Array, cos: Array, sin: Array) -> Array:
    """RoPE on the pairs (2i, 2i + 1) in place of (i, i + H/2)."""
    cos, sin = (table.astype(x.dtype)[:, :, None, :] for table in (cos, sin))
    even, odd = x[..., 0::2], x[..., 1::2]
    return jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1).reshape(x.shape)


def not_causal(scores: Array, q_positions: Array, kv_positions: Array, window: int | None = None) -> Array:
    """Softmax over all keys that are no padding."""
    del q_positions
    wide = at_least_float32(scores)
    seen = (kv_positions >= 0)[:, None, None, :]
    return jax.nn.softmax(jnp.where(seen, wide, jnp.finfo(wide.dtype).min), axis=-1).astype(scores.dtype)


def _interleaved(x: Array, heads: int) -> Array:
    return x[:, :, np.arange(heads) % x.shape[2]]


def interleaved_scores(ops: Ops, q: Array, k: Array) -> Array:
    """Query head h reads KV head h mod n_kv in place of h // group."""
    return OPS.attention_scores(ops, q, _interleaved(k, q.shape[2]))


def interleaved_values(ops: Ops, weights: Array, v: Array) -> Array:
    """The same for the values."""
    return OPS.attention_values(ops, weights, _interleaved(v, weights.shape[1]))


OPERATIONS = {
    "rope": adjacent_pairs,
    "attention_softmax": not_causal,
    "attention_scores": interleaved_scores,
}
"""Operation of a table -> what is wrong in its place."""
ADJACENT_PAIRS = dataclasses.replace(OPS, rope=adjacent_pairs)
NOT_CAUSAL = dataclasses.replace(OPS, attention_softmax=not_causal)
INTERLEAVED = dataclasses.replace(OPS, attention_scores=interleaved_scores, attention_values=interleaved_values)


def _with_config(**changes: float) -> Callable[[LanguageModel], LanguageModel]:
    return lambda model: LanguageModel(
        dataclasses.replace(model.config, **changes), model.parameters, model.device, model.ops
    )


def _in_layers(change: Callable[[dict], dict]) -> Callable[[LanguageModel], LanguageModel]:
    """Applies `change` to copies of every layer's parameters."""

    def plant(model: LanguageModel) -> LanguageModel:
        outer = model.parameters["model"]
        layers = {index: change(jax.tree.map(lambda x: x, layer)) for index, layer in outer["layers"].items()}
        parameters = {**model.parameters, "model": {**outer, "layers": layers}}
        return LanguageModel(model.config, parameters, model.device, model.ops)

    return plant


def _without_bias(projection: str) -> Callable[[dict], dict]:
    def change(layer: dict) -> dict:
        layer["self_attn"][projection]["bias"] = jnp.zeros_like(layer["self_attn"][projection]["bias"])
        return layer

    return change


def _swap_gate_and_up(layer: dict) -> dict:
    mlp = layer["mlp"]
    return {**layer, "mlp": {**mlp, "gate_proj": mlp["up_proj"], "up_proj": mlp["gate_proj"]}}


def _transpose_output(layer: dict) -> dict:
    weight = layer["self_attn"]["o_proj"]["weight"]
    layer["self_attn"]["o_proj"]["weight"] = weight.T.reshape(weight.shape)
    return layer


def _relabel_down(layer: dict) -> dict:
    weight = np.asarray(layer["mlp"]["down_proj"]["weight"]).astype(ml_dtypes.bfloat16)
    layer["mlp"]["down_proj"]["weight"] = jnp.asarray(weight.view(np.float16).astype(np.float32))
    return layer


def _is_grouped(config: Qwen2Config) -> bool:
    return 1 < config.num_kv_heads < config.num_heads


FAULTS = (
    Fault("rope-adjacent-pairs", lambda model: model.with_ops(ADJACENT_PAIRS)),
    Fault("rope-theta", _with_config(rope_theta=1e4), lambda config: config.rope_theta != 1e4),
    Fault("rms-norm-eps", _with_config(rms_norm_eps=1e-5), lambda config: config.rms_norm_eps != 1e-5),
    Fault("q-bias-missing", _in_layers(_without_bias("q_proj"))),
    Fault("k-bias-missing", _in_layers(_without_bias("k_proj"))),
    Fault("mask-not-causal", lambda model: model.with_ops(NOT_CAUSAL)),
    Fault("gate-up-swapped", _in_layers(_swap_gate_and_up)),
    Fault("o-proj-transposed", _in_layers(_transpose_output)),
    Fault("kv-heads-interleaved", lambda model: model.with_ops(INTERLEAVED), _is_grouped),
    Fault("weights-relabelled", _in_layers(_relabel_down)),
)
