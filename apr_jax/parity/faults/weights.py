"""Mistakes of weights: other values in a tensor's place, a matrix used transposed, a bias left out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from apr_jax.converters.formats import codecs
from apr_jax.parity import narrow
from apr_jax.parity.faults.record import IGNORED, UNION, Fault, Instead
from apr_jax.parity.question import Question
from apr_jax.parity.replay import EMBEDDING, NORMS, PRODUCTS, QKV, At, Replay, Value, head_input, head_name
from apr_jax.trace import stages
from apr_jax.trace.stages import Key

# --- Other values in a tensor's place --------------------------------------------------------------------------------

_BEHIND_GAPS = ("int8", "int4", "q4_k", "q8_0", "q4_0", "int8 by row", "fp8_e4m3", "fp8_e4m3 by row")
"""Codecs that are tried where the product itself was not dumped: each is tried for every weight of the gap."""
_SHORT = 6
"""In a gap of as many stages all codecs are tried, and other orders of columns."""
_ROWS = 48
"""Output channels by which codecs are told from each other."""
_PROMISING = 0.7
"""What a codec leaves at most of the difference in those channels."""
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
    own = node == question.nodes[-1]
    # An engine that computes in 16 bits holds its weights in them: no mistake, and in the budget.
    its_own = {"float16": "fp16", "bfloat16": "bf16"}.get(question.dtype)
    for tensor in _suspects(question, node):
        right = question.replay.weight(node.layer, tensor)
        small = codecs.stays_float(tensor, right.size)
        blocks = (codec for codec in narrow.CODECS if "f16" not in codec and narrow.fits(codec, right.shape[-1]))
        tried = ("fp16", "bf16") if small else ("fp16", "bf16", *blocks)
        if not small and not own:
            tried = ("fp16", *_BEHIND_GAPS) if _too_many(question) else tried
        elif not small:
            tried = _promising(question, node, tensor, tried)
        for codec in tried:
            if codec != its_own and (codec not in ("fp16", "bf16") or _narrows(right, codec)):
                yield {"tensor": tensor, "codec": codec}


def _too_many(question: Question) -> bool:
    """Whether a gap is long, and nothing tells which of its weights' many changes are worth being made whole."""
    return len(question.nodes) > _SHORT and question.response is None


def _narrows(weight: Value, codec: str) -> bool:
    """Whether a float type holds a weight without overflow, and not exactly."""
    with np.errstate(over="ignore"):
        narrower = narrow.CODECS[codec](weight)
    return bool(np.isfinite(narrower).all() and (narrower != weight).any())


def _promising(question: Question, node: Key, tensor: str, tried: Sequence[str]) -> tuple[str, ...]:
    """The codecs that come nearer than the right weight does, by some output channels: all would take long."""
    source = {"qkv_matmul": "attn_norm", "logits": "final_norm"}.get(node.stage) or PRODUCTS.get(node.stage, ("",))[0]
    if not source or question.given or len(question.nodes) > 1:
        return tuple(tried)  # what is multiplied is not known without the mistakes before it
    replay, weight = question.all(), question.replay.weight(node.layer, tensor)
    rows = np.unique(np.linspace(0, len(weight) - 1, _ROWS).astype(int))
    columns = rows + (_first_row(question, node.layer, tensor) if node.stage == "qkv_matmul" else 0)
    x = head_input(replay) if node.stage == "logits" else replay.get(node.layer, source)
    counted = question.tokens if len(question.tokens[0]) == x.shape[1] else question.tokens.any(axis=1, keepdims=True)
    theirs = np.asarray(question.theirs[..., columns], np.float64)
    theirs, x = (values[counted] if values.shape[1] == counted.shape[1] else values[:, 0] for values in (theirs, x))

    def left(made: Value) -> float:
        with np.errstate(all="ignore"):
            return float(np.nan_to_num(np.linalg.norm(theirs - x @ made.T), nan=np.inf))

    right = left(weight[rows])
    by_tensor = {"int8", "fp8_e4m3 by tensor"}
    return tuple(
        codec
        for codec in tried
        if left(narrow.CODECS[codec](weight)[rows] if codec in by_tensor else narrow.CODECS[codec](weight[rows]))
        <= _PROMISING * right
    )


