"""Mistakes of weights: other values in a tensor's place, a matrix used transposed, a bias left out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from apr_jax.converters.formats import casts, codecs, dtypes
from apr_jax.parity.faults.record import UNION, Fault
from apr_jax.parity.question import Question
from apr_jax.parity.replay import EMBEDDING, NORMS, PRODUCTS, QKV, At, Replay, Value, head_name
from apr_jax.trace import stages
from apr_jax.trace.stages import Key

# --- Other values in a tensor's place --------------------------------------------------------------------------------

_CODECS = {"int8": "apr_q8", "int4": "apr_q4", "q4_k": "q4_k"}
_LABELS = {"bf16-as-f16": (ml_dtypes.bfloat16, np.float16), "f16-as-bf16": (np.float16, ml_dtypes.bfloat16)}


def tensors_of(replay: Replay, stage: str) -> list[str]:
    """Returns the tensors that a stage is computed with, named below their layer or, outside, whole."""
    if stage in ("qkv_matmul", "qkv_bias"):
        return [f"self_attn.{name}.{'weight' if stage == 'qkv_matmul' else 'bias'}" for name in QKV]
    outer = {"embedding": EMBEDDING, "logits": head_name(replay.config)}
    weights = {**{stage: tensor for stage, (_, tensor) in PRODUCTS.items()}, **NORMS, **outer}
    return [weights[stage]] if stage in weights else []


def _stages(replay: Replay, tensor: str | Sequence[str], **_: Any) -> tuple[str, ...]:
    return tuple(stage for stage in _ALL_STAGES if tensor in tensors_of(replay, stage))


_ALL_STAGES = ("embedding", *stages.LAYER_STAGES, "final_norm", "logits")


def _suspects(question: Question, node: Key) -> list[str]:
    """The tensors of a stage; of norms and biases only where the stage itself was dumped: they are small, and a gap
    holds many."""
    small = node.stage in (*NORMS, "qkv_bias") and node != question.nodes[-1]
    return [] if small else [name for name in tensors_of(question.replay, node.stage) if question.only in name]


def _quantisations(question: Question, node: Key) -> Iterator[Mapping[str, Any]]:
    for tensor in _suspects(question, node):
        right = question.replay.weight(node.layer, tensor)
        with np.errstate(over="ignore"):
            half = right.astype(np.float16)
        if np.isfinite(half).all() and (half != right).any():
            yield {"tensor": tensor, "codec": "fp16"}
        if not codecs.stays_float(tensor, right.size):
            yield from ({"tensor": tensor, "codec": codec} for codec in _CODECS)


def _labels(question: Question, node: Key) -> Iterator[Mapping[str, Any]]:
    for tensor in _suspects(question, node):
        yield from ({"tensor": tensor, "direction": direction} for direction in _LABELS)


def _layers(question: Question, node: Key) -> Iterator[Mapping[str, Any]]:
    others = [layer for layer in range(question.replay.config.num_layers) if node.layer not in (None, layer)]
    yield from ({"tensor": tensor, "layer": layer} for tensor in _suspects(question, node) for layer in others)


def _in_place(otherwise: Callable[[Value, str], Value], how: str) -> dict[str, Callable[..., Value]]:
    """The change to one tensor's values that a parameter `how` says."""

    def change(value: Value, at: At, tensor: str, **parameters: Any) -> Value:
        if at.what != tensor:
            return value
        name = (at.layer, tensor, parameters[how])
        return at.replay.remember(name, lambda: otherwise(value, parameters[how]))

    return {"weight": change}


def _misread(weight: Value, direction: str) -> Value:
    """Bytes of one 16-bit type read as another."""
    stored, read = _LABELS[direction]
    with np.errstate(over="ignore", invalid="ignore"):
        return np.ascontiguousarray(weight.astype(stored)).view(read).astype(np.float64)


def _quantised(weight: Value, codec: str) -> Value:
    """The values that a weight has after `apr import --quantize`."""
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


def _of_another_layer(value: Value, at: At, tensor: str, layer: int) -> Value:
    return at.replay.weight(layer, tensor) if at.what == tensor else value


