"""The stage functions one by one, in float64, on the other side's own values: what hypotheses about mistakes are built
from.

The right formulas are those of `modeling.OPS` in NumPy, for some positions at a time; a test holds them against a
float64 trace. A stage that the other side did not dump is computed from the nearest ones that it did, so that a
hypothesis about it is composed over the gap. A replay may look at some positions only: most hypotheses are wrong, and a
few positions show it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import numpy as np

from apr_jax.converters.checkpoint.qwen2 import Qwen2Config
from apr_jax.model import rotary
from apr_jax.model.parameters import Parameters
from apr_jax.trace import stages
from apr_jax.trace.inputs import Inputs

Value = np.ndarray
Node = tuple[int, str]
"""A stage of a layer; layer -1 is outside the layers."""
Formula = Callable[["Replay", int], Value]
"""Computes a stage of a layer; asks the replay for its inputs."""

_BY_PAIRS = ("attn_scores", "attn_softmax")


@dataclasses.dataclass(frozen=True)
class Replay:
    """Everything that a stage can be computed from.

    Attributes:
      config: The model's configuration.
      parameters: Its parameters in float64, nested as in `LanguageModel`.
      inputs: The batch.
      theirs: The other side's values.
      formulas: Formulas of a hypothesis, by stage name, in place of the right ones.
      target: The stage that is being computed and so not taken from `theirs`.
      rows: The positions that are looked at; None is all of them. Keys and values are always there for all.
      memo: What was computed once and does not depend on `formulas`.
      composed: What does, within one computation.
    """

    config: Qwen2Config
    parameters: Parameters
    inputs: Inputs
    theirs: Mapping[str, np.ndarray]
    formulas: Mapping[str, Formula] = dataclasses.field(default_factory=dict)
    target: Node | None = None
    rows: np.ndarray | None = None
    memo: dict[Hashable, Any] = dataclasses.field(default_factory=dict)
    composed: dict[Hashable, Any] = dataclasses.field(default_factory=dict)

    def compute(self, key: str) -> Value:
        """Computes one stage from the other side's values, under the replay's formulas."""
        layer, stage = node = split(key)
        return self.formula(stage)(dataclasses.replace(self, target=node, composed={}), layer)

    def formula(self, stage: str) -> Formula:
        """Returns the formula of a stage: the hypothesis' or the right one."""
        return self.formulas.get(stage) or FORMULAS[stage]

    def get(self, layer: int, stage: str) -> Value:
        """Returns an input of the stage that is being computed, float64: theirs, or computed where they lack it."""
        if self.dumped((layer, stage)):
            return self.look(stage, self.theirs[key_of(layer, stage)])
        # In order of execution, so that a long gap is no deep recursion.
        for node in self.undumped((layer, stage)):
            value = self._composed(node)
        return value

    def _composed(self, node: Node) -> Value:
        """Computes an undumped stage once: for good, or for this hypothesis where it depends on that."""
        free = self.formulas.keys().isdisjoint(name for _, name in self.undumped(node))
        store: dict[Hashable, Any] = self.memo if free else self.composed
        name = (node, None if self.rows is None else self.rows.tobytes())
        if name not in store:
            store[name] = self.formula(node[1])(self, node[0])
        return store[name]

    def look(self, stage: str, values: np.ndarray) -> Value:
        """Returns the replay's positions of a stage's values, float64."""
        if self.rows is not None:
            values = values[:, :, self.rows] if stage in _BY_PAIRS else values[:, self.rows]
        return np.asarray(values, np.float64)

    def remember(self, what: Hashable, compute: Callable[[], Any]) -> Any:
        """Computes something once; what it depends on besides the other side's values is in its name."""
        if what not in self.memo:
            self.memo[what] = compute()
        return self.memo[what]

    @property
    def whole(self) -> Replay:
        """The replay with all positions."""
        return self if self.rows is None else dataclasses.replace(self, rows=None)

    def dumped(self, node: Node) -> bool:
        """Whether a stage is known from the other side."""
        return node != self.target and key_of(*node) in self.theirs

    def undumped(self, node: Node) -> list[Node]:
        """Returns a stage and what has to be computed before it because it was not dumped, in order of execution."""
        known = ("undumped", node, self.target)
        if known in self.memo:
            return self.memo[known]
        found: dict[Node, None] = {}

        def visit(at: Node) -> None:
            for source in self.sources(at):
                if source not in found and not self.dumped(source):
                    visit(source)
            found[at] = None

        visit(node)
        self.memo[known] = list(found)
        return self.memo[known]

    def sources(self, node: Node) -> Iterator[Node]:
        """Yields the stages that a stage is computed from."""
        layer, stage = node
        for name in _SOURCES[stage]:
            if name == "final_norm":
                yield -1, name
            elif name != "residual":
                yield layer, name
            elif (place := self.config.num_layers if stage == "final_norm" else layer) > 0:
                yield place - 1, "post_ffn_residual"
            else:
                yield -1, "embedding"

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

    def positions(self) -> np.ndarray:
        """Positions in the sequence, int [B, T], -1 at padding."""
        positions = self.inputs.positions()
        return positions if self.rows is None else positions[:, self.rows]

    def tokens(self) -> np.ndarray:
        """Which positions are no padding, bool [B, T]."""
        tokens = self.inputs.attention_mask == 1
        return tokens if self.rows is None else tokens[:, self.rows]

    def columns(self) -> np.ndarray:
        """The columns of the batch that are looked at, int [T]."""
        return np.arange(self.inputs.input_ids.shape[1]) if self.rows is None else self.rows

    def rotary(self) -> tuple[Value, Value]:
        """Returns cos and sin at the replay's positions, [B, T, H/2]."""
        last = int(self.inputs.positions().max())
        cos, sin = rotary.tables(self.config.rope_theta, self.config.head_dim, last + 1)
        positions = np.maximum(self.positions(), 0)
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


