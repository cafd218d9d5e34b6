"""Products computed less precisely than was declared, whatever is multiplied."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from apr_jax.parity import narrow
from apr_jax.parity.faults.record import COMMON, LEAST, OR, Fault, Mistake
from apr_jax.parity.question import Question
from apr_jax.parity.replay import PRODUCTS, At, Replay, Value
from apr_jax.parity.replay import product as multiplied
from apr_jax.trace.stages import Key

MULTIPLIED = ("qkv_matmul", "attn_scores", "attention", *PRODUCTS, "logits")
_Dot = Callable[[Value, Value], Value]


def _tf32(x: Value, how: str) -> Value:
    """Keeps 10 bits of the mantissa: nearest with ties to "even" or "away" from zero, or "truncate".

    The head's weights are large, so that bits are changed in place.
    """
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    bits = bits.copy() if bits.base is x else bits
    if how == "away":
        bits += np.uint32(0x1000)
    elif how == "even":
        odd = bits >> np.uint32(13)
        odd &= np.uint32(1)
        bits += np.uint32(0x0FFF)
        bits += odd
    bits &= np.uint32(0xFFFFE000)
    return bits.view(np.float32).astype(np.float64)


def _tf32_dot(dot: _Dot, at: At, mode: str, ties: str = "even") -> _Dot:
    how = ties if mode == "round" else mode
    return lambda x, weight: multiplied(_tf32(x, how), _tf32(weight, how))


_SHORT = f"int8 by row{OR}q8_k"
"""Rows of no more than a block are one block of Q8_K."""


def _in_fewer_bits(dot: _Dot, at: At, codec: str, product: str = "") -> _Dot:
    """What is multiplied with weights is rounded, with all of them or one; keys and values are not."""
    if product not in ("", at.what):
        return dot
    rounded = narrow.ACTIVATIONS[codec.split(OR)[0]]
    return lambda x, weight: multiplied(rounded(x), weight) if weight.ndim == 2 else dot(x, weight)


def _in_bf16(chunk: int, x: Value, weight: Value) -> Value:
    """x W^T whose running sum is rounded to bf16 after every `chunk` terms."""
    total = np.zeros((*x.shape[:-1], weight.shape[-2]), np.float32)
    for start in range(0, x.shape[-1], chunk):
        part = multiplied(x[..., start : start + chunk], weight[..., start : start + chunk])
        total = (total + part.astype(np.float32)).astype(ml_dtypes.bfloat16).astype(np.float32)
    return total.astype(np.float64)


def drift(mistake: Mistake, replay: Replay, key: Key) -> float:
    """Returns what a stage may be off, relative to it, because of how TF32 products are added up; 0 for others.

    Tensor cores cut the running sum off after every 8 products instead of rounding it, so that the errors do not
    cancel: 2^-23 of it at most for each step (Fasi, Higham, Mikaitis, Pranesh: Numerical behavior of NVIDIA tensor
    cores, PeerJ Computer Science 7:e330, 2021). One H200 left 2.1e-6 at 896 columns and 5.9e-6 at 4864, where this
    allows 1.3e-5 and 7.2e-5.

    Args:
      mistake: What is supposed to be wrong.
      replay: The replay.
      key: The stage; products before it that were not dumped count too.
    """
    if mistake.fault is not TF32:
        return 0.0
    columns = columns_of(replay)
    return sum(columns.get(before.stage, 0) for before in replay.undumped(key)) / 8 * 2.0**-23


def columns_of(replay: Replay) -> dict[str, int]:
    """Over how many columns each product sums."""
    config, length = replay.config, replay.inputs.input_ids.shape[1]
    return {
        **dict.fromkeys(("qkv_matmul", "ffn_gate", "ffn_up", "logits"), config.hidden_size),
        "attn_scores": config.head_dim,
        "attention": length,
        "attn_out": config.num_heads * config.head_dim,
        "ffn_out": config.intermediate_size,
    }


def _chunks(question: Question, node: Key) -> Iterator[Mapping[str, Any]]:
    """The more precise ones first."""
    yield from ({"chunk": 1 << power} for power in range(9, 2, -1))


def _activations(question: Question, node: Key) -> Iterator[Mapping[str, Any]]:
    """All products of a gap round alike, or one does."""
    tried = list(_activation_codecs(question, node))
    yield from tried
    if node.stage in PRODUCTS and len(question.nodes) > 1:
        yield from ({**parameters, "product": PRODUCTS[node.stage][1]} for parameters in tried)


def _activation_codecs(question: Question, node: Key) -> Iterator[Mapping[str, Any]]:
    if columns_of(question.replay).get(node.stage, 0) > narrow.Q8_K:
        yield from ({"codec": codec} for codec in narrow.ACTIVATIONS)
    else:
        others = (codec for codec in narrow.ACTIVATIONS if codec not in _SHORT.split(OR))
        yield from ({"codec": codec} for codec in (_SHORT, *others))


TF32 = Fault(
    "tf32-dots",
    "dot inputs are TF32 ({mode}), float32 was declared",
    MULTIPLIED,
    {"dot": _tf32_dot},
    variants=lambda question, node: [{"mode": "round"}, {"mode": "truncate"}],
    slight=True,
    # Ties go to even (cuBLAS, XLA) or away from zero (PTX's cvt.rna.tf32).
    ways=lambda mode: ({"ties": "away"},) if mode == "round" else (),
    formula="y = TF32(x) · TF32(W)ᵀ, {mode}",
)
FAULTS = (
    TF32,
    Fault(
        "activations-quantised",
        (
            "activations are rounded to {codec} before the product with {product}",
            "activations are rounded to {codec} before the products, as engines do beside quantised weights",
        ),
        MULTIPLIED,
        {"dot": _in_fewer_bits},
        variants=_activations,
        merge={"codec": COMMON},
        # Beside one large activation of a row, the steps of its others are coarse.
        slight=None,
        beside_blocks=True,
        formula="y = Q(x) Wᵀ, Q rounds to {codec}",
    ),
    Fault(
        "bf16-accumulation",
        "partial sums are kept in bf16 (every {chunk} terms)",
        MULTIPLIED,
        {"dot": lambda dot, at, chunk: partial(_in_bf16, chunk)},
        variants=_chunks,
        merge={"chunk": LEAST},
        slight=True,
        formula="y = bf16(… bf16(bf16(Σ_1) + Σ_2) + …), each Σ over {chunk} terms",
    ),
)
