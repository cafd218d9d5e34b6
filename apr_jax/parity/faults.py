"""What each mistake does: the stage formulas of a forward pass that makes them, alone or together.

A set of mistakes is a hypothesis; `under` gives the replay in which it is true. Every stage that one of them touches
gets a formula that makes all of them, so that they stack as they would in an engine, over stages that were not dumped
too.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from apr_jax.converters.formats import casts, dtypes
from apr_jax.parity import rope_fit
from apr_jax.parity.replay import (
    FORMULAS,
    QKV,
    Replay,
    Value,
    head_input,
    head_name,
    join_heads,
    key_of,
    product,
    silu,
    split,
    split_heads,
    unjoin,
)


@dataclasses.dataclass(frozen=True)
class Mistake:
    """A named mistake with its parameters.

    Attributes:
      name: Its name in the fault table.
      parameters: Sorted (name, value) pairs.
    """

    name: str
    parameters: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, name: str, **parameters: Any) -> Mistake:
        """Builds one from keyword parameters."""
        return cls(name, tuple(sorted(parameters.items())))


NORMS = {
    "attn_norm": "input_layernorm.weight",
    "ffn_norm": "post_attention_layernorm.weight",
    "final_norm": "model.norm.weight",
}
"""The weight of each norm, by stage."""
PRODUCTS = {
    "attn_out": ("attention", "self_attn.o_proj.weight"),
    "ffn_gate": ("ffn_norm", "mlp.gate_proj.weight"),
    "ffn_up": ("ffn_norm", "mlp.up_proj.weight"),
    "ffn_out": ("ffn_swigl", "mlp.down_proj.weight"),
}
"""Input and weight of each product, by stage."""

_ROPE = ("q_post_rope", "k_post_rope")
_ATTENTION = ("attn_scores", "attn_softmax", "attention")
_TOUCHES: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("rope-adjacent-pairs", "rope-half-dims", "rope-sign", "rope-theta", "rope-position"),
        _ROPE,
    ),
    "rope-not-on-q": ("q_post_rope",),
    "rope-not-on-k": ("k_post_rope",),
    **dict.fromkeys(
        ("rms-norm-eps", "norm-weight-missing", "norm-weight-plus-one", "norm-mean-subtracted"), tuple(NORMS)
    ),
    "final-norm-missing": ("final_norm",),
    **dict.fromkeys(("qkv-bias-missing", "q-bias-missing", "k-bias-missing", "v-bias-missing"), ("qkv_bias",)),
    "bias-after-rope": ("qkv_bias", *_ROPE),
    **dict.fromkeys(
        ("mask-not-causal", "mask-off-by-one", "mask-window", "padding-attended"), ("attn_scores", "attn_softmax")
    ),
    "softmax-scale": ("attn_scores",),
    "softmax-partial-warp": ("attn_softmax",),
    "kv-heads-interleaved": ("attn_scores", "attention"),
    "v-heads-swapped": ("attention",),
    "cache-position": ("attn_scores", "attention"),
    "o-proj-transposed": ("attn_out",),
    "down-proj-transposed": ("ffn_out",),
    "attention-residual-missing": ("post_attn_residual",),
    "mlp-residual-missing": ("post_ffn_residual",),
    "gate-up-swapped": ("ffn_gate", "ffn_up"),
    "activation-on-up": ("ffn_silu", "ffn_swigl"),
    **dict.fromkeys(("activation-gelu", "activation-gelu-tanh", "activation-relu"), ("ffn_silu",)),
    "embedding-row-off-by-one": ("embedding",),
    **dict.fromkeys(("head-transposed", "head-missing", "logits-shifted"), ("logits",)),
    **dict.fromkeys(
        ("tf32-dots", "activations-quantised", "bf16-accumulation"),
        ("qkv_matmul", "attn_scores", "attention", *PRODUCTS, "logits"),
    ),
}


def touches(mistake: Mistake, replay: Replay) -> tuple[str, ...]:
    """Returns the stages that a mistake is made at."""
    if mistake.name in _TOUCHES:
        return _TOUCHES[mistake.name]
    tensor = dict(mistake.parameters)["tensor"]
    if tensor == "model.embed_tokens.weight":
        return ("embedding", "logits") if tensor == head_name(replay.config) else ("embedding",)
    if tensor == "lm_head.weight":
        return ("logits",)
    if tensor.startswith("self_attn.") and not tensor.startswith("self_attn.o_proj"):
        return ("qkv_bias",) if tensor.endswith("bias") else ("qkv_matmul",)
    return tuple(
        stage for stage, name in {**NORMS, **{s: w for s, (_, w) in PRODUCTS.items()}}.items() if name == tensor
    )


def under(replay: Replay, mistakes: Iterable[Mistake]) -> Replay:
    """Returns the replay in which these mistakes are made."""
    made = Made(tuple(mistakes))
    names = {stage for mistake in made.mistakes for stage in touches(mistake, replay)}
    return dataclasses.replace(replay, formulas={stage: partial(_FORMULAS[stage], made) for stage in names})


@dataclasses.dataclass(frozen=True)
class Made:
    """The mistakes that are made.

    Attributes:
      mistakes: All of them.
    """

    mistakes: tuple[Mistake, ...]

    def has(self, name: str) -> bool:
        """Whether one of this name is made."""
        return any(mistake.name == name for mistake in self.mistakes)

    def get(self, name: str, parameter: str, default: Any = None) -> Any:
        """Returns a parameter of the mistake of this name; the default where it is not made or lacks it."""
        values = [dict(m.parameters).get(parameter) for m in self.mistakes if m.name == name]
        return next((value for value in values if value is not None), default)

    def weight(self, replay: Replay, layer: int, tensor: str) -> Value:
        """Returns a tensor as an engine with these mistakes holds it."""
        if self.has("gate-up-swapped"):
            pair = ("mlp.gate_proj.weight", "mlp.up_proj.weight")
            tensor = pair[1 - pair.index(tensor)] if tensor in pair else tensor
        value = None
        for mistake in self.mistakes:
            parameters = dict(mistake.parameters)
            if not mistake.name.startswith("weights-") or parameters["tensor"] != tensor:
                continue
            if mistake.name == "weights-from-another-layer":
                value = replay.weight(parameters["layer"], tensor)
            else:
                how = parameters.get("codec") or parameters["direction"]
                value = replay.remember(
                    (layer, tensor, how), partial(_OTHERWISE[mistake.name], tensor, replay.weight(layer, tensor), how)
                )
        return replay.weight(layer, tensor) if value is None else value

    def matrix(self, replay: Replay, layer: int, tensor: str, transposed: str) -> Value:
        """Returns a weight [out, in] that may be used transposed: the mistake's name says whether."""
        value = self.weight(replay, layer, tensor)
        if not self.has(transposed):
            return value
        from_file = self.get(transposed, "buffer") == "file"
        return value.reshape(value.shape[::-1]).T if from_file else value.T.reshape(value.shape)

    @property
    def dot(self) -> Callable[[Value, Value], Value]:
        """x [..., in] times weight [out, in], as precisely as these mistakes leave it."""
        for mistake, dot in (*DOTS, *_OTHER_WAYS.values()):
            if mistake in self.mistakes:
                return dot
        return product