def qkv_weights(replay: Replay, layer: int) -> list[Value]:
    """The three projections, [out, in] each."""
    return [replay.weight(layer, f"self_attn.{name}.weight") for name in QKV]


def qkv_biases(replay: Replay, layer: int) -> list[Value]:
    """The three biases."""
    return [replay.weight(layer, f"self_attn.{name}.bias") for name in QKV]


def head_name(config: Qwen2Config) -> str:
    """The tensor that the head multiplies with: the embedding where it is tied."""
    return "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"


def head_input(replay: Replay) -> Value:
    """What the head multiplies with: the last token of each row [B, 1, D] where only its logits were dumped."""
    x, logits = replay.get(-1, "final_norm"), replay.theirs.get(stages.LOGITS)
    if logits is None or logits.shape[1] != 1:
        return x
    last = np.where(replay.inputs.attention_mask == 1, np.arange(x.shape[1]), -1).max(axis=1)
    return x[np.arange(len(x)), last][:, None]


def _norm(replay: Replay, x: Value, weight: Value) -> Value:
    return weight * (x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + replay.config.rms_norm_eps))


def _rope(replay: Replay, x: Value) -> Value:
    cos, sin = (table[:, :, None, :] for table in replay.rotary())
    low, high = np.split(x, 2, axis=-1)
    return join_heads(np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1))


def _scores(replay: Replay, layer: int) -> Value:
    q, k = replay.get(layer, "q_post_rope"), replay.whole.get(layer, "k_post_rope")
    q, k = (unjoin(x, replay.config).swapaxes(1, 2) for x in (q, k))
    return q @ by_query_head(k, replay.config).swapaxes(2, 3) * replay.config.head_dim**-0.5


def _softmax(replay: Replay, layer: int) -> Value:
    queries, keys = replay.positions()[:, None, :, None], replay.inputs.positions()[:, None, None, :]
    seen = (keys >= 0) & (keys <= queries)
    scores = np.where(seen, replay.get(layer, "attn_scores"), np.finfo(np.float64).min)
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def _attention(replay: Replay, layer: int) -> Value:
    v = by_query_head(replay.whole.heads(layer)[2].swapaxes(1, 2), replay.config)
    return join_heads((replay.get(layer, "attn_softmax") @ v).swapaxes(1, 2))


