"""Tensors decoded where they are to be used: quantised blocks and narrow floats, from a file's bytes, inside a jit.

Each format has the formula of its class in `converters.formats.codecs`, whose table of fields says where in a block
what stands. The values are the host's bit for bit (what NaN carry aside): a product of a half, a 6-bit scale and a
quant of at most 5 bits needs 22 bits and is exact in float32, so that it does not matter whether the compiler contracts
it with the difference after it; every other formula rounds once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from apr_jax.converters.checkpoint.tensor import Tensor
from apr_jax.converters.formats import dtypes

Fields = dict[str, Array]


def can_decode(tensor: Tensor) -> bool:
    """Whether `decode` knows the type."""
    return tensor.dtype.codec_name in (*_FORMULAS, "AprQ8")


def decode(data: Array, dtype_name: str, shape: tuple[int, ...]) -> Array:
    """Decodes a quantised tensor.

    Args:
      data: All its bytes, uint8 [nbytes].
      dtype_name: Its type in the registry (`apr_jax.converters.formats.dtypes`).
      shape: Its shape.

    Returns:
      float32 of this shape, as `apr_jax.converters.checkpoint.Tensor.read` returns it.
    """
    dtype = dtypes.by_name(dtype_name)
    codec = dtype.codec
    if codec.prefix_bytes:
        scale = lax.bitcast_convert_type(data[: codec.prefix_bytes], jnp.float32)
        return (_signed(data[codec.prefix_bytes :]).astype(jnp.float32) * scale).reshape(shape)
    layout = codec.layout
    blocks = data.reshape(-1, layout.itemsize)
    fields = {}
    for name, (kind, offset, *_) in (layout.fields or {}).items():
        column = blocks[:, offset : offset + kind.itemsize]
        fields[name] = _half(column) if kind.base.kind == "f" else _signed(column) if kind.base.kind == "i" else column
    values = _FORMULAS[dtype.codec_name or ""](fields)
    columns = dtype.padded_columns(shape, data.size)
    if columns is None:
        return values.reshape(-1)[: math.prod(shape)].reshape(shape)
    blocks_in_row = -(-columns // dtype.block_elements)
    return values.reshape(-1, blocks_in_row * dtype.block_elements)[:, :columns].reshape(shape)


def _half(column: Array) -> Array:
    """Half-precision numbers, uint8 [n, 2], as float32 [n, 1]."""
    return cast(lax.bitcast_convert_type(column, jnp.float16), jnp.float32)[:, None]


def cast(x: Array, dtype: DTypeLike) -> Array:
    """x in another dtype, rounded once. XLA has no halves on a CPU without F16C: there they are widened by integers."""
    if x.dtype != jnp.float16:
        return x.astype(dtype)
    return lax.platform_dependent(x, cpu=lambda x: _widened(x).astype(dtype), default=lambda x: x.astype(dtype))


def _widened(x: Array) -> Array:
    """float16 -> float32, exact; the payload of NaN stays."""
    bits = lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32)
    exponent, mantissa = bits >> 10 & 31, bits & 1023
    normal = jnp.where(exponent == 31, jnp.uint32(255), exponent + 112) << 23 | mantissa << 13
    # A product and not subnormal bits moved up: XLA takes float32's subnormal numbers for zero.
    subnormal = lax.bitcast_convert_type(mantissa.astype(jnp.float32) * jnp.float32(2**-24), jnp.uint32)
    return lax.bitcast_convert_type(jnp.where(exponent == 0, subnormal, normal) | bits >> 15 << 31, jnp.float32)


def _signed(column: Array) -> Array:
    return lax.bitcast_convert_type(column, jnp.int8)


def _nibbles(packed: Array) -> Array:
    """uint8 [..., bytes] -> [..., 2 * bytes]: all low nibbles, then all high ones (GGML's order)."""
    return jnp.concatenate((packed & 15, packed >> 4), -1)


def _shifted(packed: Array, shifts: Sequence[int], mask: int) -> Array:
    """uint8 [n, ..., bytes] -> [n, ..., shifts, bytes]: each byte shifted right, only the mask's bits kept."""
    return packed[..., None, :] >> jnp.array(shifts, jnp.uint8)[:, None] & jnp.uint8(mask)


def _product(scale: Array, quants: Array) -> Array:
    return scale * quants.astype(jnp.float32)


def _minus(quants: Array, offset: int) -> Array:
    return quants.astype(jnp.int8) - jnp.int8(offset)


# --- 32 values


def _apr_q4(f: Fields) -> Array:
    pairs = jnp.stack((f["qs"] & 15, f["qs"] >> 4), -1).reshape(-1, 32)
    return _product(f["d"], _minus(pairs, 8))


def _fifth_bits(f: Fields) -> Array:
    """uint8 [n, 32], 0 or 16: bit i of `qh` belongs to value i."""
    return (f["qh"][..., None] >> jnp.arange(8, dtype=jnp.uint8) & 1).reshape(-1, 32) << 4


# --- 256 values


def _scales_and_mins(packed: Array) -> tuple[Array, Array]:
    """The 6-bit scales and mins of 8 sub-blocks, uint8 [n, 8] each, from uint8 [n, 12]."""
    first, second, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = jnp.concatenate((first & 63, rest & 15 | first >> 6 << 4), 1)
    mins = jnp.concatenate((second & 63, rest >> 4 | second >> 6 << 4), 1)
    return scales, mins


def _sub_blocks(f: Fields, quants: Array) -> Array:
    """8 sub-blocks of 32 quants each, uint8 [n, 8, 32]."""
    scales, mins = _scales_and_mins(f["scales"])
    return _product(_product(f["d"], scales)[..., None], quants) - _product(f["dmin"], mins)[..., None]


def _q4_k_quants(f: Fields) -> Array:
    return _nibbles(f["qs"].reshape(-1, 4, 32)).reshape(-1, 8, 32)


def _q2_k(f: Fields) -> Array:
    quants = _shifted(f["qs"].reshape(-1, 2, 32), (0, 2, 4, 6), 3).reshape(-1, 16, 16)
    scale, shift = _product(f["d"], f["scales"] & 15), _product(f["dmin"], f["scales"] >> 4)
    return _product(scale[..., None], quants) - shift[..., None]


def _q3_k(f: Fields) -> Array:
    packed = f["scales"]
    high_scales = _shifted(packed[:, 8:], (0, 2, 4, 6), 3).reshape(-1, 16)
    scales = _minus(_nibbles(packed[:, :8]) | high_scales << 4, 32)
    quants = _shifted(f["qs"].reshape(-1, 2, 32), (0, 2, 4, 6), 3).reshape(-1, 16, 16).astype(jnp.int8)
    absent = (_shifted(f["hmask"], range(8), 1) ^ 1) << 2
    return _product(_product(f["d"], scales)[..., None], quants - absent.reshape(-1, 16, 16).astype(jnp.int8))


def _q6_k(f: Fields) -> Array:
    low = _nibbles(f["ql"].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    high = _shifted(f["qh"].reshape(-1, 2, 32), (0, 2, 4, 6), 3)
    quants = _minus((low | high << 4).reshape(-1, 16, 16), 32)
    return _product(_product(f["d"], f["scales"])[..., None], quants)


_FORMULAS: dict[str, Callable[[Fields], Array]] = {
    "AprQ4": _apr_q4,
    "Q4_0": lambda f: _product(f["d"], _minus(_nibbles(f["qs"]), 8)),
    "Q4_1": lambda f: _product(f["d"], _nibbles(f["qs"])) + f["m"],
    "Q5_0": lambda f: _product(f["d"], _minus(_nibbles(f["qs"]) | _fifth_bits(f), 16)),
    "Q5_1": lambda f: _product(f["d"], _nibbles(f["qs"]) | _fifth_bits(f)) + f["m"],
    "Q8_0": lambda f: _product(f["d"], f["qs"]),
    "Q8_1": lambda f: _product(f["d"], f["qs"]),
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": lambda f: _sub_blocks(f, _q4_k_quants(f)),
    "Q5_K": lambda f: _sub_blocks(f, _q4_k_quants(f) | _shifted(f["qh"], range(8), 1) << 4),
    "Q6_K": _q6_k,
}