# --- Weights ---------------------------------------------------------------------------------------------------------

_CODECS = {"int8": "apr_q8", "int4": "apr_q4", "q4_k": "q4_k"}
_LABELS = {"bf16-as-f16": (ml_dtypes.bfloat16, np.float16), "f16-as-bf16": (np.float16, ml_dtypes.bfloat16)}


def _misread(tensor: str, weight: Value, direction: str) -> Value:
    """Bytes of one 16-bit type read as another."""
    del tensor
    stored, read = _LABELS[direction]
    with np.errstate(over="ignore", invalid="ignore"):
        return np.ascontiguousarray(weight.astype(stored)).view(read).astype(np.float64)


def _quantised(tensor: str, weight: Value, codec: str) -> Value:
    """The values that a weight has after `apr import --quantize`."""
    del tensor
    if codec == "fp16":
        with np.errstate(over="ignore"):
            return weight.astype(np.float16).astype(np.float64)
    dtype = dtypes.by_name(_CODECS[codec])
    payload = casts.quantise(weight.astype(np.float32), _CODECS[codec], weight.shape)
    columns = dtype.padded_columns(weight.shape, len(payload))
    width = weight.shape[-1] if columns is None else columns + -columns % dtype.block_elements
    out = np.empty(weight.size // weight.shape[-1] * width, np.float32)
    dtype.codec.decode(payload, out)
    return out.reshape(-1, width)[:, : weight.shape[-1]].reshape(weight.shape).astype(np.float64)


_OTHERWISE = {"weights-relabelled": _misread, "weights-quantised": _quantised}


# --- Dot products ----------------------------------------------------------------------------------------------------


def _tf32(x: Value, how: str) -> Value:
    """Keeps 10 bits of the mantissa: nearest with ties to "even" or "away" from zero, or "truncate".

    The head's weights are large, so that bits are changed in place.
    """
    bits = x.astype(np.float32).view(np.uint32)
    if how == "away":
        bits += np.uint32(0x1000)
    elif how == "even":
        odd = bits >> np.uint32(13)
        odd &= np.uint32(1)
        bits += np.uint32(0x0FFF)
        bits += odd
    bits &= np.uint32(0xFFFFE000)
    return bits.view(np.float32).astype(np.float64)


def _tf32_dot(how: str, x: Value, weight: Value) -> Value:
    return product(_tf32(x, how), _tf32(weight, how))


def _q8_k(x: Value) -> Value:
    """Blocks of 256 in int8 with one scale each (GGML's Q8_K), as engines round what they multiply with Q4_K."""
    columns = x.shape[-1]
    blocks = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -columns % 256)]).reshape(*x.shape[:-1], -1, 256)
    scale = np.abs(blocks).max(axis=-1, keepdims=True) / 127
    rounded = np.rint(blocks / np.where(scale > 0, scale, 1)) * scale
    return rounded.reshape(*x.shape[:-1], -1)[..., :columns]