def by_query_head(x: Value, config: Qwen2Config) -> Value:
    """[B, K, T, H] -> [B, N, T, H]: query head h reads KV head h // G."""
    return np.repeat(x, config.num_heads // config.num_kv_heads, axis=1)


def silu(x: Value) -> Value:
    """x * sigmoid(x)."""
    with np.errstate(over="ignore"):
        return x / (1 + np.exp(-x))


FORMULAS: dict[str, Formula] = {
    "embedding": lambda s, _: s.weight(-1, "model.embed_tokens.weight")[s.inputs.input_ids[:, s.columns()]],
    "attn_norm": lambda s, i: _norm(s, s.residual(i), s.weight(i, "input_layernorm.weight")),
    "qkv_matmul": lambda s, i: product(s.get(i, "attn_norm"), np.concatenate(qkv_weights(s, i))),
    "qkv_bias": lambda s, i: s.get(i, "qkv_matmul") + np.concatenate(qkv_biases(s, i)),
    "q_post_rope": lambda s, i: _rope(s, s.heads(i)[0]),
    "k_post_rope": lambda s, i: _rope(s, s.heads(i)[1]),
    "attn_scores": _scores,
    "attn_softmax": _softmax,
    "attention": _attention,
    "attn_out": lambda s, i: product(s.get(i, "attention"), s.weight(i, "self_attn.o_proj.weight")),
    "post_attn_residual": lambda s, i: s.residual(i) + s.get(i, "attn_out"),
    "ffn_norm": lambda s, i: _norm(s, s.get(i, "post_attn_residual"), s.weight(i, "post_attention_layernorm.weight")),
    "ffn_gate": lambda s, i: product(s.get(i, "ffn_norm"), s.weight(i, "mlp.gate_proj.weight")),
    "ffn_up": lambda s, i: product(s.get(i, "ffn_norm"), s.weight(i, "mlp.up_proj.weight")),
    "ffn_silu": lambda s, i: silu(s.get(i, "ffn_gate")),
    "ffn_swigl": lambda s, i: s.get(i, "ffn_silu") * s.get(i, "ffn_up"),
    "ffn_out": lambda s, i: product(s.get(i, "ffn_swigl"), s.weight(i, "mlp.down_proj.weight")),
    "post_ffn_residual": lambda s, i: s.get(i, "post_attn_residual") + s.get(i, "ffn_out"),
    "final_norm": lambda s, _: _norm(s, s.residual(s.config.num_layers), s.weight(-1, "model.norm.weight")),
    "logits": lambda s, _: product(head_input(s), s.weight(-1, head_name(s.config))),
}

_SOURCES: dict[str, tuple[str, ...]] = {
    "embedding": (),
    "attn_norm": ("residual",),
    "qkv_matmul": ("attn_norm",),
    "qkv_bias": ("qkv_matmul",),
    "q_post_rope": ("qkv_bias",),
    "k_post_rope": ("qkv_bias",),
    "attn_scores": ("q_post_rope", "k_post_rope"),
    "attn_softmax": ("attn_scores",),
    "attention": ("attn_softmax", "qkv_bias"),
    "attn_out": ("attention",),
    "post_attn_residual": ("residual", "attn_out"),
    "ffn_norm": ("post_attn_residual",),
    "ffn_gate": ("ffn_norm",),
    "ffn_up": ("ffn_norm",),
    "ffn_silu": ("ffn_gate",),
    "ffn_swigl": ("ffn_silu", "ffn_up"),
    "ffn_out": ("ffn_swigl",),
    "post_ffn_residual": ("post_attn_residual", "ffn_out"),
    "final_norm": ("residual",),
    "logits": ("final_norm",),
}


def key_of(layer: int, stage: str) -> str:
    """Returns the trace key of a stage."""
    return {"embedding": stages.EMBEDDING, "final_norm": stages.FINAL_NORM, "logits": stages.LOGITS}.get(
        stage
    ) or stages.layer_key(layer, stage)


def split(key: str) -> Node:
    """Returns layer (-1 outside the layers) and stage of a trace key."""
    parts = key.split(".")
    return (int(parts[1]) if len(parts) == 3 else -1), parts[-1]
