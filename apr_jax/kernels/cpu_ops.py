"""The table of operations for CPUs: weights of 16 bits through kernels, other products in XLA:CPU's fastest forms.

Measured on 2 AVX-512 cores, float32, 0.5B shape, jax 0.10.2 (`make bench`): XLA:CPU hands products to YNNPACK, which
packs its right operand anew at each call. A weight [out, in] on the right costs more to pack than to multiply for few
rows; on the left it is read as it lies. Four rows times the weight of gate and up: 4.6 ms on the right, 2.1 on the
left. From some hundred rows on, packing pays and turning the result round does not.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from apr_jax.cpu import products
from apr_jax.load import packed_rows
from apr_jax.model import qwen2
from apr_jax.model.qwen2 import Ops, Tap

_FEW_ROWS = 128
_MOST_BLOCKS = 4
_LEAST_BLOCK = 64


def embed(ids: Array, table: Array) -> Array:
    """As `qwen2.embed`; bits are gathered, since XLA:CPU would widen a whole table of 16-bit floats first.

    Quantised rows are decoded after they are looked up.
    """
    if packed_rows.are_packed(table):
        return packed_rows.decode(qwen2.embed(ids, table))
    if table.dtype.itemsize != 2:
        return qwen2.embed(ids, table)
    return lax.bitcast_convert_type(qwen2.embed(ids, lax.bitcast_convert_type(table, jnp.uint16)), table.dtype)


def linear(ops: Ops, x: Array, weight: Array, dtype: Any = None) -> Array:
    """As `qwen2.linear`: x [B, T, in] times weight [out, in] -> [B, T, out]; the weight on the left for few rows.

    A weight that is narrower than x is widened where it is multiplied, if the kernels for that are there.
    """
    if products.supports(x, weight):
        return products.product(x.reshape(-1, x.shape[-1]), weight).reshape(*x.shape[:-1], -1)
    if x.shape[0] * x.shape[1] > _FEW_ROWS:
        return qwen2.linear(ops, x, weight, dtype)
    return jnp.moveaxis(ops.dot("oi,bti->obt", weight, x, dtype or x.dtype), 0, -1)


def attention(
    ops: Ops,
    q: Array,
    k: Array,
    v: Array,
    q_positions: Array,
    kv_positions: Array,
    tap: Tap,
    window: int | None = None,
) -> Array:
    """As `qwen2.attention`, for a prompt in blocks of queries that leave out the keys behind them.

    Where there are as many keys as queries, they are the same tokens in the same order: positions rise along a row, so
    no query sees a later key. Three eighths of the scores are not computed.
    """
    length = q.shape[1]
    block = max(_LEAST_BLOCK, -(-length // _MOST_BLOCKS))
    if k.shape[1] != length or block >= length or tap is not qwen2.pass_on:
        return qwen2.attention(ops, q, k, v, q_positions, kv_positions, tap, window)
    parts = []
    for start in range(0, length, block):
        here, seen = slice(start, start + block), slice(0, start + block)
        positions = q_positions[:, here], kv_positions[:, seen]
        parts.append(qwen2.attention(ops, q[:, here], k[:, seen], v[:, seen], *positions, tap, window))
    return jnp.concatenate(parts, axis=1)


CPU_OPS = dataclasses.replace(qwen2.OPS, embed=embed, linear=linear, attention=attention)
"""For CPUs, in every dtype; needs no other layout of the parameters."""