def _in_bf16(chunk: int) -> Callable[[Value, Value], Value]:
    """x W^T whose running sum is rounded to bf16 after every `chunk` terms."""

    def dot(x: Value, weight: Value) -> Value:
        total = np.zeros((*x.shape[:-1], weight.shape[0]), np.float32)
        for start in range(0, x.shape[-1], chunk):
            part = x[..., start : start + chunk] @ weight[:, start : start + chunk].T
            total = (total + part.astype(np.float32)).astype(ml_dtypes.bfloat16).astype(np.float32)
        return total.astype(np.float64)

    return dot


DOTS: list[tuple[Mistake, Callable[[Value, Value], Value]]] = [
    (Mistake.of("tf32-dots", mode="round"), partial(_tf32_dot, "even")),
    (Mistake.of("tf32-dots", mode="truncate"), partial(_tf32_dot, "truncate")),
    (Mistake.of("activations-quantised", codec="q8_k"), lambda x, w: product(_q8_k(x), w)),
    *((Mistake.of("bf16-accumulation", chunk=1 << power), _in_bf16(1 << power)) for power in range(9, 2, -1)),
]
"""Less precise dot products, the more precise ones first."""
_OTHER_WAYS: dict[Mistake, tuple[Mistake, Callable[[Value, Value], Value]]] = {
    Mistake.of("tf32-dots", mode="round"): (
        Mistake.of("tf32-dots", mode="round", ties="away"),
        partial(_tf32_dot, "away"),
    )
}
"""What has one name and is made in two ways: ties go to even (cuBLAS, XLA) or away from zero (PTX's cvt.rna.tf32)."""


def ways(mistakes: Iterable[Mistake]) -> Iterator[tuple[Mistake, ...]]:
    """Returns the mistakes in each of the ways in which engines make them; the commonest first."""
    return itertools.product(*((m, _OTHER_WAYS[m][0]) if m in _OTHER_WAYS else (m,) for m in mistakes))


def drift(mistakes: Iterable[Mistake], replay: Replay, key: str) -> float:
    """Returns what a stage may be off, relative to it, because of how TF32 products are added up.

    Tensor cores cut the running sum off after every 8 products instead of rounding it, so that the errors do not
    cancel: 2^-23 of it at most for each step (Fasi, Higham, Mikaitis, Pranesh: Numerical behavior of NVIDIA tensor
    cores, PeerJ Computer Science 7:e330, 2021). One H200 left 2.1e-6 at 896 columns and 5.9e-6 at 4864, where this
    allows 1.3e-5 and 7.2e-5.

    Args:
      mistakes: What is supposed to be wrong.
      replay: The replay.
      key: The stage; products before it that were not dumped count too.
    """
    if not any(mistake.name == "tf32-dots" for mistake in mistakes):
        return 0.0
    config, length = replay.config, replay.inputs.input_ids.shape[1]
    columns = {
        **dict.fromkeys(("qkv_matmul", "ffn_gate", "ffn_up", "logits"), config.hidden_size),
        "attn_scores": config.head_dim,
        "attention": length,
        "attn_out": config.num_heads * config.head_dim,
        "ffn_out": config.intermediate_size,
    }
    return sum(columns.get(stage, 0) for _, stage in replay.undumped(split(key))) / 8 * 2.0**-23


