"""What the values of a tensor are like: moments, extremes, zeros, NaN, dead rows, and a histogram of magnitudes.

Every tensor is read once, in chunks; memory is constant. Elements of one or two bytes are counted by bit pattern, and
everything follows from the 65,536 counts without any rounding but that of the last sums. Other elements are summed up
in float64, chunk by chunk, means and squared deviations combined as by Chan, Golub and LeVeque ("Updating formulae and
a pairwise algorithm for computing sample variances", 1979).

Magnitudes are counted by octave: a bf16 matrix whose bytes are read as f16 has all of them within three ([0.5, 4)), an
f16 matrix read as bf16 has them below 2**-20 and spread over twenty. Nothing that was trained looks like either.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from apr_jax.converters.checkpoint.tensor import Tensor
from apr_jax.converters.errors import BrokenContainerError, RefusedError
from apr_jax.converters.formats.dtypes import DType, element_count

# Octaves of the histogram: |x| in [2**octave, 2**(octave + 1)). What lies outside goes to the first or the last bin.
LOWEST_OCTAVE, HIGHEST_OCTAVE = -25, 10
OCTAVES = range(LOWEST_OCTAVE, HIGHEST_OCTAVE + 1)
RELABEL_OCTAVES = range(-1, 2)
TINY_OCTAVE = -20

_CHUNK_BYTES = 1 << 20
_CHUNK_ELEMENTS = 1 << 18
_EXPONENT_SHIFT, _EXPONENT_MASK, _EXPONENT_BIAS = 52, 0x7FF, 1023


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What `measure` found. Moments, extremes and histogram are those of the finite values; NaN if there is none.

    Attributes:
      count: Elements.
      nans, infs: Elements that are NaN, that are infinite.
      zeros: Elements that are 0 or -0.
      mean: Their mean.
      std: Standard deviation of the population.
      minimum, maximum: Extremes.
      l2: Euclidean norm.
      rows: Vectors along the last axis of a tensor of at least two axes; 0 for vectors and scalars.
      dead_rows: Those of them in which every element is zero.
      histogram: Finite elements other than zero by octave of their magnitude, one count for each of `OCTAVES`.
    """

    count: int
    nans: int
    infs: int
    zeros: int
    mean: float
    std: float
    minimum: float
    maximum: float
    l2: float
    rows: int
    dead_rows: int
    histogram: tuple[int, ...]

    @property
    def relabel_share(self) -> float:
        """The share of all elements with a magnitude in [0.5, 4): there lie bf16 weights that are read as f16."""
        begin = RELABEL_OCTAVES.start - LOWEST_OCTAVE
        return sum(self.histogram[begin : begin + len(RELABEL_OCTAVES)]) / max(1, self.count)

    @property
    def tiny_share(self) -> float:
        """The share of all elements that are below 2**-20 and not zero: there lie f16 weights that are read as bf16."""
        return sum(self.histogram[: TINY_OCTAVE - LOWEST_OCTAVE]) / max(1, self.count)

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as plain JSON values; a moment that does not exist or is infinite is null."""
        fields = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in dataclasses.asdict(self).items()
        }
        counts = {"lowest_octave": LOWEST_OCTAVE, "counts": list(self.histogram)}
        return fields | {"histogram": counts, "relabel_share": self.relabel_share, "tiny_share": self.tiny_share}


def measure(tensor: Tensor, progress: Callable[[int], None] | None = None) -> Statistics:
    """Reads a tensor once and returns its statistics.

    Args:
      tensor: Of real numbers; quantised ones are decoded.
      progress: Called with the number of bytes read since the last call.

    Raises:
      RefusedError: Code "dtype-not-decoded": the type's values cannot be read, or are no real numbers.
      BrokenContainerError: Code "bool-value": a BOOL is neither 0 nor 1.
      StorageError: The file cannot be read.
    """
    accumulator = accumulate(tensor.dtype, tensor.shape)
    for values, nbytes in _chunks(tensor):
        accumulator.add(values)
        if progress is not None:
            progress(nbytes)
    try:
        return accumulator.result()
    except BrokenContainerError as error:
        error.file, error.tensor = tensor.source.path, tensor.name
        raise


def accumulate(dtype: DType, shape: tuple[int, ...]) -> PatternAccumulator | WideAccumulator:
    """Returns what adds up the values of a tensor, given to it as flat arrays, in order.

    Raises:
      RefusedError: Code "dtype-not-decoded": there are no real numbers.
    """
    if dtype.is_block:
        return WideAccumulator(shape)
    if dtype.numpy.kind == "c":
        raise RefusedError(
            f"values of type {dtype.name} are no real numbers",
            code="dtype-not-decoded",
            hint="It is listed without statistics, and converts bit for bit",
        )
    return PatternAccumulator(dtype, shape) if dtype.numpy.itemsize <= 2 else WideAccumulator(shape)


class _Rows:
    """Counts the rows without a value other than zero while the elements pass in order."""

    def __init__(self, shape: tuple[int, ...]):
        self.width = shape[-1] if len(shape) > 1 else 0
        self.count = element_count(shape) // self.width if self.width else 0
        self.dead = 0
        self._column = 0
        self._alive = False

    def add(self, size: int, zeros: int, is_zero: Callable[[], np.ndarray]) -> None:
        """Takes the next `size` elements, `zeros` of which are zero; which ones is asked for only if it matters."""
        if not self.width or not size:
            return
        first = min(size, -self._column % self.width)
        whole = (size - first) // self.width * self.width
        last = size - first - whole
        if zeros < min(length for length in (first, self.width, last) if length):
            # Too few to fill a row, or the part of one that begins or ends here.
            self._alive = True
            self._column = (self._column + size) % self.width
            return
        alive = ~is_zero()
        self._go_on(alive[:first])
        rows = alive[first : first + whole].reshape(-1, self.width)
        self.dead += len(rows) - int(np.count_nonzero(rows.any(axis=1)))
        self._go_on(alive[first + whole :])

    def _go_on(self, alive: np.ndarray) -> None:
        if not alive.size:
            return
        self._alive = bool(alive.any()) or (self._alive and self._column > 0)
        self._column = (self._column + alive.size) % self.width
        self.dead += self._column == 0 and not self._alive


class PatternAccumulator:
    """Statistics of a type of one or two bytes, from the number of times that each bit pattern occurs."""

    def __init__(self, dtype: DType, shape: tuple[int, ...]):
        self._dtype = dtype
        self._unsigned = np.dtype(f"<u{dtype.numpy.itemsize}")
        self._counts = np.zeros(1 << 8 * dtype.numpy.itemsize, np.int64)
        self._zeros = np.flatnonzero(_pattern_values(dtype.name, dtype.numpy) == 0)
        self._rows = _Rows(shape)

    def add(self, values: np.ndarray) -> None:
        """Takes the next elements, a flat array of the type's numpy dtype."""
        bits = values.view(self._unsigned)
        counts = np.bincount(bits, minlength=len(self._counts))
        self._counts += counts
        self._rows.add(bits.size, int(counts[self._zeros].sum()), lambda: self._is_zero(bits))

    def _is_zero(self, bits: np.ndarray) -> np.ndarray:
        # There are two zeros at most.
        found = bits == self._zeros[0]
        for pattern in self._zeros[1:]:
            found |= bits == pattern
        return found

    def result(self) -> Statistics:
        """Returns the statistics of all that was added."""
        present = np.flatnonzero(self._counts)
        if self._dtype.name == "bool" and present.size and present[-1] > 1:
            raise BrokenContainerError("a BOOL is neither 0 nor 1", code="bool-value")
        counts = self._counts[present]
        values = _pattern_values(self._dtype.name, self._dtype.numpy)[present]
        finite = np.isfinite(values)
        nans, infs = int(counts[np.isnan(values)].sum()), int(counts[np.isinf(values)].sum())
        values, counts = values[finite], counts[finite]
        number = int(counts.sum())
        histogram, zeros = np.zeros(_EXPONENT_MASK + 1, np.int64), int(counts[values == 0].sum())
        np.add.at(histogram, _exponents(values), counts)
        mean = std = l2 = math.nan
        if number:
            mean = float((values * counts).sum() / number)
            std = math.sqrt(float((np.square(values - mean) * counts).sum()) / number)
            l2 = math.sqrt(float((np.square(values) * counts).sum()))
        return Statistics(
            count=number + nans + infs,
            nans=nans,
            infs=infs,
            zeros=zeros,
            mean=mean,
            std=std,
            minimum=float(values.min()) if number else math.nan,
            maximum=float(values.max()) if number else math.nan,
            l2=l2,
            rows=self._rows.count,
            dead_rows=self._rows.dead,
            histogram=_octaves(histogram, zeros),
        )