def _first_row(question: Question, layer: int | None, tensor: str) -> int:
    """The first channel of q, k or v in the stage that holds all three."""
    before = QKV[: next(index for index, name in enumerate(QKV) if name in tensor)]
    return sum(len(question.replay.weight(layer, f"self_attn.{name}.weight")) for name in before)


def _labels(question: Question, node: Key) -> Iterator[Mapping[str, Any]]:
    for tensor in _suspects(question, node):
        yield from ({"tensor": tensor, "direction": direction} for direction in _LABELS)


def _layers(question: Question, node: Key) -> Iterator[Mapping[str, Any]]:
    others = [layer for layer in range(question.replay.config.num_layers) if node.layer not in (None, layer)]
    yield from ({"tensor": tensor, "layer": layer} for tensor in _suspects(question, node) for layer in others)


def _in_place(otherwise: Callable[[Value, Any], Value], how: str) -> dict[str, Callable[..., Value]]:
    """The change to one tensor's values that a parameter `how` says."""

    def change(value: Value, at: At, tensor: str, **parameters: Any) -> Value:
        if at.what != tensor:
            return value
        # One at a time: a head in all codecs at once would be many gigabytes.
        name, memo = (at.layer, tensor), at.replay.memo
        if memo.get(name, ("",))[0] != parameters[how]:
            memo[name] = parameters[how], otherwise(value, parameters[how])
        return memo[name][1]

    return {"weight": change}


def _misread(weight: Value, direction: str) -> Value:
    """Bytes of one 16-bit type read as another."""
    stored, read = _LABELS[direction]
    with np.errstate(over="ignore", invalid="ignore"):
        return np.ascontiguousarray(weight.astype(stored)).view(read).astype(np.float64)


def _quantised(weight: Value, codec: tuple[str, str]) -> Value:
    name, ties = codec
    return (narrow.WAYS if ties == "even" else narrow.CODECS)[name](weight)


def _quantised_in_place(value: Value, at: At, tensor: str, codec: str, ties: str = "away") -> Value:
    return _in_place(_quantised, "codec")["weight"](value, at, tensor, codec=(codec, ties))


def _of_another_layer(value: Value, at: At, tensor: str, layer: int) -> Value:
    return at.replay.weight(layer, tensor) if at.what == tensor else value


# --- A matrix in the wrong place or the wrong way round --------------------------------------------------------------

_PAIR = ("mlp.gate_proj.weight", "mlp.up_proj.weight")


def _swapped(place: tuple[int, str], at: At) -> tuple[int, str]:
    layer, tensor = place
    return (layer, _PAIR[1 - _PAIR.index(tensor)]) if tensor in _PAIR else place


def _other_stride(value: Value, buffer: str | None) -> Value:
    """The file's buffer of [rows, columns] read as [columns, rows], or that of the transposed matrix as it stands."""
    return value.reshape(value.shape[::-1]).T if buffer == "file" else value.T.reshape(value.shape)


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
        return _other_stride(value, buffer)

    def variants(question: Question, node: Key) -> Iterable[Mapping[str, Any]]:
        rows, columns = question.replay.weight(node.layer, tensors_of(question.replay, stage)[0]).shape
        buffers = [{} if first is None else {"buffer": first}, {"buffer": second}]
        return buffers if rows != columns else buffers[:1]

    formula = "y = x W, W square; else y = x W′ᵀ, W′ the other axis first"
    return Fault(name, wording, (stage,), {"matrix": matrix}, variants=variants, slight=False, formula=formula)


# --- The right values in another order -------------------------------------------------------------------------------

_ORDERS = {"adjacent": "pairs (2i, 2i + 1)", "halves": "split halves (i, i + d/2)"}


