"""Quantised matrices whose rows stay packed in memory, for products that decode them (`apr_jax.cpu`).

Q4_K: uint8 [rows, bytes of a row], the blocks as they are. AprQ8: int8 [rows, 4 + columns], its scale, a float32,
before each row. The dtype says which it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from apr_jax.converters.checkpoint.tensor import Tensor
from apr_jax.load import block_decoding

_SCALE_BYTES, _BLOCK, _BLOCK_BYTES = 4, 256, 144


def can_pack(tensor: Tensor) -> bool:
    """Whether `pack` takes a tensor: a matrix of AprQ8, or of Q4_K whose rows are whole blocks."""
    if len(tensor.shape) != 2 or not tensor.dtype.is_block:
        return False
    rows, columns = tensor.shape
    whole = tensor.nbytes == rows * -(-columns // _BLOCK) * _BLOCK_BYTES
    return tensor.dtype.codec_name == "AprQ8" or (tensor.dtype.codec_name == "Q4_K" and whole)


def pack(tensors: Sequence[Tensor], empty: Callable[[tuple[int, ...], Any], np.ndarray]) -> np.ndarray:
    """Reads matrices of one form, rows behind rows, into an array that `empty(shape, dtype)` makes."""
    rows, columns = sum(tensor.shape[0] for tensor in tensors), tensors[0].shape[1]
    scaled = tensors[0].dtype.codec_name == "AprQ8"
    width = columns + _SCALE_BYTES if scaled else -(-columns // _BLOCK) * _BLOCK_BYTES
    out, start = empty((rows, width), np.dtype(np.int8 if scaled else np.uint8)), 0
    for tensor in tensors:
        here, data = out[start : start + tensor.shape[0]], np.empty(tensor.nbytes, np.uint8)
        tensor.readinto(data.data)
        if scaled:
            here[:, :_SCALE_BYTES] = data[:_SCALE_BYTES].view(np.int8)
            here[:, _SCALE_BYTES:] = data[_SCALE_BYTES:].view(np.int8).reshape(tensor.shape)
        else:
            here[:] = data.reshape(here.shape)
        start += tensor.shape[0]
    return out


def are_packed(matrix: Array) -> bool:
    """Whether this is one of `pack`'s."""
    return matrix.dtype in (jnp.int8, jnp.uint8)


def decode(rows: Array) -> Array:
    """Packed rows [..., width] -> float32 [..., columns], of Q4_K with the padding to whole blocks."""
    if rows.dtype == jnp.int8:
        scale = lax.bitcast_convert_type(rows[..., :_SCALE_BYTES], jnp.float32)
        return rows[..., _SCALE_BYTES:].astype(jnp.float32) * scale[..., None]
    columns = rows.shape[-1] // _BLOCK_BYTES * _BLOCK
    values = block_decoding.decode(rows.reshape(-1), "q4_k", (rows.size // rows.shape[-1], columns))
    return values.reshape(*rows.shape[:-1], columns)
