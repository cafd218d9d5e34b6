"""Casts between floating-point types, over chunks of bytes; and from float32 to quantised types, a tensor at once.

Between floating-point types every cast rounds once, to nearest with ties to even, straight from the source type to the
target (IEEE 754-2019, 4.3.1): f64 -> bf16 by way of f32 would round twice. A NaN stays a NaN with its sign and the
upper bits of its payload, made quiet as convertFormat does (6.2.1, 6.2.3); infinities and signed zeros stay what they
are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from apr_jax.converters.errors import RefusedError, UsageError
from apr_jax.converters.formats import dtypes

if TYPE_CHECKING:
    import numpy as np

FLOATS = ("f16", "bf16", "f32", "f64")
# Into these values are quantised as `apr` does it; `recoding` casts to and from them.
QUANTISED = ("apr_q8", "apr_q4", "q4_k")

# What `apr` calls the quantised types.
_ALIASES = {"q8": "apr_q8", "int8": "apr_q8", "q4": "apr_q4", "int4": "apr_q4", "q4k": "q4_k", "q6k": "q6_k"}

_TARGETS = f"{', '.join(FLOATS)}, q8, q4, q4k"

# Bits of the significand that are stored, and bits of the whole.
_FRACTION = {"f16": 10, "bf16": 7, "f32": 23, "f64": 52}
_BITS = {"f16": 16, "bf16": 16, "f32": 32, "f64": 64}


@dataclasses.dataclass
class Damage:
    """What a cast did to values, beyond rounding them.

    Attributes:
      overflowed: Finite values that became infinite.
      vanished: Values that became zero.
    """

    overflowed: int = 0
    vanished: int = 0

    def __add__(self, other: Damage) -> Damage:
        return Damage(self.overflowed + other.overflowed, self.vanished + other.vanished)


def target_type(name: str) -> dtypes.DType:
    """Returns the type that `--cast` names.

    Raises:
      UsageError: Code "cast-unknown": nothing has this name.
      RefusedError: Code "cast-unsupported": it is a type, and casting into it is not available.
    """
    name = name.lower()
    known = _ALIASES.get(name, name)
    if known not in dtypes.TYPES:
        raise UsageError(f"unknown type '{name}'", code="cast-unknown", expected=f"one of {_TARGETS}")
    if known not in (*FLOATS, *QUANTISED):
        raise RefusedError(
            f"cannot cast to '{name}'",
            code="cast-unsupported",
            found=name,
            expected=f"one of {_TARGETS}",
            hint="Cast to one of these, or leave the type as it is: without a cast everything is converted bit for bit",
        )
    return dtypes.TYPES[known]


def prepare() -> None:
    """Imports what `cast` needs, so that it can be called from threads."""
    import numpy  # noqa: F401


def cast(data: bytes | memoryview, source: str, target: str) -> tuple[memoryview, Damage]:
    """Casts little-endian values.

    Args:
      data: Whole elements of type `source`; no alignment needed.
      source: The name of their type, one of `FLOATS`.
      target: The name of the type to cast to, one of `FLOATS` and another than `source`.

    Returns:
      The bytes of the cast values, in the same order, and what it did to them.
    """
    import numpy as np

    bits = np.frombuffer(data, f"<u{_BITS[source] // 8}")
    with np.errstate(all="ignore"):
        out = _round(bits, source, target)
    nan = _magnitude(bits, source) > _infinity(source)
    if nan.any():
        out[nan] = _quiet_nans(bits[nan], source, target)
    infinite = _magnitude(out, target) == _infinity(target)
    damage = Damage()
    if infinite.any():
        damage.overflowed = int(np.count_nonzero(infinite & (_magnitude(bits, source) != _infinity(source))))
    zeros = int(np.count_nonzero(_magnitude(out, target) == 0))
    if zeros:
        damage.vanished = zeros - int(np.count_nonzero(_magnitude(bits, source) == 0))
    return out.data.cast("B"), damage


def quantise(values: np.ndarray, dtype_name: str, shape: Sequence[int]) -> bytes:
    """Returns the payload that `apr import --quantize` (0.72.3) writes for a tensor, byte for byte.

    Args:
      values: float32, finite, of this shape or flat.
      dtype_name: "apr_q8", "apr_q4" or "q4_k".
      shape: The tensor's; the rows of Q4_K are padded to whole blocks.

    Raises:
      RefusedError: Code "cast-unsupported": nothing encodes into this type; "cast-non-finite": NaN or infinities.
    """
    import numpy as np

    from apr_jax.converters.formats import codecs

    dtype = dtypes.by_name(dtype_name)
    codec = dtype.codec
    if not isinstance(codec, codecs.Encoder):
        raise RefusedError(
            f"cannot quantise to {dtype_name}",
            code="cast-unsupported",
            found=dtype_name,
            hint="Cast to f16 or bf16, or leave the type as it is: without a cast everything is converted bit for bit",
        )
    flat = np.ascontiguousarray(values, np.float32).reshape(-1)
    if not np.isfinite(flat).all():
        raise RefusedError(
            "NaN and infinities cannot be quantised",
            code="cast-non-finite",
            hint="Casts to floating-point types keep them; --cast GLOB=TYPE names other tensors.",
        )
    if not flat.size:
        return b""
    columns = dtype.padded_columns(shape, dtype.encoded_nbytes(shape))
    prefix = codec.prefix(np.abs(flat).max())
    return prefix + codec.encode(codecs.pad_rows(flat, columns, codec.elements), prefix)


def _round(bits: np.ndarray, source: str, target: str) -> np.ndarray:
    """Returns the bits of the values in `target`; NaN come out as anything."""
    if source == "bf16":
        return _from_float(_bf16_to_f32(bits), target)
    values = bits.view(f"<f{_BITS[source] // 8}")
    if target != "bf16":
        return _from_float(values, target)
    if source == "f64":
        return _f32_to_bf16(_f64_to_f32_odd(values))
    return _f32_to_bf16(values.astype("<f4").view("<u4"))


def _from_float(values: np.ndarray, target: str) -> np.ndarray:
    # numpy rounds f32 -> f16 and f64 -> f16 directly and to even; so does the processor for f64 -> f32.
    return values.astype(f"<f{_BITS[target] // 8}").view(f"<u{_BITS[target] // 8}")


def _bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    import numpy as np

    # What NumPy computes is in the machine's order, whatever it is computed from.
    return (bits.astype("<u4") << np.uint32(16)).astype("<u4", copy=False).view("<f4")


def _f32_to_bf16(bits: np.ndarray) -> np.ndarray:
    """Adds just under half a unit of the kept part, one more where that part is odd, and cuts."""
    import numpy as np

    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return ((bits + odd + np.uint32(0x7FFF)) >> np.uint32(16)).astype("<u2")


def _f64_to_f32_odd(values: np.ndarray) -> np.ndarray:
    """Returns the f32 bits of f64 values rounded to odd: cut, and the last bit set where anything was cut off.

    A later rounding to a type with at least two bits less is then the rounding of the exact value (Boldo and Melquiond,
    "When double rounding is odd", 2005).
    """
    import numpy as np

    nearest = values.astype("<f4")
    bits = nearest.view("<u4").copy()
    wide = nearest.astype("<f8")
    inexact = wide != values
    away = np.abs(wide) > np.abs(values)
    bits[away] -= np.uint32(1)
    bits[inexact] |= np.uint32(1)
    return bits


def _quiet_nans(bits: np.ndarray, source: str, target: str) -> np.ndarray:
    kept = bits.astype("<u8")
    sign = kept >> (_BITS[source] - 1)
    payload = kept & ((1 << _FRACTION[source]) - 1)
    shift = _FRACTION[target] - _FRACTION[source]
    payload = payload << shift if shift >= 0 else payload >> -shift
    quiet = _infinity(target) | 1 << (_FRACTION[target] - 1)
    return (sign << (_BITS[target] - 1) | payload | quiet).astype(f"<u{_BITS[target] // 8}")


def _magnitude(bits: np.ndarray, dtype: str) -> np.ndarray:
    return bits & bits.dtype.type((1 << (_BITS[dtype] - 1)) - 1)


def _infinity(dtype: str) -> int:
    """Returns the bits of positive infinity."""
    return ((1 << (_BITS[dtype] - 1 - _FRACTION[dtype])) - 1) << _FRACTION[dtype]
