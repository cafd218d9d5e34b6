"""The gradients of a Qwen2 backward pass: their keys, order and kinds, and which of them each one is computed from.

A key is that of golden files: "grad." before a stage's key or a parameter's name; a tied embedding's gradient has two
parts (`model.gradients`). A kind is what formulas and faults go by: "grad." and the stage, but "grad.input" for the
gradient of a layer's input, which is computed by that layer, "grad.output" for that of the last layer's output, and
"grad.weight", "grad.bias", "grad.norm_weight", "grad.head" and "grad.embedding" for those of parameters.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

from apr_jax.converters.checkpoint.qwen2 import EMBEDDING, FINAL_NORM, HEAD, Qwen2Config
from apr_jax.model.gradients import AS_EMBEDDING, AS_HEAD
from apr_jax.parity.replay import NORMS, PRODUCTS, QKV
from apr_jax.trace import stages
from apr_jax.trace.stages import GRADIENT, Key

INPUT, OUTPUT = GRADIENT + "input", GRADIENT + "output"
WEIGHT, BIAS, NORM_WEIGHT = GRADIENT + "weight", GRADIENT + "bias", GRADIENT + "norm_weight"
HEAD_WEIGHT, EMBEDDING_WEIGHT, TIED_WEIGHT = GRADIENT + "head", GRADIENT + "embedding", GRADIENT + "tied"
LOW_RANK = GRADIENT + "low_rank"
LORA_A, LORA_B = ".lora_A", ".lora_B"
"""Behind the name of a weight: the matrices of a low-rank adapter."""
PARAMETERS = (LOW_RANK, WEIGHT, BIAS, NORM_WEIGHT, HEAD_WEIGHT, EMBEDDING_WEIGHT, TIED_WEIGHT)
"""The kinds of parameters' gradients."""


def of_stage(layer: int | None, stage: str) -> Key:
    """Returns the key of the gradient of a stage."""
    return Key(GRADIENT + Key.of(layer, stage))


def of_tensor(layer: int | None, name: str) -> Key:
    """Returns the key of the gradient of a tensor, by its name below the layer, or by its whole name for none."""
    return Key(GRADIENT + (name if layer is None else f"model.layers.{layer}.{name}"))


def of_input(config: Qwen2Config, layer: int | None) -> Key:
    """Returns the key of the gradient of a layer's input, or (None) of what the final norm is taken of."""
    place = config.num_layers if layer is None else layer
    return of_stage(place - 1, "post_ffn_residual") if place else of_stage(None, "embedding")


@functools.lru_cache(maxsize=1 << 16)
def tensor_of(key: Key) -> tuple[int | None, str]:
    """Returns the layer of a parameter's gradient, and the parameter's name below it."""
    name = key.removeprefix(GRADIENT)
    parts = name.split(".")
    if parts[:2] == ["model", "layers"]:
        return int(parts[2]), ".".join(parts[3:])
    return None, name


def layer_of(key: Key, config: Qwen2Config) -> int | None:
    """Returns the layer whose backward pass computes a gradient; None for head, final norm and embedding."""
    if key.of_parameter:
        return tensor_of(key)[0]
    if key.stage == "embedding":
        return 0
    if key.stage == "post_ffn_residual":
        assert key.layer is not None
        return key.layer + 1 if key.layer + 1 < config.num_layers else None
    return key.layer


def kind_of(key: Key, config: Qwen2Config) -> str:
    """Returns what kind of gradient it is."""
    if not key.of_parameter:
        if key.stage in ("embedding", "post_ffn_residual"):
            return OUTPUT if layer_of(key, config) is None else INPUT
        return GRADIENT + key.stage
    name = tensor_of(key)[1]
    if name.endswith((LORA_A, LORA_B)):
        return LOW_RANK
    if name == EMBEDDING and config.tie_word_embeddings:
        return TIED_WEIGHT
    if name.startswith(EMBEDDING):
        return HEAD_WEIGHT if name.endswith(AS_HEAD) else EMBEDDING_WEIGHT
    if name == HEAD:
        return HEAD_WEIGHT
    return NORM_WEIGHT if name in NORMS.values() else BIAS if name.endswith(".bias") else WEIGHT


def label_of(key: Key, config: Qwen2Config) -> str:
    """Returns what a finding says that it was seen at: the kind, or the name of a parameter."""
    return GRADIENT + tensor_of(key)[1] if key.of_parameter else kind_of(key, config)


@functools.lru_cache(maxsize=64)
def order(config: Qwen2Config) -> tuple[Key, ...]:
    """Returns all gradients in the order in which a backward pass makes them."""
    return tuple(_order(config))


