"""The stages of a Qwen2 forward pass: their names, order and shapes, and the keys under which traces hold their values.

Golden files, dumps and JSON hold the keys as plain strings; here alone they are put together and taken apart.
"""

from __future__ import annotations

import functools
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
PER_PAIR = ("attn_scores", "attn_softmax")
"""Stages with a value for every pair of a query and a key: [B, N, T, T]. All others have rows: [B, T, ...]."""


GRADIENT = "grad."


class Key(str):
    """Key of one value of a trace. It is its own text, so that it finds what stands under that text in any dict.

        stage.{layer}.{stage}                        a stage of a layer, which counts in order of execution
        stage.embedding, stage.final_norm, logits    a stage outside the layers: layer None
        hidden.{layer}, hidden.final_norm            the input of a layer, or of the head (layer None): stage "hidden"
        grad.{one of these}                          the gradient of the loss with respect to it: same layer and stage
        grad.{parameter}                             the same of a parameter

    `Key(text)` reads a key and `Key.of(layer, stage)` makes one. Any text is taken, and what is none of the above is no
    error: which keys a model has, `trace_keys` says.
    """

    __slots__ = ()

    @classmethod
    def of(cls, layer: int | None, stage: str) -> Key:
        """Returns the key with these two attributes."""
        if stage == "hidden":
            return cls("hidden.final_norm" if layer is None else f"hidden.{layer}")
        if stage == "logits":
            return cls(stage)
        return cls(f"stage.{stage}" if layer is None else f"stage.{layer}.{stage}")

    @property
    def layer(self) -> int | None:
        """The layer, None outside the layers."""
        return _layer_of(self)

    @property
    def stage(self) -> str:
        """The bare name: one of LAYER_STAGES, "embedding", "final_norm", "logits" or "hidden"."""
        return "hidden" if self.is_hidden else self.rpartition(".")[2]

    @property
    def is_hidden(self) -> bool:
        """Whether it names a hidden state: a stage's value once more, see `hidden_sources`."""
        return self.removeprefix(GRADIENT).startswith("hidden.")

    @property
    def is_inner(self) -> bool:
        """Whether it names a stage on the way to the logits, not these and no hidden state."""
        return self.startswith("stage.")

    @property
    def is_gradient(self) -> bool:
        """Whether it names the gradient of a stage or of a parameter."""
        return self.startswith(GRADIENT)

    @property
    def of_parameter(self) -> bool:
        """Whether it names the gradient of a parameter, which has no positions."""
        return self.is_gradient and not self.removeprefix(GRADIENT).startswith(("stage.", "hidden.", "logits"))

    @property
    def per_pair(self) -> bool:
        """Whether the values are [B, N, T, T], one for every query and key."""
        return self.stage in PER_PAIR


@functools.lru_cache(maxsize=4096)
def _layer_of(key: str) -> int | None:
    kind, _, rest = key.removeprefix(GRADIENT).partition(".")
    number = rest.partition(".")[0]
    return int(number) if kind in ("stage", "hidden") and number.isdecimal() else None


EMBEDDING = Key("stage.embedding")
FINAL_NORM = Key("stage.final_norm")
LOGITS = Key("logits")


def trace_keys(num_layers: int) -> Iterator[Key]:
    """Yields the key of every stage, in order of execution, logits last."""
    yield EMBEDDING
    for layer in range(num_layers):
        for stage in LAYER_STAGES:
            yield Key.of(layer, stage)
    yield FINAL_NORM
    yield LOGITS


def hidden_sources(num_layers: int) -> dict[str, str]:
    """Returns the key of each hidden state -> the key of the stage that is the same value."""
    sources: dict[str, str] = {Key.of(0, "hidden"): EMBEDDING}
    for layer in range(1, num_layers):
        sources[Key.of(layer, "hidden")] = Key.of(layer - 1, "post_ffn_residual")
    sources[Key.of(None, "hidden")] = FINAL_NORM
    return sources


def shape(config: Qwen2Config, stage: str, length: int) -> tuple[int, ...]:
    """Returns the shape of a stage for one sequence of `length` positions, without a batch axis."""
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    if stage in PER_PAIR:
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
