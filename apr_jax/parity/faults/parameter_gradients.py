"""Mistakes in the gradients of parameters: how they are summed, transposed, tied, scaled, clipped and rounded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from apr_jax.converters.checkpoint.adapters import LowRank
from apr_jax.parity.backward import nodes
from apr_jax.parity.backward.replay import Backward, Place
from apr_jax.parity.faults.record import UNION, Fault, Instead
from apr_jax.parity.replay import QKV, Value
from apr_jax.trace.stages import Key

_MATRICES = (nodes.WEIGHT, nodes.HEAD_WEIGHT)
_WEIGHTS = (nodes.WEIGHT, nodes.HEAD_WEIGHT, nodes.NORM_WEIGHT, nodes.EMBEDDING_WEIGHT, nodes.TIED_WEIGHT)


def _of_tensor(change: Callable[..., Any]) -> Callable[..., Any]:
    return lambda value, at, tensor, **rest: change(value, at, **rest) if at.what == tensor else value


def _of_parameter(
    name: str,
    wording: str,
    kinds: tuple[str, ...],
    change: Callable[..., Any],
    formula: str,
    step: str = "parameter",
    parameters: Callable[[Any], Sequence[Mapping[str, Any]]] = lambda question: ({},),
    chaotic: bool = False,
) -> Fault:
    """A mistake in one parameter's gradient, that may be made in those of others too."""

    def variants(question: Any, node: Key) -> Iterator[Mapping[str, Any]]:
        yield from ({"tensor": nodes.tensor_of(node)[1], **rest} for rest in parameters(question))

    changes = {step: _of_tensor(change)}
    return Fault(
        name,
        wording,
        kinds,
        changes,
        variants=variants,
        merge={"tensor": UNION},
        chaotic=chaotic,
        formula=formula,
    )


def _transposed(value: Value, at: Place) -> Value:
    return value.T.reshape(value.shape)


def _divisors(question: Any) -> list[Mapping[str, Any]]:
    """What a sum may be divided by: positions, those that count, rows."""
    loss = question.back.loss
    rows, length = loss.inputs.input_ids.shape
    tokens = int((loss.inputs.attention_mask == 1).sum())
    counts = {rows * length: "positions", tokens: "tokens", length: "positions of a row", rows: "rows"}
    counts[loss.count] = "tokens that count"
    return [{"count": count, "what": what} for count, what in counts.items() if count > 1]


def _divided(value: Value, at: Place, count: int, what: str) -> Value:
    return value / count


_KEPT: Mapping[str, Callable[[Value], Value]] = {
    "the first row": lambda g: g[:1],
    "the last row": lambda g: g[-1:],
    "the first position": lambda g: g[:, :1],
    "the last position": lambda g: g[:, -1:],
}


def _only(right: Callable[..., Value], at: Place, kept: str) -> Callable[..., Value]:
    return lambda *terms: right(*(_KEPT[kept](term) for term in terms))


def _kept(question: Any) -> list[Mapping[str, Any]]:
    return [{"kept": kept} for kept in _KEPT]


def _overwritten(right: Callable[..., Value], at: Place, kept: str) -> Callable[..., Value]:
    def scattered(gradient: Value, rows: np.ndarray, vocabulary: int) -> Value:
        result = np.zeros((vocabulary, gradient.shape[-1]), gradient.dtype)
        flat, ids = gradient.reshape(-1, gradient.shape[-1]), rows.ravel() % vocabulary
        order = np.arange(len(ids)) if kept == "last" else np.arange(len(ids))[::-1]
        for place in order:
            result[ids[place]] = flat[place]
        return result

    return scattered


def _ids_at_padding(question: Any) -> list[Mapping[str, Any]]:
    inputs = question.back.forward.inputs
    padding = np.unique(inputs.input_ids[inputs.attention_mask == 0])
    return [{"token": int(token)} for token in padding[:4]]


def _their_row(value: Value, at: Place, token: int) -> Value:
    """A row is theirs, whatever it is: all others have to be right."""
    name = at.what if at.layer is None else f"model.layers.{at.layer}.{at.what}"
    theirs = at.replay.theirs.get(f"grad.{name}")
    if theirs is None:
        return value
    value = np.array(value)
    value[token] = theirs[token]
    return value


def _zero_row(value: Value, at: Place, token: int) -> Value:
    value = np.array(value)
    value[token] = 0.0
    return value


