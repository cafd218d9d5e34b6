"""Original and suspect of one name side by side: where they differ, and whether a hypothesis explains that.

The original is looked at as it would be in the suspect's type. A hypothesis says which bits it expects; it is held
against a sample of the differing elements first, and then against every element.

Elements are handled as bits, unsigned integers of the suspect's width: equal means equal bits, or NaN on both sides.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np

from apr_jax.converters.checkpoint.tensor import Tensor
from apr_jax.converters.errors import RefusedError
from apr_jax.converters.formats import casts, dtypes

Bits = np.ndarray[Any, np.dtype[Any]]
Select = slice | np.ndarray
# The bits that a hypothesis expects in the suspect, at a slice or at an array of flat indices.
Predict = Callable[[Select], Bits]

SAMPLE = 2048
# Below this share a hypothesis is dropped: the rest would be a second mishap in the same tensor.
ACCEPTED = 0.95
# What is computed from so many elements stays in the second-level cache.
_CHUNK = 1 << 16
_SAMPLED_CHUNKS = 128
# Signs that agree in half of the sampled elements, give or take three standard deviations, when so many are compared.
_BY_CHANCE, _SIGNS = 0.03, 1024
_ALIKE, _FIRST_SIGNS = 0.9, 32


@dataclasses.dataclass(frozen=True)
class Payload:
    """All elements of a tensor in memory, as bits.

    Attributes:
      bits: Flat, unsigned integers.
      dtype: What they mean: the tensor's type, or f32 where it had to be decoded, or u8 where it cannot be decoded.
      decoded: Whether the bits are decoded values and not the file's bytes.
    """

    bits: Bits
    dtype: dtypes.DType
    decoded: bool = False


class Scratch(threading.local):
    """Memory that every thread uses again for the next pair: new pages cost more than reading into old ones."""

    def __init__(self) -> None:
        self._held: dict[str, np.ndarray] = {}

    def take(self, use: str, nbytes: int) -> np.ndarray:
        """Returns bytes of any content; what was taken for the same use before is gone."""
        held = self._held.get(use)
        if held is None or held.size < nbytes:
            self._held.pop(use, None)
            held = self._held[use] = np.empty(nbytes, "u1")
        return held[:nbytes]


def load(tensor: Tensor, into: np.ndarray | None = None) -> Payload:
    """Reads a tensor; quantised ones are decoded to f32.

    Args:
      tensor: The tensor.
      into: Memory for its bytes, of their size; new memory if None.

    Raises:
      StorageError: The file cannot be read.
    """
    if tensor.dtype.is_block:
        try:
            values = np.ascontiguousarray(tensor.read(), "<f4").reshape(-1)
            return Payload(values.view("<u4"), dtypes.TYPES["f32"], decoded=True)
        except RefusedError:
            return Payload(read_bytes(tensor), dtypes.TYPES["u8"])
    width = element_bytes(tensor.dtype)
    if width is None:
        return Payload(read_bytes(tensor), dtypes.TYPES["u8"])
    return Payload(read_bytes(tensor, into).view(f"<u{width}"), tensor.dtype)


def read_bytes(tensor: Tensor, into: np.ndarray | None = None) -> Bits:
    """Returns the bytes of a tensor as they stand in its file."""
    data = np.empty(tensor.nbytes, "u1") if into is None else into
    tensor.readinto(data.data)
    return data


def element_bytes(dtype: dtypes.DType) -> int | None:
    """Returns the bytes of one element, or None if elements do not fill whole bytes by themselves."""
    if dtype.bits is None or dtype.numpy_name is None:
        return None
    return dtype.bits // 8


# --- values


def values_of(bits: Bits, name: str) -> np.ndarray:
    """Returns the values of bits: f64 where f32 cannot hold them (f64, wide integers), else f32."""
    if name == "bf16":
        wide = bits.astype("<u4")
        wide <<= np.uint32(16)
        return wide.view("<f4")
    if name in ("f32", "f64"):
        return bits.view(f"<f{bits.itemsize}")
    return bits.view(numpy_type(name)).astype("<f8" if name in ("i32", "u32", "i64", "u64") else "<f4")


def bits_of(values: np.ndarray, name: str, rounding: str = "nearest-even") -> Bits:
    """Rounds f32 or f64 values to a type.

    Args:
      values: The values.
      name: A floating-point or integer type.
      rounding: "nearest-even", "truncated" (towards zero) or "half-away" (to nearest, ties away from zero).
    """
    with np.errstate(all="ignore"):
        bits = _nearest_even(values, name)
        if rounding == "nearest-even" or name not in casts.FLOATS or not bits.size:
            return bits
        # The bits of floats are sign and magnitude, so one less in the bits is one step towards zero.
        wide = values.astype("<f8", copy=False)
        cut = bits - (np.abs(values_of(bits, name).astype("<f8")) > np.abs(wide)).astype(bits.dtype)
        if rounding == "truncated":
            return cut
        above = values_of(cut + bits.dtype.type(1), name).astype("<f8")
        middle = (values_of(cut, name).astype("<f8") + above) / 2
        return np.where(np.abs(wide) >= np.abs(middle), cut + bits.dtype.type(1), cut)


def _nearest_even(values: np.ndarray, name: str) -> Bits:
    if name == "bf16" and values.dtype.itemsize == 4:
        wide = values.view("<u4")
        rounded = wide >> np.uint32(16)
        rounded &= np.uint32(1)
        rounded += np.uint32(0x7FFF)
        rounded += wide
        rounded >>= np.uint32(16)
        out = rounded.astype("<u2")
        if values.size and np.isnan(values.max()):
            out[np.isnan(values)] = 0x7FC0
        return out
    if name == "bf16":
        data, _ = casts.cast(values.astype("<f8", copy=False).tobytes(), "f64", "bf16")
        return np.frombuffer(data, "<u2").copy()
    numpy = numpy_type(name)
    return values.astype(numpy, copy=False).view(f"<u{numpy.itemsize}")


def numpy_type(name: str) -> np.dtype[Any]:
    """Returns the numpy type of a type's name."""
    return dtypes.TYPES[name].numpy


