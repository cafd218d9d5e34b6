"""The stages of a Qwen2 forward pass: their names, order and shapes, shared by traces, golden files and dumps.

Keys of a trace: `stage.embedding`, `stage.{layer}.{name}`, `stage.final_norm` and `logits`; `hidden.{layer}` is the
input of a layer and `hidden.final_norm` the input of the head. The layer number is the position in execution.
"""

from __future__ import annotations

from collections.abc import Iterator

from apr_jax.converters.checkpoint.qwen2 import Qwen2Config

LAYER_STAGES = (
    "attn_norm",
    "qkv_matmul",
    "qkv_bias",
    "q_post_rope",
    "k_post_rope",
    "attn_scores",
    "attn_softmax",
    "attention",
    "attn_out",
    "post_attn_residual",
    "ffn_norm",
    "ffn_gate",
    "ffn_up",
    "ffn_silu",
    "ffn_swigl",
    "ffn_out",
    "post_ffn_residual",
)
EMBEDDING = "stage.embedding"
FINAL_NORM = "stage.final_norm"
LOGITS = "logits"


def layer_key(layer: int, stage: str) -> str:
    """Returns the key of a layer's stage in a trace."""
    return f"stage.{layer}.{stage}"


def hidden_key(layer: int) -> str:
    """Returns the key of a layer's input."""
    return f"hidden.{layer}"


HIDDEN_FINAL_NORM = "hidden.final_norm"


def trace_keys(num_layers: int) -> Iterator[str]:
    """Yields the key of every stage, in order of execution, logits last."""
    yield EMBEDDING
    for layer in range(num_layers):
        for stage in LAYER_STAGES:
            yield layer_key(layer, stage)
    yield FINAL_NORM
    yield LOGITS


def hidden_sources(num_layers: int) -> dict[str, str]:
    """Returns the key of each hidden state -> the key of the stage that is the same value."""
    sources = {hidden_key(0): EMBEDDING}
    for layer in range(1, num_layers):
        sources[hidden_key(layer)] = layer_key(layer - 1, "post_ffn_residual")
    sources[HIDDEN_FINAL_NORM] = FINAL_NORM
    return sources


def stage_of(key: str) -> str:
    """Returns the bare stage name of a trace key: `stage.3.q_post_rope` -> `q_post_rope`."""
    return key.rsplit(".", 1)[-1]


def shape(config: Qwen2Config, stage: str, length: int) -> tuple[int, ...]:
    """Returns the shape of a stage for one sequence of `length` positions, without a batch axis."""
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    if stage in ("attn_scores", "attn_softmax"):
        return (config.num_heads, length, length)
    widths = {
        "qkv_matmul": q + 2 * kv,
        "qkv_bias": q + 2 * kv,
        "q_post_rope": q,
        "k_post_rope": kv,
        "attention": q,
        "ffn_gate": config.intermediate_size,
        "ffn_up": config.intermediate_size,
        "ffn_silu": config.intermediate_size,
        "ffn_swigl": config.intermediate_size,
        LOGITS: config.vocab_size,
    }
    return (length, widths.get(stage, config.hidden_size))