def _zeroed_rows(question: Any) -> list[Mapping[str, Any]]:
    """Tokens whose rows have no gradient on the other side, and should have one."""
    theirs = question.judged.theirs
    if theirs.ndim != 2 or len(theirs) != question.back.config.vocab_size:
        return []
    empty = np.flatnonzero(~theirs.any(axis=-1) & question.judged.right.any(axis=-1))
    return [{"token": int(token)} for token in empty[:4]]


_EMBEDDINGS = (nodes.EMBEDDING_WEIGHT, nodes.TIED_WEIGHT)


def _tied(name: str, wording: str, change: Callable[[Value, Value], tuple[Value, Value]], formula: str) -> Fault:
    return Fault(name, wording, (nodes.TIED_WEIGHT,), {"tied": lambda parts, at: change(*parts)}, formula=formula)


def _unnormalised(normed: Value, at: Place) -> Value:
    back = at.replay
    return back.normed_of(at.layer, at.what)


# --- Precision -------------------------------------------------------------------------------------------------------


def in_dtype(values: Value, dtype: str) -> Value:
    """Rounds values to the nearest of a narrow dtype."""
    with np.errstate(over="ignore"):
        return np.asarray(values, np.float32).astype(ml_dtypes.finfo(dtype).dtype).astype(np.float64)


def _accumulated(right: Value, at: Place, rows: int, dtype: str) -> Value:
    key = nodes.of_tensor(at.layer, at.what)
    total: Value | None = None
    for first in range(0, len(at.replay.forward.inputs.input_ids), rows):
        part = in_dtype(at.replay.over_rows(key, slice(first, first + rows)), dtype)
        total = part if total is None else in_dtype(total + part, dtype)
    return right if total is None else total


def _micro_batches(question: Any) -> list[Mapping[str, Any]]:
    count = len(question.back.forward.inputs.input_ids)
    return [{"rows": rows, "dtype": "bfloat16"} for rows in range(1, count) if count % rows == 0]


ROUNDED = Fault(
    "gradient-rounded",
    "the gradient of {tensor} is rounded to {dtype}",
    merge={"tensor": UNION},
    formula=Instead("dW rounded to {dtype}", "dW in the dtype declared"),
)
ROUNDED_AT_RANDOM = Fault(
    "stochastic-rounding",
    "the gradient of {tensor} is rounded to {dtype} up or down at random: within one unit, and as often up as down",
    merge={"tensor": UNION},
    formula=Instead("dW rounded to {dtype}, up or down at random", "dW in the dtype declared"),
)
TRUNCATED = Fault(
    "gradient-truncated",
    "the gradient of {tensor} is rounded to {dtype} towards zero",
    merge={"tensor": UNION},
    formula=Instead("dW cut off to {dtype}", "dW in the dtype declared"),
)
CLIPPED = Fault(
    "gradient-clipped",
    "gradients are clipped to a norm of {norm:.6g}: without that it is {expected:.6g}",
    formula=Instead("dW · {norm:.6g} / ‖all dW‖", "dW"),
)
ANOTHER_STEP = Fault(
    "gradient-of-another-step",
    "the gradients are those of other tokens: {count} tokens that are not in this batch have one (such as {token})",
    formula=Instead("dW of another batch", "dW of this batch"),
)

_READS = {
    "grad.ffn_swigl": ("mlp.down_proj",),
    "grad.ffn_norm": ("mlp.gate_proj", "mlp.up_proj"),
    "grad.attention": ("self_attn.o_proj",),
    "grad.attn_norm": tuple(f"self_attn.{name}" for name in QKV),
}
"""The linear layers that a gradient goes back through."""


def _adapted(question: Any, node: Key) -> Iterator[Mapping[str, Any]]:
    """All modules of the adapter that a gradient goes back through, or one of them; with the adapter twice, or not."""
    layer = nodes.layer_of(node, question.back.config)
    here = [name for name in _READS[question.kind_of(node)] if _part(question.back, layer, f"{name}.weight")]
    for modules in dict.fromkeys((tuple(here), *((name,) for name in here))):
        if modules:
            yield from ({"modules": modules, "times": times} for times in ("twice", "not at all"))


def _part(back: Backward, layer: int | None, name: str) -> LowRank | None:
    return back.adapter.get(nodes.of_tensor(layer, name).removeprefix("grad."))


def _merged(weight: Value, at: Place, modules: Sequence[str], times: str) -> Value:
    part = _part(at.replay, at.layer, at.what)
    if part is None or at.what.removesuffix(".weight") not in modules:
        return weight
    return weight + (part.scale if times == "twice" else -part.scale) * (part.b @ part.a)