def cast_bits(bits: Bits, source: str, target: str, rounding: str = "nearest-even") -> Bits:
    """Casts elements from one type to another."""
    return bits if source == target else bits_of(values_of(bits, source), target, rounding)


def is_nan(bits: Bits, name: str) -> np.ndarray:
    """Returns where elements are NaN."""
    if name in ("f16", "bf16", "f32", "f64"):
        width, fraction = bits.itemsize * 8, {"f16": 10, "bf16": 7, "f32": 23, "f64": 52}[name]
        magnitude = bits & bits.dtype.type((1 << (width - 1)) - 1)
        return magnitude > bits.dtype.type(((1 << (width - 1 - fraction)) - 1) << fraction)
    if name.startswith("f8"):
        return np.isnan(values_of(bits, name))
    return np.zeros(bits.shape, bool)


def half_ulp(values: np.ndarray, name: str) -> np.ndarray:
    """Returns half the distance between neighbours of f64 values in a floating-point type."""
    info = ml_dtypes.finfo(numpy_type(name))
    exponent = np.maximum(np.frexp(values)[1] - 1, int(info.minexp))
    return np.ldexp(0.5, exponent - int(info.nmant))


# --- the pair


class Pair:
    """The original and the suspect under one name.

    Attributes:
      a, b: The tensors: original and suspect.
      original, suspect: What they hold.
      as_bytes: Whether elements are bytes of blocks instead of values.
      same_count: Whether they have equally many elements; the rest needs it.
      x: The original in the suspect's type, rounded to nearest even where it does not fit; flat bits.
      y: The suspect; flat bits.
    """

    def __init__(self, a: Tensor, b: Tensor, *, as_bytes: bool = False, scratch: Scratch | None = None):
        """Reads both; as they stand in the files, byte by byte, if asked to.

        Args:
          a, b: The tensors.
          as_bytes: Whether to take bytes for elements.
          scratch: Memory to be used; no other pair of this thread may use it meanwhile.

        Raises:
          StorageError: A file cannot be read.
        """
        self.a, self.b = a, b
        self.as_bytes = as_bytes
        if as_bytes:
            self.original, self.suspect = (Payload(read_bytes(tensor), dtypes.TYPES["u8"]) for tensor in (a, b))
        else:
            scratch = scratch or Scratch()
            self.original = load(a, scratch.take("original", a.nbytes))
            self.suspect = load(b, scratch.take("suspect", b.nbytes))
        self._scratch = scratch
        self.y = self.suspect.bits
        self.type = self.suspect.dtype.name
        self.same_count = self.original.bits.size == self.y.size and (
            a.shape == b.shape or math.prod(a.shape) == math.prod(b.shape)
        )

    @functools.cached_property
    def x(self) -> Bits:
        source = self.original.dtype.name
        if source == self.type:
            return self.original.bits
        out = np.empty(self.original.bits.size, self.y.dtype)
        for part in self.chunks(out.size, 1):
            out[part] = cast_bits(self.original.bits[part], source, self.type)
        return out

    @property
    def size(self) -> int:
        return int(self.y.size)

    @property
    def has_elements(self) -> bool:
        """Whether its elements are the tensors', and not bytes that stand for what nothing here decodes."""
        sides = ((self.a, self.original), (self.b, self.suspect))
        return all(payload.bits.size == math.prod(tensor.shape) for tensor, payload in sides)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the suspect: axis 0 and the rest; a vector has rows of one element."""
        if not self.b.shape:
            return 1, self.size
        if self.size % max(1, self.b.shape[0]):
            return self.size, 1  # bytes of blocks that run on across rows
        return self.b.shape[0], self.size // self.b.shape[0] if self.b.shape[0] else 0

    @functools.cached_property
    def _differences(self) -> tuple[np.ndarray, np.ndarray, int]:
        """Where elements differ, up to SAMPLE indices of such, evenly spread, and how many there are."""
        mask = (self._scratch or Scratch()).take("mask", self.size).view(bool)
        counts = []
        for part in self.chunks(self.size, 1):
            np.not_equal(self.x[part], self.y[part], out=mask[part])
            count = int(np.count_nonzero(mask[part]))
            if count and self.original.dtype.name != self.type:
                mask[part] &= ~(is_nan(self.x[part], self.type) & is_nan(self.y[part], self.type))
                count = int(np.count_nonzero(mask[part]))
            counts.append(count)
        total = sum(counts)
        parts = [part for part, count in zip(self.chunks(self.size, 1), counts, strict=True) if count]
        if len(parts) > _SAMPLED_CHUNKS and total > SAMPLE:
            parts = [parts[index * len(parts) // _SAMPLED_CHUNKS] for index in range(_SAMPLED_CHUNKS)]
        quota = -(-SAMPLE // max(1, len(parts)))
        found = [part.start + _spread(mask[part], quota) for part in parts]
        return mask, np.concatenate(found) if found else np.empty(0, np.int64), total

    @property
    def differs(self) -> np.ndarray:
        return self._differences[0]

    @property
    def sample(self) -> np.ndarray:
        return self._differences[1]

    @property
    def differing(self) -> int:
        return self._differences[2]

    @functools.cached_property
    def unrelated(self) -> bool:
        """Whether the suspect has the original's signs only as often as chance gives them.

        Then nothing of the original is left: no cast, factor, quantised type or merged adapter brings that about. Signs
        and no correlation: a single huge value says nothing here. Where rows are shifted against each other (those of a
        quantised type that were filled up, and read as if they were not), the first one still has its own.
        """
        told, agreement = self._signs(self.sample)
        begun, alike = self._signs(slice(0, self.shape[1]))
        begins_alike = begun >= _FIRST_SIGNS and alike >= _ALIKE
        return told >= _SIGNS and abs(agreement - 0.5) <= _BY_CHANCE and not begins_alike

    def _signs(self, select: Select) -> tuple[int, float]:
        """How many values have a sign on both sides, and the share of those that have the same."""
        before, after = (
            np.sign(values_of(bits[select], name))
            for bits, name in ((self.original.bits, self.original.dtype.name), (self.y, self.type))
        )
        product = before * after
        told = int(np.count_nonzero(np.abs(product) == 1))
        return told, np.count_nonzero(product == 1) / max(1, told)

    @staticmethod
    def chunks(size: int, columns: int) -> Iterator[slice]:
        """Yields slices of whole rows that cover `size` elements."""
        step = max(1, _CHUNK // max(1, columns)) * max(1, columns)
        for begin in range(0, size, step):
            yield slice(begin, min(size, begin + step))

    def equal(self, expected: Bits, select: Select) -> np.ndarray:
        """Returns where the suspect is as expected."""
        found = self.y[select]
        equal = expected == found
        if self.suspect.dtype.is_float and not equal.all():
            nan = is_nan(found, self.type)
            if nan.any():
                equal |= nan & is_nan(expected, self.type)
        return equal

    def plausible(self, predict: Predict) -> bool:
        """Returns whether a hypothesis holds on the sample of differing elements."""
        # A small part first: most hypotheses end here.
        for select in (self.sample[:: max(1, self.sample.size // 64)], self.sample):
            hits = np.count_nonzero(self.equal(predict(select), select))
            if hits < ACCEPTED * select.size:
                return False
        return True

    def explained(self, predict: Predict, columns: int = 1) -> float:
        """Returns the share of the differing elements that are as expected, over all elements; 0.0 if it is not enough.

        An element that does not differ and should, counts against it.

        Args:
          predict: The hypothesis.
          columns: Slices given to it are multiples of this.
        """
        hits = missed = 0
        allowed = (1 - ACCEPTED) * self.differing
        for part in self.chunks(self.size, columns):
            differs = self.differs[part]
            equal = self.equal(predict(part), part)
            wrong = equal.size - int(np.count_nonzero(equal))
            hits += int(np.count_nonzero(equal & differs if wrong else differs))
            missed += wrong
            if missed > allowed:
                return 0.0
        return hits / self.differing if self.differing else 0.0


def _spread(mask: np.ndarray, quota: int) -> np.ndarray:
    """Returns up to so many indices at which a mask is set, from its whole length."""
    found = np.flatnonzero(mask[::16]) * 16
    if len(found) < quota:
        found = np.flatnonzero(mask)
    return found[np.arange(min(quota, len(found))) * len(found) // max(1, min(quota, len(found)))]