class WideAccumulator:
    """Statistics of values that are wider than two bytes or were decoded from blocks, summed in float64."""

    def __init__(self, shape: tuple[int, ...]):
        self._rows = _Rows(shape)
        self._histogram = np.zeros(_EXPONENT_MASK + 1, np.int64)
        self._nans = self._infs = self._zeros = self._number = 0
        self._mean = self._squares = 0.0
        self._minimum, self._maximum = math.inf, -math.inf

    def add(self, values: np.ndarray) -> None:
        """Takes the next elements, a flat array of real numbers."""
        wide = values.astype(np.float64)
        zeros = wide.size - int(np.count_nonzero(wide))
        self._rows.add(wide.size, zeros, lambda: values == 0)
        with np.errstate(all="ignore"):
            if not math.isfinite(wide.sum()):
                wide = self._only_finite(wide)
            if not wide.size:
                return
            self._combine(wide)
        self._zeros += zeros
        self._minimum = min(self._minimum, float(wide.min()))
        self._maximum = max(self._maximum, float(wide.max()))
        self._histogram += np.bincount(_exponents(wide), minlength=len(self._histogram))

    def result(self) -> Statistics:
        """Returns the statistics of all that was added."""
        number = self._number
        return Statistics(
            count=number + self._nans + self._infs,
            nans=self._nans,
            infs=self._infs,
            zeros=self._zeros,
            mean=self._mean if number else math.nan,
            std=math.sqrt(self._squares / number) if number else math.nan,
            minimum=self._minimum if number else math.nan,
            maximum=self._maximum if number else math.nan,
            l2=math.sqrt(self._squares + number * self._mean * self._mean) if number else math.nan,
            rows=self._rows.count,
            dead_rows=self._rows.dead,
            histogram=_octaves(self._histogram, self._zeros),
        )

    def _only_finite(self, wide: np.ndarray) -> np.ndarray:
        nans = int(np.count_nonzero(np.isnan(wide)))
        finite = wide[np.isfinite(wide)]
        self._nans += nans
        self._infs += wide.size - finite.size - nans
        return finite

    def _combine(self, wide: np.ndarray) -> None:
        number = self._number + wide.size
        mean = float(wide.sum()) / wide.size
        deviations = wide - mean
        # The second term corrects for the rounding of the mean (Chan, Golub and LeVeque, 1983, equation 1.7).
        squares = float(np.einsum("i,i->", deviations, deviations)) - float(deviations.sum()) ** 2 / wide.size
        distance = mean - self._mean
        self._squares += squares + distance * distance * self._number * wide.size / number
        self._mean += distance * wide.size / number
        self._number = number


