"""The loss of a batch, and its gradient with respect to every parameter and every stage of the forward pass.

The loss is the mean of the next tokens' cross-entropy, in nats, computed in float32 at least, as HuggingFace's
`ForCausalLMLoss` does. JAX differentiates the very modules that compute the logits.

Names: `grad.{parameter}`, spelt as in the checkpoint, [as the parameter]; where the head is tied to the embedding also
`grad.{parameter}.as_embedding` and `grad.{parameter}.as_head`, the two parts that it is the sum of; and for stages
`grad.{key}`, key as in `trace.stages`: with respect to all that is computed from the stage's value.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from apr_jax.converters.checkpoint.qwen2 import EMBEDDING, Qwen2Config
from apr_jax.model.language_model import COMPILER_OPTIONS, LanguageModel, LayerOps, model_graph
from apr_jax.model.parameters import Parameters, named
from apr_jax.model.qwen2 import Ops, Qwen2ForCausalLM, at_least_float32, make_step
from apr_jax.model.sharding import to_host
from apr_jax.trace import stages
from apr_jax.trace.inputs import Inputs
from apr_jax.trace.positions import predicted_pairs

AS_EMBEDDING, AS_HEAD = ".as_embedding", ".as_head"


def gradients(
    model: LanguageModel, inputs: Inputs, counted: np.ndarray | None = None, with_stages: bool = False
) -> tuple[float, dict[str, np.ndarray]]:
    """Computes the loss of a batch and its gradients.

    Args:
      model: The model, not fused.
      inputs: The batch; pairs of neighbouring tokens are predicted.
      counted: Which tokens the loss is over, bool [B, T]; None means all that a token stands before.
      with_stages: Whether gradients of stages are wanted too.

    Returns:
      The loss in nats, and name -> gradient, in the dtype of what it is the gradient of.

    Raises:
      ValueError: No token is predicted.
    """
    wanted = predicted_pairs(inputs, counted)
    if not wanted.any():
        raise ValueError("no token that counts has another one before it")
    inputs.check_vocabulary(model.config.vocab_size)
    with model.scope():
        program = _program(model.config, model.dtype, model.fused, model.ops, tuple(model.layer_ops.items()))
        arguments = (inputs.input_ids, inputs.positions(), *model.rotary_of(inputs), wanted)
        probes = _zeros(model, inputs) if with_stages else {}
        loss, (own, head, inner) = program(model.parameters, probes, *arguments)
        own, head, inner = jax.tree.map(to_host, (named(own), head, inner))
    found = {stages.GRADIENT + name: value for name, value in own.items()}
    if head is not None:
        parts = found[stages.GRADIENT + EMBEDDING], head
        found |= {
            stages.GRADIENT + EMBEDDING + suffix: part
            for suffix, part in zip((AS_EMBEDDING, AS_HEAD), parts, strict=True)
        }
        found[stages.GRADIENT + EMBEDDING] = parts[0] + parts[1]
    return float(loss), found | {stages.GRADIENT + key: value for key, value in inner.items()}


def _zeros(model: LanguageModel, inputs: Inputs) -> dict[str, Array]:
    """Returns what is added to each stage's value: the gradient with respect to it is the stage's."""
    batch, length = inputs.input_ids.shape
    wide = jnp.promote_types(model.dtype, jnp.float32)
    return {
        str(key): jnp.zeros(
            (batch, *stages.shape(model.config, key.stage, length)),
            wide if key.stage == "qkv_matmul" else jnp.dtype(model.dtype),
        )
        for key in stages.trace_keys(model.config.num_layers)
    }


@functools.cache
def _program(config: Qwen2Config, dtype: str, fused: bool, ops: Ops, layer_ops: LayerOps) -> Any:
    graph = model_graph(config, dtype, fused)

    def loss(
        parameters: Parameters,
        head: Array | None,
        probes: Mapping[str, Array],
        ids: Array,
        positions: Array,
        cos: Array,
        sin: Array,
        wanted: Array,
    ) -> Array:
        logits = _logits(nnx.merge(graph, parameters), head, probes, (ids, positions, cos, sin), ops, dict(layer_ops))
        logits = at_least_float32(logits[:, :-1])
        picked = jnp.take_along_axis(logits, ids[:, 1:, None], axis=-1)[..., 0]
        losses = jax.nn.logsumexp(logits, axis=-1) - picked
        return jnp.sum(jnp.where(wanted, losses, 0)) / jnp.sum(wanted)

    def program(parameters: Parameters, probes: Mapping[str, Array], *arguments: Array) -> Any:
        # A tied embedding is given twice, so that its two parts are told apart.
        head = parameters["model"]["embed_tokens"]["weight"] if config.tie_word_embeddings else None
        return jax.value_and_grad(loss, argnums=(0, 1, 2))(parameters, head, probes, *arguments)

    return jax.jit(program, compiler_options=COMPILER_OPTIONS)


def _logits(
    model: Qwen2ForCausalLM,
    head: Array | None,
    probes: Mapping[str, Array],
    batch: tuple[Array, Array, Array, Array],
    ops: Ops,
    layer_ops: Mapping[int, Ops],
) -> Array:
    """The forward pass with something added to each stage, and with the head's weight given apart."""

    def probed(key: str, value: Array) -> Array:
        return value + probes[key].reshape(value.shape) if key in probes else value

    ids, positions, cos, sin = batch
    step, _ = make_step(positions, cos, sin)
    x = probed(stages.EMBEDDING, model.embed(ids, ops))
    for layer, module in enumerate(model.model.layers):

        def tap(stage: str, value: Array, layer: int = layer) -> Array:
            return probed(stages.Key.of(layer, stage), value)

        x, _ = module(x, step, ops=layer_ops.get(layer, ops), tap=tap)
    x = probed(stages.FINAL_NORM, model.norm(x, ops))
    apart = ops if head is None else dataclasses.replace(ops, head=lambda _, states, __: ops.head(ops, states, head))
    return probed(stages.LOGITS, model.project(x, apart))