def _order(config: Qwen2Config) -> Iterator[Key]:
    tied = config.tie_word_embeddings
    yield of_stage(None, stages.LOGITS)
    yield of_tensor(None, EMBEDDING + AS_HEAD if tied else HEAD)
    yield of_stage(None, "final_norm")
    yield of_tensor(None, FINAL_NORM)
    yield of_input(config, None)
    for layer in reversed(range(config.num_layers)):
        yield of_stage(layer, "ffn_out")
        yield from _weights(layer, "mlp.down_proj.weight")
        yield from (of_stage(layer, name) for name in ("ffn_swigl", "ffn_silu", "ffn_up", "ffn_gate"))
        yield from _weights(layer, *(f"mlp.{name}_proj.weight" for name in ("gate", "up")))
        yield from (of_stage(layer, "ffn_norm"), of_tensor(layer, NORMS["ffn_norm"]))
        yield from (of_stage(layer, name) for name in ("post_attn_residual", "attn_out"))
        yield from _weights(layer, PRODUCTS["attn_out"][1])
        for name in ("attention", "attn_softmax", "attn_scores", "q_post_rope", "k_post_rope", "qkv_bias"):
            yield of_stage(layer, name)
        yield from (of_tensor(layer, f"self_attn.{name}.bias") for name in QKV)
        yield of_stage(layer, "qkv_matmul")
        yield from _weights(layer, *(f"self_attn.{name}.weight" for name in QKV))
        yield from (of_stage(layer, "attn_norm"), of_tensor(layer, NORMS["attn_norm"]), of_input(config, layer))
    if tied:
        yield of_tensor(None, EMBEDDING + AS_EMBEDDING)
    yield of_tensor(None, EMBEDDING)


def _weights(layer: int, *names: str) -> Iterator[Key]:
    """Weights, and what an adapter adds to them."""
    for name in names:
        yield from (of_tensor(layer, name + suffix) for suffix in ("", LORA_A, LORA_B))


_BEHIND = {
    "final_norm": ("logits",),
    "ffn_out": ("post_ffn_residual",),
    "ffn_swigl": ("ffn_out",),
    "ffn_silu": ("ffn_swigl",),
    "ffn_up": ("ffn_swigl", "ffn_silu"),
    "ffn_gate": ("ffn_swigl", "ffn_silu"),
    "ffn_norm": ("ffn_gate", "ffn_up"),
    "post_attn_residual": ("post_ffn_residual", "ffn_norm"),
    "attn_out": ("post_attn_residual",),
    "attention": ("attn_out",),
    "attn_softmax": ("attention",),
    "attn_scores": ("attn_softmax",),
    "q_post_rope": ("attn_scores",),
    "k_post_rope": ("attn_scores",),
    "qkv_bias": ("q_post_rope", "k_post_rope", "attention"),
    "qkv_matmul": ("qkv_bias",),
    "attn_norm": ("qkv_matmul",),
    "input": ("post_attn_residual", "attn_norm"),
}
"""Which gradients of its layer a stage's gradient is computed from."""


@functools.lru_cache(maxsize=1 << 16)
def sources(key: Key, config: Qwen2Config) -> tuple[Key, ...]:
    """Returns the gradients that a gradient is computed from."""
    layer, kind = layer_of(key, config), kind_of(key, config).removeprefix(GRADIENT)
    if key.of_parameter:
        return tuple(_sources_of_parameter(key, config))
    if kind == "logits":
        return ()
    if kind == "output":
        return (of_stage(None, "final_norm"),)
    return tuple(of_stage(None if name == "logits" else layer, name) for name in _BEHIND[kind])


_OF_PART = {"q_proj": ("q_post_rope",), "k_proj": ("k_post_rope",), "v_proj": ("attention",)}


def sources_for(key: Key, reader: Key, config: Qwen2Config) -> tuple[Key, ...]:
    """Returns what a gradient is computed from, as far as another needs it: of q, k and v, the weight of q needs q."""
    found = sources(key, config)
    part = part_of(reader)
    if part is None or kind_of(key, config) != GRADIENT + "qkv_bias" or key.layer != tensor_of(reader)[0]:
        return found
    return tuple(source for source in found if source.stage in _OF_PART[part])


def weight_of(key: Key) -> Key:
    """Returns the gradient of the weight that a low-rank adapter's matrix belongs to."""
    return Key(key.removesuffix(LORA_A).removesuffix(LORA_B))


def part_of(key: Key) -> str | None:
    """Returns which of QKV a parameter belongs to; None if to none."""
    parts = tensor_of(key)[1].split(".") if key.of_parameter else []
    return parts[1] if len(parts) > 1 and parts[1] in QKV else None


def shown_by(key: Key, gap: Sequence[Key]) -> list[Key]:
    """Returns which gradients before it a right one shows to be right: of q, k and v together no part of them does."""
    shared = () if part_of(key) is None else (of_stage(tensor_of(key)[0], s) for s in ("qkv_bias", "qkv_matmul"))
    hidden = {key, *shared}
    return [node for node in gap if node not in hidden]


def _sources_of_parameter(key: Key, config: Qwen2Config) -> Iterator[Key]:
    layer, name = tensor_of(key)
    kind = kind_of(key, config)
    if kind == LOW_RANK:
        yield from _sources_of_parameter(weight_of(key), config)
    if kind in (HEAD_WEIGHT, TIED_WEIGHT):
        yield of_stage(None, stages.LOGITS)
    if kind in (EMBEDDING_WEIGHT, TIED_WEIGHT):
        yield of_stage(None, "embedding")
    elif kind == NORM_WEIGHT:
        yield of_stage(layer, next(stage for stage, weight in NORMS.items() if weight == name))
    elif kind == BIAS:
        yield of_stage(layer, "qkv_bias")
    elif kind == WEIGHT:
        yield of_stage(layer, next((stage for stage, (_, weight) in PRODUCTS.items() if weight == name), "qkv_matmul"))