@functools.cache
def _pattern_values(name: str, dtype: np.dtype) -> np.ndarray:
    """Returns the value of every bit pattern of a type of one or two bytes, as float64."""
    bits = np.arange(1 << 8 * dtype.itemsize, dtype=f"<u{dtype.itemsize}")
    with np.errstate(invalid="ignore"):
        return bits.astype(np.float64) if name == "bool" else bits.view(dtype).astype(np.float64)


def _exponents(values: np.ndarray) -> np.ndarray:
    """Returns the biased exponents of float64 values: 0 for zero, which is no octave of the histogram."""
    return (values.view(np.int64) >> _EXPONENT_SHIFT) & _EXPONENT_MASK


def _octaves(exponents: np.ndarray, zeros: int) -> tuple[int, ...]:
    """Returns the histogram from the number of times that each biased exponent of float64 occurs."""
    counts = exponents.copy()
    counts[0] -= zeros
    begin, end = LOWEST_OCTAVE + _EXPONENT_BIAS, HIGHEST_OCTAVE + _EXPONENT_BIAS
    inner = counts[begin : end + 1]
    inner[0] += counts[:begin].sum()
    inner[-1] += counts[end + 1 :].sum()
    return tuple(inner.tolist())


def _chunks(tensor: Tensor) -> Iterator[tuple[np.ndarray, int]]:
    """Yields the values in order as flat arrays, each with its share of the bytes; the next may overwrite the last."""
    if not tensor.dtype.is_block:
        dtype = tensor.dtype.numpy
        for chunk in tensor.stream(_CHUNK_BYTES):
            yield np.frombuffer(chunk, dtype), len(chunk)
        return
    bytes_per_element = tensor.nbytes / max(1, element_count(tensor.shape))
    for part in _parts(tensor.shape):
        values = tensor.read(part).reshape(-1)
        yield values, round(values.size * bytes_per_element)


def _parts(shape: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """Yields slices that cut a tensor into pieces of bounded size, in C order."""
    if not shape or 0 in shape:
        if not shape:
            yield ()
        return
    inner = math.prod(shape[1:])
    if inner > _CHUNK_ELEMENTS:
        for row in range(shape[0]):
            for part in _parts(shape[1:]):
                yield (slice(row, row + 1), *part)
        return
    step = _CHUNK_ELEMENTS // inner
    for row in range(0, shape[0], step):
        yield (slice(row, min(row + step, shape[0])),)
