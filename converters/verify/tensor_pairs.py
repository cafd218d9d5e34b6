"""Tensors of one name in two checkpoints: whether their bytes are equal, and if not, how far apart their values are.

Both files are read in pieces by a few threads, so that memory does not grow with them. Where bytes are equal nothing is
decoded.
"""

from __future__ import annotations

import dataclasses
import math
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from apr_jax.converters.errors import RefusedError
from apr_jax.converters.formats import dtypes
from apr_jax.converters.storage.workers import Workers

if TYPE_CHECKING:
    from apr_jax.converters.checkpoint import distance
    from apr_jax.converters.checkpoint.tensor import Tensor

IDENTICAL, EQUAL_VALUES, CLOSE, DIFFERENT = VERDICTS = ("identical", "equal-values", "close", "different")
# Relative L2 of a tensor, up to which it counts as close.
CLOSE_BOUND = 1e-3

# More do not read faster: on a cold disk one reads a third of what two do, and four a twentieth more.
_THREADS = min(4, len(os.sched_getaffinity(0)))
_CHUNK_BYTES = 1 << 20
_BLOCK_BYTES = 16 << 20
# How many of `distance.ranges` one thread takes at a time.
_PARTS_AT_ONCE = 16

# Told the phase, and bytes done and in all of it; called from several threads.
Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class TensorComparison:
    """What was found out about one tensor.

    Attributes:
      name: Its name.
      verdict: One of `VERDICTS`.
      dtypes, shapes: Type names and shapes in A and in B.
      sums: How far apart the values are; None where bytes are equal, shapes differ or values cannot be had.
    """

    name: str
    verdict: str
    dtypes: tuple[str, str]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    sums: distance.Sums | None = None

    @property
    def distance(self) -> float:
        """Relative L2; infinite where it cannot be said."""
        if self.sums is not None:
            return self.sums.relative_l2
        return 0.0 if self.verdict == IDENTICAL else math.inf

    def to_json(self) -> dict[str, Any]:
        """Returns the comparison as JSON values; infinities are strings."""
        values: dict[str, Any] = {
            "name": self.name,
            "verdict": self.verdict,
            "dtypes": list(self.dtypes),
            "shapes": [list(shape) for shape in self.shapes],
        }
        if self.sums is None:
            return values
        return values | {
            "differing_elements": self.sums.differing,
            "relative_l2": _json_number(self.sums.relative_l2),
            "cosine": None if self.sums.cosine is None else _json_number(self.sums.cosine),
            "max_abs": _json_number(self.sums.max_abs),
        }


class Pair:
    """Two tensors of one name while they are being compared."""

    def __init__(self, a: Tensor, b: Tensor):
        self.a, self.b = a, b
        self.name = a.name
        self.same_shape = a.shape == b.shape
        # Until a byte is found that differs.
        self.same_bytes = a.nbytes == b.nbytes
        self.sums: distance.Sums | None = None
        # Whether B is A rounded: A was computed, and no file holds it.
        self.rounded = False
        self.lock = threading.Lock()

    @property
    def identical(self) -> bool:
        return self.same_bytes and self.same_shape and self.a.dtype == self.b.dtype

    @property
    def verdict(self) -> str:
        if self.identical:
            return IDENTICAL
        if self.sums is None:
            return DIFFERENT
        if self.rounded:
            return EQUAL_VALUES
        # In one type, another spelling (of a NaN, say) is a difference; between types it is what a cast does.
        if not self.sums.differing and (self.a.dtype != self.b.dtype or self.a.dtype.is_block):
            return EQUAL_VALUES
        return CLOSE if self.sums.relative_l2 <= CLOSE_BOUND else DIFFERENT

    @property
    def weight(self) -> int:
        """Differing elements, as far as they are known."""
        return self.sums.differing if self.sums is not None else dtypes.element_count(self.b.shape)

    def result(self) -> TensorComparison:
        return TensorComparison(
            self.name,
            self.verdict,
            (self.a.dtype.name, self.b.dtype.name),
            (self.a.shape, self.b.shape),
            None if self.identical else self.sums,
        )


class Meter:
    """Adds up what several threads have done."""

    def __init__(self, phase: str, total: int, progress: Progress | None):
        self._phase, self._total, self._progress = phase, total, progress
        self._done = 0
        self._lock = threading.Lock()

    def advance(self, count: int) -> None:
        if self._progress is not None:
            with self._lock:
                self._done += count
                self._progress(self._phase, self._done, self._total)


def in_threads(function: Callable[..., None], work: Iterable[tuple[Any, ...]]) -> None:
    """Calls `function(*item)` for all items on a few threads; the first error ends it."""
    with Workers(_THREADS) as workers:
        for _ in workers.map(lambda item: function(*item), work):
            pass


# --- bytes


class _Buffers(threading.local):
    """One buffer for each side and thread."""

    def __init__(self) -> None:
        self.a, self.b = bytearray(_CHUNK_BYTES), bytearray(_CHUNK_BYTES)


def compare_bytes(pairs: Sequence[Pair], progress: Progress | None) -> None:
    comparable = [pair for pair in pairs if pair.same_bytes]
    meter = Meter("bytes", sum(pair.a.nbytes for pair in comparable), progress)
    buffers = _Buffers()

    def step(pair: Pair, begin: int, end: int) -> None:
        for position in range(begin, end, _CHUNK_BYTES):
            if not pair.same_bytes:
                break
            if not _equal(pair, position, min(_CHUNK_BYTES, end - position), buffers):
                pair.same_bytes = False
        meter.advance(end - begin)

    in_threads(
        step,
        (
            (pair, begin, min(begin + _BLOCK_BYTES, pair.a.nbytes))
            for pair in comparable
            for begin in range(0, pair.a.nbytes, _BLOCK_BYTES)
        ),
    )


def _equal(pair: Pair, position: int, nbytes: int, buffers: _Buffers) -> bool:
    a, b = memoryview(buffers.a)[:nbytes], memoryview(buffers.b)[:nbytes]
    pair.a.readinto_at(position, a)
    pair.b.readinto_at(position, b)
    # Whole byte arrays are compared by memcmp, memoryviews element by element.
    if nbytes == _CHUNK_BYTES:
        return buffers.a == buffers.b
    return bytes(a) == bytes(b)


# --- values


def compare_values(pairs: Sequence[Pair], progress: Progress | None) -> None:
    # Brings numpy along, which equal bytes do not need.
    from apr_jax.converters.checkpoint import distance

    meter = Meter("values", sum(dtypes.element_count(pair.a.shape) for pair in pairs), progress)

    def step(pair: Pair, parts: Sequence[tuple[int, int]]) -> None:
        found = distance.Sums()
        for begin, end in parts:
            found += distance.measure_range(pair.a, pair.b, begin, end)
        with pair.lock:
            assert pair.sums is not None
            pair.sums += found
        meter.advance(found.elements)

    in_threads(step, _value_work(pairs))


def _value_work(pairs: Sequence[Pair]) -> Iterable[tuple[Pair, list[tuple[int, int]]]]:
    from apr_jax.converters.checkpoint import distance

    for pair in pairs:
        try:
            distance.common_type(pair.a.dtype, pair.b.dtype)
        except RefusedError:
            # Bytes differ, and nothing more can be said: no sums.
            continue
        pair.sums = distance.Sums()
        parts = list(distance.ranges(pair.a, pair.b))
        for first in range(0, len(parts), _PARTS_AT_ONCE):
            yield pair, parts[first : first + _PARTS_AT_ONCE]


def _json_number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
