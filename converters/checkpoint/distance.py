"""How far apart the values of two tensors are, summed block by block so that memory does not grow with their size.

Values are compared in the narrowest real type that holds every value of both (`common_type`), so that an exact cast
compares equal and nothing else does: a zero that changed its sign is a difference, two NaN are none.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from apr_jax.converters.checkpoint.tensor import Tensor
from apr_jax.converters.formats import dtypes

# The arrays of one step fit a second-level cache, or nearly.
_ELEMENTS = 1 << 17
# Outside of these bounds sums of float32 squares may have lost what underflowed, or everything to an overflow.
_TRUSTED = (1e-30, 1e30)


@dataclasses.dataclass
class Sums:
    """What adds up over blocks of two tensors, or over tensors.

    Attributes:
      elements: Positions compared.
      differing: Positions with different values, NaN at one side included.
      unlike: Differing positions where a side is NaN or infinite; they are in no sum below.
      aa, bb, ab, dd: Sums of a*a, b*b, a*b and (b-a)*(b-a) over finite values.
      max_abs: Largest |b - a| of these.
    """

    elements: int = 0
    differing: int = 0
    unlike: int = 0
    aa: float = 0.0
    bb: float = 0.0
    ab: float = 0.0
    dd: float = 0.0
    max_abs: float = 0.0

    def __add__(self, other: Sums) -> Sums:
        added = {name: value + getattr(other, name) for name, value in vars(self).items()}
        return Sums(**added | {"max_abs": max(self.max_abs, other.max_abs)})

    @property
    def relative_l2(self) -> float:
        """||b - a|| / ||a||; infinite where a side alone is NaN or infinite, or where a is all zero and b is not."""
        if self.unlike or not math.isfinite(self.aa + self.dd):
            return math.inf
        # No norm is less than its largest element, whatever its square underflows to.
        distance = max(math.sqrt(self.dd), self.max_abs)
        if not distance:
            return 0.0
        return distance / math.sqrt(self.aa) if self.aa else math.inf

    @property
    def cosine(self) -> float | None:
        """The cosine between a and b over finite values; None if one of them is all zero."""
        if not self.aa or not self.bb:
            return 1.0 if self.aa == self.bb else None
        return max(-1.0, min(1.0, self.ab / (math.sqrt(self.aa) * math.sqrt(self.bb))))


def common_type(a: dtypes.DType, b: dtypes.DType) -> np.dtype:
    """Returns the numpy type in which values of both types are compared without loss.

    Raises:
      RefusedError: Code "dtype-not-decoded", if the values of one cannot be had.
    """
    for dtype in (a, b):
        _ = dtype.codec if dtype.is_block else dtype.numpy
    for wanted, numpy_name in (("f32", "<f4"), ("f64", "<f8")):
        if all(dtype.is_block or wanted == dtype.name or wanted in dtype.exact_casts for dtype in (a, b)):
            return np.dtype(numpy_name)
    # 64-bit integers need the 64-bit significand of the extended type.
    return np.dtype(np.complex128 if "c64" in (a.name, b.name) else np.longdouble)


def ranges(a: Tensor, b: Tensor) -> Iterator[tuple[int, int]]:
    """Yields first and last + 1 element, in C order, of parts that cover two tensors of the same shape."""
    # A padded row of a K-quant is never divided.
    unit = max(tensor.dtype.padded_columns(tensor.shape, tensor.nbytes) or 1 for tensor in (a, b))
    step = max(1, _ELEMENTS // unit) * unit
    count = dtypes.element_count(a.shape)
    for begin in range(0, count, step):
        yield begin, min(begin + step, count)


def measure_range(a: Tensor, b: Tensor, begin: int, end: int) -> Sums:
    """Compares a part of two tensors, one of `ranges`.

    Raises:
      StorageError: A file cannot be read.
    """
    dtype = common_type(a.dtype, b.dtype)
    return measure(_values(a, begin, end, dtype), _values(b, begin, end, dtype))


def _values(tensor: Tensor, begin: int, end: int, dtype: np.dtype) -> np.ndarray:
    values = tensor.read_flat(begin, end)
    if tensor.dtype.name == "bf16" and dtype == np.float32:
        # Several times as fast as ml_dtypes' cast.
        return (values.view("<u2").astype("<u4") << np.uint32(16)).view("<f4")
    return values.astype(dtype, copy=False)


def measure(a: np.ndarray, b: np.ndarray) -> Sums:
    """Compares two flat arrays of the same `common_type` and length."""
    if a.dtype == np.complex128:
        a, b = a.view(np.float64), b.view(np.float64)
    differ = _differ(a, b)
    sums = Sums(elements=a.size, differing=int(np.count_nonzero(differ)))
    if a.dtype == np.float32 and _sum_fast(a, b, sums):
        return sums
    with np.errstate(invalid="ignore"):  # signalling NaN become quiet ones
        wide = [side.astype(np.float64, copy=False) for side in (a, b)]
    _sum_carefully(wide[0], wide[1], differ, sums)
    return sums


def _differ(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.dtype.kind == "f" and a.dtype.itemsize <= 8:
        bits = f"<u{a.dtype.itemsize}"
        differ = a.view(bits) != b.view(bits)
    else:
        differ = (a != b) | (np.signbit(a) != np.signbit(b))
    if differ.any():
        differ &= ~(np.isnan(a) & np.isnan(b))
    return differ


def _sum_fast(a: np.ndarray, b: np.ndarray, sums: Sums) -> bool:
    """Fills the sums in float32, whose error of about 1e-6 does not show; False if they cannot be trusted."""
    with np.errstate(all="ignore"):
        aa = float(a.dot(a))
        if not _TRUSTED[0] < aa < _TRUSTED[1]:
            return False
        if not sums.differing:
            sums.aa = sums.bb = sums.ab = aa
            return True
        difference = b - a
        bb, dd = float(b.dot(b)), float(difference.dot(difference))
        if not (_TRUSTED[0] < bb < _TRUSTED[1] and _TRUSTED[0] < dd < _TRUSTED[1]):
            return False
        sums.aa, sums.bb, sums.dd, sums.ab = aa, bb, dd, float(a.dot(b))
        sums.max_abs = float(max(difference.max(), -difference.min()))
    return True


def _sum_carefully(a: np.ndarray, b: np.ndarray, differ: np.ndarray, sums: Sums) -> None:
    finite = np.isfinite(a) & np.isfinite(b)
    sums.unlike = int(np.count_nonzero(differ & ~finite))
    if not finite.all():
        a, b = a[finite], b[finite]
    if not a.size:
        return
    with np.errstate(all="ignore"):
        difference = b - a
        sums.aa, sums.bb = float(a.dot(a)), float(b.dot(b))
        sums.ab, sums.dd = float(a.dot(b)), float(difference.dot(difference))
        sums.max_abs = float(np.abs(difference).max())