# --- A matrix in the wrong place or the wrong way round --------------------------------------------------------------

_PAIR = ("mlp.gate_proj.weight", "mlp.up_proj.weight")


def _swapped(place: tuple[int, str], at: At) -> tuple[int, str]:
    layer, tensor = place
    return (layer, _PAIR[1 - _PAIR.index(tensor)]) if tensor in _PAIR else place


def _transposed(name: str, stage: str, wording: str, first: str | None, second: str) -> Fault:
    """The matrix of a stage, used transposed: square, W^T; otherwise a buffer read with the axes confused.

    Args:
      name: The fault's.
      stage: The stage.
      wording: Its wording.
      first: The buffer that is likelier, "transposed" (of W^T, read as [out, in]) or "file" (W's, read as [in, out]);
        None is the former, not said.
      second: The other one.
    """

    def matrix(value: Value, at: At, buffer: str | None = None) -> Value:
        if at.what not in tensors_of(at.replay, stage):
            return value
        return value.reshape(value.shape[::-1]).T if buffer == "file" else value.T.reshape(value.shape)

    def variants(question: Question, node: Key) -> Iterable[Mapping[str, Any]]:
        rows, columns = question.replay.weight(node.layer, tensors_of(question.replay, stage)[0]).shape
        buffers = [{} if first is None else {"buffer": first}, {"buffer": second}]
        return buffers if rows != columns else buffers[:1]

    return Fault(name, wording, (stage,), {"matrix": matrix}, variants=variants, slight=False)


# --- Biases ----------------------------------------------------------------------------------------------------------

_CARRIES = {"q": "q_post_rope", "k": "k_post_rope", "v": "attention"}


def _without(parts: str) -> tuple[Callable[..., Value], Callable[[Question, Key], Iterator[Mapping[str, Any]]]]:
    """Biases of these projections left out; behind a gap those that the dumped stage can show."""
    tensors = [f"self_attn.{part}_proj.bias" for part in parts]

    def bias(value: Value, at: At) -> Value:
        return np.zeros_like(value) if at.what in tensors else value

    def variants(question: Question, node: Key) -> Iterator[Mapping[str, Any]]:
        reached = {before.stage for before in question.nodes}
        shown = node == question.nodes[-1] or all(_CARRIES[part] in reached for part in parts)
        if shown and all(question.only in tensor for tensor in tensors):
            yield {}

    return bias, variants


def _missing(name: str, wording: str, parts: str, consists_of: tuple[str, ...] = ()) -> Fault:
    bias, variants = _without(parts)
    return Fault(name, wording, ("qkv_bias",), {"bias": bias}, variants=variants, consists_of=consists_of)


_THREE = tuple(_missing(f"{part}-bias-missing", f"the {part} bias is missing", part) for part in "qkv")

FAULTS = (
    *_THREE,
    _missing("qkv-bias-missing", "the q, k and v biases are missing", "qkv", tuple(fault.name for fault in _THREE)),
    _transposed("o-proj-transposed", "attn_out", "o_proj is used transposed", None, "file"),
    _transposed("down-proj-transposed", "ffn_out", "down_proj is used transposed", None, "file"),
    Fault(
        "gate-up-swapped",
        "gate_proj and up_proj are swapped",
        ("ffn_gate", "ffn_up"),
        {"tensor": _swapped},
        slight=False,
    ),
    _transposed("head-transposed", "logits", "the head is used transposed", "file", "transposed"),
    Fault(
        "weights-quantised",
        "quantised ({codec}): {tensor}",
        _stages,
        _in_place(_quantised, "codec"),
        variants=_quantisations,
        merge={"tensor": UNION},
        in_weights=True,
        together="codec",
    ),
    Fault(
        "weights-relabelled",
        "{tensor}: its bytes are read under another dtype ({direction})",
        _stages,
        _in_place(_misread, "direction"),
        variants=_labels,
        slight=False,
        in_weights=True,
    ),
    Fault(
        "weights-from-another-layer",
        "{tensor} is layer {layer}'s",
        _stages,
        {"weight": _of_another_layer},
        variants=_layers,
        slight=False,
        in_weights=True,
    ),
)