# --- Stages ----------------------------------------------------------------------------------------------------------


def _embedding(made: Made, replay: Replay, layer: int) -> Value:
    table = made.weight(replay, -1, "model.embed_tokens.weight")
    step = 1 if made.has("embedding-row-off-by-one") else 0
    return table[(replay.inputs.input_ids[:, replay.columns()] + step) % len(table)]


def _norm(stage: str, made: Made, replay: Replay, layer: int) -> Value:
    x = norm_input(replay, layer, stage)
    if stage == "final_norm" and made.has("final-norm-missing"):
        return x
    if made.has("norm-mean-subtracted"):
        x = x - x.mean(axis=-1, keepdims=True)
    named = made.get("rms-norm-eps", "norms", (norm_name(stage),))
    eps = made.get("rms-norm-eps", "eps") if norm_name(stage) in named else None
    eps = replay.config.rms_norm_eps if eps is None else eps
    weight = made.weight(replay, layer, NORMS[stage])
    if made.has("norm-weight-missing"):
        weight = np.ones_like(weight)
    if made.has("norm-weight-plus-one"):
        weight = 1 + weight
    return weight * (x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps))


def norm_input(replay: Replay, layer: int, stage: str) -> Value:
    """Returns what a norm is taken of."""
    if stage == "ffn_norm":
        return replay.get(layer, "post_attn_residual")
    return replay.residual(replay.config.num_layers if stage == "final_norm" else layer)


def norm_name(stage: str) -> str:
    """The norm's name, as `rms-norm-eps` lists it."""
    return NORMS[stage].removesuffix(".weight").removeprefix("model.")


def _qkv_matmul(made: Made, replay: Replay, layer: int) -> Value:
    x, dot = replay.get(layer, "attn_norm"), made.dot
    return np.concatenate([dot(x, made.weight(replay, layer, f"self_attn.{name}.weight")) for name in QKV], -1)


def _qkv_bias(made: Made, replay: Replay, layer: int) -> Value:
    biases = [added_bias(made, replay, layer, name) for name in QKV]
    if made.has("bias-after-rope"):
        biases[:2] = [np.zeros_like(bias) for bias in biases[:2]]
    return replay.get(layer, "qkv_matmul") + np.concatenate(biases)


def added_bias(made: Made, replay: Replay, layer: int, name: str) -> Value:
    """Returns the bias of q_proj, k_proj or v_proj: zeros where it is missing."""
    bias = made.weight(replay, layer, f"self_attn.{name}.bias")
    missing = made.has("qkv-bias-missing") or made.has(f"{name[0]}-bias-missing")
    return np.zeros_like(bias) if missing else bias


def _rope(which: int, made: Made, replay: Replay, layer: int) -> Value:
    x = replay.heads(layer)[which]
    late: Value | float = 0.0
    if made.has("bias-after-rope"):
        late = added_bias(made, replay, layer, QKV[which]).reshape(-1, replay.config.head_dim)
        if bias_was_added(replay, layer, which):
            x = x - late
    turn = rotation_of(made, QKV[which][0])
    return join_heads(turn.apply(x, replay.positions(), replay.config.rope_theta) + late)


def bias_was_added(replay: Replay, layer: int, which: int) -> bool:
    """Whether dumped inputs of the rotation hold the bias, though the rotated values may have got it later."""
    if not replay.dumped((layer, "qkv_bias")):
        return False
    shown, plain = (split_heads(replay.get(layer, stage), replay.config)[which] for stage in ("qkv_bias", "qkv_matmul"))
    bias = replay.weight(layer, f"self_attn.{QKV[which]}.bias").reshape(-1, replay.config.head_dim)
    return bool(np.linalg.norm(shown - plain - bias) < np.linalg.norm(shown - plain))