LORA: Sequence[Fault] = (
    _of_parameter(
        "lora-gradient-missing", "{tensor} has no gradient", (nodes.LOW_RANK,), lambda v, at: np.zeros_like(v), "dA = 0"
    ),
    _of_parameter(
        "lora-scale-missing",
        "the gradient of {tensor} lacks the adapter's scale",
        (nodes.LOW_RANK,),
        lambda scale, at: 1.0,
        "dA = Bᵀ dW, without alpha / r",
        "lora_scale",
    ),
    Fault(
        "lora-merged-twice",
        "the adapter is in the weights {times} where gradients go back through {modules}",
        tuple(_READS),
        {"merged_back": _merged},
        variants=_adapted,
        merge={"modules": UNION},
        formula="dx = g (W + 2 s B A)",
    ),
)
FAULTS: Sequence[Fault] = (
    *LORA,
    _of_parameter(
        "weight-gradient-transposed",
        "the gradient of {tensor} is transposed",
        _MATRICES,
        _transposed,
        "dW = xᵀ g",
    ),
    _of_parameter(
        "weight-gradient-missing", "{tensor} has no gradient", _WEIGHTS, lambda v, at: np.zeros_like(v), "dW = 0"
    ),
    _of_parameter(
        "bias-gradient-missing", "{tensor} has no gradient", (nodes.BIAS,), lambda v, at: np.zeros_like(v), "db = 0"
    ),
    _of_parameter(
        "weight-gradient-averaged",
        "the gradient of {tensor} is divided by the number of {what} ({count})",
        _WEIGHTS,
        _divided,
        "dW = gᵀ x / {count}",
        parameters=_divisors,
    ),
    _of_parameter(
        "bias-gradient-averaged",
        "the gradient of {tensor} is divided by the number of {what} ({count})",
        (nodes.BIAS,),
        _divided,
        "db = Σ g / {count}",
        parameters=_divisors,
    ),
    _of_parameter(
        "weight-gradient-first-row",
        "the gradient of {tensor} is that of {kept} alone, not summed",
        _MATRICES,
        _only,
        "dW = gᵀ x over {kept}",
        "outer",
        _kept,
    ),
    _of_parameter(
        "bias-gradient-first-row",
        "the gradient of {tensor} is that of {kept} alone, not summed over rows and positions",
        (nodes.BIAS,),
        _only,
        "db = Σ g over {kept}",
        "bias_sum",
        _kept,
    ),
    Fault(
        "norm-weight-gradient-unnormalised",
        "the gradient of a norm's weight is taken with the norm's input, which is not normalised",
        (nodes.NORM_WEIGHT,),
        {"norm_read": _unnormalised},
        formula="dw = Σ g · x",
    ),
    _of_parameter(
        "embedding-gradient-overwritten",
        "of a token that is there several times only the {kept} one counts in the gradient of {tensor}",
        _EMBEDDINGS,
        _overwritten,
        "dE[id] = g of the {kept}",
        "scatter",
        lambda question: [{"kept": kept} for kept in ("last", "first")],
    ),
    _of_parameter(
        "embedding-gradient-padding",
        "the row of the padding token {token} has a gradient that it should not have, in {tensor}",
        _EMBEDDINGS,
        _their_row,
        "dE[{token}] ≠ 0 from padding",
        parameters=_ids_at_padding,
    ),
    _of_parameter(
        "embedding-row-frozen",
        "the row of token {token} has no gradient, in {tensor}",
        _EMBEDDINGS,
        _zero_row,
        "dE[{token}] = 0",
        parameters=_zeroed_rows,
    ),
    _tied(
        "tied-gradient-head-missing",
        "the tied embedding's gradient lacks the head's part",
        lambda first, second: (first, np.zeros_like(second)),
        "dE = that of the embedding",
    ),
    _tied(
        "tied-gradient-embedding-missing",
        "the tied embedding's gradient lacks the embedding's part: it is the head's alone",
        lambda first, second: (np.zeros_like(first), second),
        "dE = that of the head",
    ),
    _tied(
        "tied-gradient-doubled",
        "the tied embedding's gradient is counted twice",
        lambda first, second: (2 * first, 2 * second),
        "dE = 2 (that of the embedding + that of the head)",
    ),
    _of_parameter(
        "bf16-gradient-accumulation",
        "the gradient of {tensor} is accumulated in {dtype} over micro-batches of {rows} rows",
        (*_WEIGHTS, nodes.BIAS),
        _accumulated,
        "dW = Σ over micro-batches of {rows} rows, rounded to {dtype} after each",
        parameters=_micro_batches,
        chaotic=True,
    ),
    ROUNDED,
    ROUNDED_AT_RANDOM,
    TRUNCATED,
    CLIPPED,
    ANOTHER_STEP,
)