def _reordered(rows: Value, order: str, width: int) -> Value:
    """The rows of each head (or block), [n width, ...]: halves interleaved ("adjacent"), or the inverse ("halves");
    the halves exchanged ("halves exchanged"), or each two neighbours ("neighbours exchanged")."""
    pairs = (-1, 2, width // 2) if order in ("adjacent", "halves exchanged") else (-1, width // 2, 2)
    blocks = rows.reshape(*pairs, *rows.shape[1:])
    if order in ("adjacent", "halves"):
        return blocks.swapaxes(1, 2).reshape(rows.shape)
    return np.flip(blocks, 1 if order == "halves exchanged" else 2).reshape(rows.shape)


def _permuted(value: Value, at: At, tensor: str, order: str) -> Value:
    if at.what != tensor:
        return value
    (kind,) = (kind for kind, said in _ORDERS.items() if said == order)
    return _reordered(value, kind, at.replay.config.head_dim)


def _row_orders(question: Question, node: Key) -> Iterator[Mapping[str, Any]]:
    for tensor in tensors_of(question.replay, node.stage):
        if question.only in tensor and "v_proj" not in tensor:
            yield from ({"tensor": tensor, "order": order} for order in _ORDERS.values())


ROWS_PERMUTED = Fault(
    "weights-permuted",
    "{tensor}: the rows of each head are permuted into {order}, as for the other kind of RoPE",
    lambda replay, tensor, **_: ("qkv_bias",) if tensor.endswith("bias") else ("qkv_matmul",),
    {"weight": _permuted},
    variants=lambda question, node: _row_orders(question, node) if node.stage in ("qkv_matmul", "qkv_bias") else (),
    merge={"tensor": UNION},
    alone=True,
    formula=Instead("W = W₀ with each head's rows in {order}", "W = W₀, the file's {tensor}"),
)

_BLOCKS = (32, 64, 16, 128, 256)


def _interleaved(value: Value, at: At, tensor: str, block: int, order: str, codec: str = "") -> Value:
    if at.what != tensor:
        return value
    value = _quantised_in_place(value, at, tensor, codec) if codec else value
    return _reordered(value.reshape(-1), _SAID[order], block).reshape(value.shape)


_SAID = {
    "the halves are interleaved": "adjacent",
    "even and odd columns became halves": "halves",
    "the halves are exchanged": "halves exchanged",
    "neighbours are exchanged": "neighbours exchanged",
}
_PACKED = {"q4_0": 32, "q4_1": 32, "q5_0": 32, "q5_1": 32, "q4_k": 64, "int4": 32}
"""Codecs that pack several codes into a byte, and the block of columns whose order that is."""


def _interleavings(question: Question, node: Key) -> Iterator[Mapping[str, Any]]:
    if (node != question.nodes[-1] and _too_many(question)) or node.stage in NORMS or node.stage == "qkv_bias":
        return
    for tensor in tensors_of(question.replay, node.stage):
        if question.only in tensor:
            columns = question.replay.weight(node.layer, tensor).shape[-1]
            blocks = [block for block in _BLOCKS if columns % block == 0]
            yield from ({"tensor": tensor, "block": block, "order": order} for block in blocks for order in _SAID)
            if node == question.nodes[-1] or question.response is not None:
                for codec, block in _PACKED.items():
                    if block in blocks:
                        same = {"tensor": tensor, "codec": codec, "block": block}
                        yield from ({**same, "order": order} for order in _SAID)


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


def _twice(parts: str) -> tuple[Callable[..., Value], Callable[[Question, Key], Iterator[Mapping[str, Any]]]]:
    """The same biases added once more."""
    without, variants = _without(parts)
    return lambda value, at: 2 * value - without(value, at), variants


def _missing(name: str, wording: str, parts: str, consists_of: tuple[str, ...] = ()) -> Fault:
    bias, variants = _without(parts)
    formula = f"{{right}}, but b{parts} = 0" if len(parts) == 1 else "[q, k, v] = x [Wq, Wk, Wv]ᵀ"
    return Fault(
        name, wording, ("qkv_bias",), {"bias": bias}, variants=variants, consists_of=consists_of, formula=formula
    )


def _doubled(name: str, wording: str, parts: str, consists_of: tuple[str, ...] = ()) -> Fault:
    bias, variants = _twice(parts)
    twice = f"2 b{parts}" if len(parts) == 1 else "2 [bq, bk, bv]"
    formula = f"{{right}}, but with {twice}"
    return Fault(
        name,
        wording,
        ("qkv_bias",),
        {"bias": bias},
        variants=variants,
        consists_of=consists_of,
        alone=True,
        formula=formula,
    )


_TWICE = tuple(_doubled(f"{part}-bias-twice", f"the {part} bias is added twice", part) for part in "qkv")
_THREE = tuple(_missing(f"{part}-bias-missing", f"the {part} bias is missing", part) for part in "qkv")

FAULTS = (
    *_THREE,
    _missing("qkv-bias-missing", "the q, k and v biases are missing", "qkv", tuple(fault.name for fault in _THREE)),
    *_TWICE,
    _doubled("qkv-bias-twice", "the q, k and v biases are added twice", "qkv", tuple(fault.name for fault in _TWICE)),
    _transposed("o-proj-transposed", "attn_out", "o_proj is used transposed", None, "file"),
    _transposed("down-proj-transposed", "ffn_out", "down_proj is used transposed", None, "file"),
    Fault(
        "gate-up-swapped",
        "gate_proj and up_proj are swapped",
        ("ffn_gate", "ffn_up"),
        {"tensor": _swapped},
        slight=False,
        formula={"ffn_gate": "y = x W_upᵀ", "ffn_up": "y = x W_gateᵀ"},
    ),
    _transposed("head-transposed", "logits", "the head is used transposed", "file", "transposed"),
    Fault(
        "weights-quantised",
        "quantised ({codec}): {tensor}",
        _stages,
        {"weight": _quantised_in_place},
        variants=_quantisations,
        ways=lambda codec, **_: ({"ties": "even"},) if codec in narrow.WAYS else (),
        merge={"tensor": UNION},
        in_weights=True,
        together="codec",
        chaotic=True,
        formula=Instead("W = {codec}(W₀)", "W = W₀, the file's {tensor}"),
    ),
    ROWS_PERMUTED,
    Fault(
        "weights-interleaved",
        (
            "{tensor}: quantised ({codec}), and in each block of {block} columns {order}",
            "{tensor}: in each block of {block} columns {order}",
        ),
        _stages,
        {"weight": _interleaved},
        variants=_interleavings,
        slight=False,
        in_weights=True,
        alone=True,
        formula=Instead("W = W₀, in each block of {block} columns {order}", "W = W₀, the file's {tensor}"),
    ),
    Fault(
        "embedding-transposed",
        "the embedding is read with the other stride, as if it were [hidden, vocabulary]",
        ("embedding",),
        {"table": lambda table, at, buffer: _other_stride(table, buffer)},
        variants=lambda question, node: [{"buffer": "file"}, {"buffer": "transposed"}],
        merge={"buffer": IGNORED},
        formula=Instead("E read as [hidden, vocabulary]", "E read as [vocabulary, hidden]"),
    ),
    Fault(
        "weights-relabelled",
        "{tensor}: its bytes are read under another dtype ({direction})",
        _stages,
        _in_place(_misread, "direction"),
        variants=_labels,
        slight=False,
        in_weights=True,
        formula=Instead("W = the bytes of W₀, {direction}", "W = W₀, the file's {tensor}"),
    ),
    Fault(
        "weights-from-another-layer",
        "{tensor} is layer {layer}'s",
        _stages,
        {"weight": _of_another_layer},
        variants=_layers,
        slight=False,
        in_weights=True,
        formula=Instead("W = W of layer {layer}", "W = W₀, the file's {tensor}"),
    ),
)
