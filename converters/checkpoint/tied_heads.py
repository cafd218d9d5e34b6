"""Whether a head is a copy of the embedding, in whatever type."""

from __future__ import annotations

from typing import TYPE_CHECKING

from apr_jax.converters.formats.dtypes import element_count

if TYPE_CHECKING:
    import numpy as np

    from apr_jax.converters.checkpoint.tensor import Tensor

_COMPARED_BYTES = 1 << 20


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same shape and, read exactly, the same values; ends at the first difference.

    Of one type they are the same if their bytes are. Between floating-point or quantised types signs of zeros count,
    payloads of NaN do not; other types are never the same.

    Raises:
      RefusedError: Values of two types that nothing here decodes.
      StorageError: They cannot be read.
    """
    if a.shape != b.shape:
        return False
    if a.dtype is b.dtype and a.nbytes == b.nbytes:
        # As bytes they are compared by memcmp, as memoryviews element by element.
        streams = zip(a.stream(_COMPARED_BYTES), b.stream(_COMPARED_BYTES), strict=True)
        return all(bytes(ours) == bytes(theirs) for ours, theirs in streams)
    if not all(tensor.dtype.is_float or tensor.dtype.is_block for tensor in (a, b)):
        return False
    if not a.shape or 0 in a.shape:
        return _same(a.read(), b.read())
    rows = max(1, _COMPARED_BYTES // (8 * element_count(a.shape[1:])))
    parts = (slice(row, row + rows) for row in range(0, a.shape[0], rows))
    return all(_same(a.read((part,)), b.read((part,))) for part in parts)


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    import numpy as np

    a, b = (values.astype(np.float64) for values in (a, b))
    return np.array_equal(a, b, equal_nan=True) and np.array_equal(np.signbit(a), np.signbit(b))