def rotation_of(made: Made, projection: str) -> rope_fit.Rotation:
    """Returns the rotation that these mistakes make of the right one, for "q" or "k"."""
    return rope_fit.Rotation(
        theta=made.get("rope-theta", "theta"),
        adjacent=made.has("rope-adjacent-pairs"),
        half=made.has("rope-half-dims"),
        negated=made.has("rope-sign"),
        shift=made.get("rope-position", "shift", 0),
        restart=made.get("rope-position", "restart", 0),
        none=made.has(f"rope-not-on-{projection}"),
    )


def name_rotation(turn: rope_fit.Rotation, projection: str) -> list[Mistake]:
    """Returns the mistakes that a rotation consists of."""
    if turn.none:
        return [Mistake.of(f"rope-not-on-{projection}")]
    named = []
    if turn.adjacent:
        named.append(Mistake.of("rope-adjacent-pairs"))
    if turn.half:
        named.append(Mistake.of("rope-half-dims"))
    if turn.negated:
        named.append(Mistake.of("rope-sign"))
    if turn.theta is not None:
        named.append(Mistake.of("rope-theta", theta=turn.theta))
    if turn.shift:
        named.append(Mistake.of("rope-position", shift=turn.shift))
    if turn.restart:
        named.append(Mistake.of("rope-position", restart=turn.restart))
    return named


def kv_heads(made: Made, replay: Replay) -> np.ndarray:
    """Which KV head each query head reads, int [N]."""
    heads, kv = replay.config.num_heads, replay.config.num_kv_heads
    return np.arange(heads) % kv if made.has("kv-heads-interleaved") else np.arange(heads) // (heads // kv)


def _scores(made: Made, replay: Replay, layer: int) -> Value:
    q = unjoin(replay.get(layer, "q_post_rope"), replay.config)
    k = unjoin(replay.whole.get(layer, "k_post_rope"), replay.config)[:, :, kv_heads(made, replay)]
    raw = np.array([[made.dot(q[b, :, h], k[b, :, h]) for h in range(q.shape[2])] for b in range(len(q))])
    raw *= made.get("softmax-scale", "scale", replay.config.head_dim**-0.5)
    if made.has("cache-position"):
        tokens = _tokens_read(made, replay)
        raw = np.where(tokens >= 0, np.take_along_axis(raw, np.maximum(tokens, 0)[None, None], axis=-1), 0.0)
    # An engine that masks scores shows nothing where its own mask hides.
    return np.where(visible(made, replay)[:, None], raw, 0.0)


def _tokens_read(made: Made, replay: Replay) -> np.ndarray:
    """Which token each query finds at each column of a cache that is written or read at position + n, [T, S]."""
    shift, side, first = (made.get("cache-position", name) for name in ("shift", "side", "prefill"))
    length = replay.inputs.input_ids.shape[1]
    tokens = np.tile(np.arange(length), (length, 1))
    slots = np.where(np.arange(length) < first, np.arange(length), -1)
    for token in range(first, length):
        slot = token + shift if side == "write" else token
        if 0 <= slot < length:
            slots[slot] = token
        at = np.arange(length) + (shift if side == "read" else 0)
        tokens[token] = np.where((at >= 0) & (at < length), slots[np.clip(at, 0, length - 1)], -1)
    return tokens[replay.columns()]


def visible(made: Made, replay: Replay) -> Value:
    """The mask that these mistakes leave, bool [B, T, S]: by column, as engines build them."""
    query, key = replay.columns()[:, None], np.arange(replay.inputs.input_ids.shape[1])
    seen = key <= query + made.get("mask-off-by-one", "last", 0)
    if made.has("mask-not-causal"):
        seen = np.ones_like(seen)
    if window := made.get("mask-window", "window"):
        seen = seen & (key > query - window)
    if made.has("padding-attended"):
        return np.broadcast_to(seen, (len(replay.inputs.input_ids), *seen.shape))
    return seen & ((replay.inputs.attention_mask == 1)[:, None, :] | (key == query))


def _softmax(made: Made, replay: Replay, layer: int) -> Value:
    """Softmax over the keys seen; a partial warp takes maximum and sum over the first 32 of every 64."""
    raw, seen = replay.get(layer, "attn_scores"), visible(made, replay)[:, None]
    length = raw.shape[-1]
    summed = seen
    if made.has("softmax-partial-warp"):
        lanes = seen & (np.arange(length) % 64 < 32)
        summed = np.where(lanes.any(axis=-1, keepdims=True), lanes, seen)
    top = np.where(summed, raw, -np.inf).max(axis=-1, keepdims=True)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        powers = np.where(seen, np.exp(raw - top), 0.0)
        shares = powers / np.where(summed, powers, 0.0).sum(axis=-1, keepdims=True)
    empty = made.get("mask-off-by-one", "empty", "uniform")
    instead = {"uniform": np.array(1 / length), "self": np.eye(length)[replay.columns()], "zero": np.array(0.0)}[empty]
    return np.where(seen.any(axis=-1, keepdims=True), shares, instead)


def _attention(made: Made, replay: Replay, layer: int) -> Value:
    shares, v = replay.get(layer, "attn_softmax"), replay.whole.heads(layer)[2]
    v = (v[:, :, ::-1] if made.has("v-heads-swapped") else v)[:, :, kv_heads(made, replay)]
    if made.has("cache-position"):
        shares = _by_token(shares, _tokens_read(made, replay))
    rows = [[made.dot(shares[b, h], v[b, :, h].T) for h in range(v.shape[2])] for b in range(len(v))]
    return join_heads(np.array(rows).transpose(0, 2, 1, 3))


def _by_token(shares: Value, tokens: np.ndarray) -> Value:
    """Turns shares of columns [B, N, T, S] into shares of the tokens [T, S] that are found there."""
    length = shares.shape[-1]
    result = np.zeros((*shares.shape[:3], length + 1))
    for query, found in enumerate(tokens):
        result[:, :, query, found] = shares[:, :, query]  # no token is found at two columns
    return result[..., :length]


def _product(stage: str, made: Made, replay: Replay, layer: int) -> Value:
    source, tensor = PRODUCTS[stage]
    transposed = {"attn_out": "o-proj-transposed", "ffn_out": "down-proj-transposed"}.get(stage, "")
    return made.dot(replay.get(layer, source), made.matrix(replay, layer, tensor, transposed))


def _residual(stage: str, name: str, update: str, made: Made, replay: Replay, layer: int) -> Value:
    return replay.get(layer, update) if made.has(name) else FORMULAS[stage](replay, layer)


def _gelu(x: Value) -> Value:
    return x * 0.5 * (1 + np.vectorize(math.erf, otypes=[np.float64])(x / math.sqrt(2)))


def _gelu_tanh(x: Value) -> Value:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS: Mapping[str, Callable[[Value], Value]] = {
    "activation-gelu": _gelu,
    "activation-gelu-tanh": _gelu_tanh,
    "activation-relu": lambda x: np.maximum(x, 0.0),
}


def _activation(made: Made, replay: Replay, layer: int) -> Value:
    function = next((function for name, function in ACTIVATIONS.items() if made.has(name)), silu)
    return function(replay.get(layer, "ffn_up" if made.has("activation-on-up") else "ffn_gate"))


def _gated(made: Made, replay: Replay, layer: int) -> Value:
    return replay.get(layer, "ffn_silu") * replay.get(layer, "ffn_gate" if made.has("activation-on-up") else "ffn_up")


def _logits(made: Made, replay: Replay, layer: int) -> Value:
    theirs = replay.theirs.get(key_of(-1, "logits"))
    if made.has("head-missing") and theirs is not None:
        return np.zeros_like(replay.look("logits", theirs))
    shift = made.get("logits-shifted", "shift", 0)
    x = head_input(replay.whole if shift else replay)
    value = made.dot(x, made.matrix(replay, -1, head_name(replay.config), "head-transposed"))
    return replay.look("logits", np.roll(value.ravel(), shift).reshape(value.shape)) if shift else value


_FORMULAS: Mapping[str, Callable[[Made, Replay, int], Value]] = {
    "embedding": _embedding,
    **{stage: partial(_norm, stage) for stage in NORMS},
    "qkv_matmul": _qkv_matmul,
    "qkv_bias": _qkv_bias,
    "q_post_rope": partial(_rope, 0),
    "k_post_rope": partial(_rope, 1),
    "attn_scores": _scores,
    "attn_softmax": _softmax,
    "attention": _attention,
    **{stage: partial(_product, stage) for stage in PRODUCTS},
    "post_attn_residual": partial(_residual, "post_attn_residual", "attention-residual-missing", "attn_out"),
    "ffn_silu": _activation,
    "ffn_swigl": _gated,
    "post_ffn_residual": partial(_residual, "post_ffn_residual", "mlp-residual-missing", "ffn_out"),
    "logits": _logits,
}
