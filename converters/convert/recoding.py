"""Casts from and to quantised types, some values at a time, and how far a quantised tensor is from its source.

Values are decoded to float32 (or cast to it), and encoded as `apr import --quantize` does. Every piece is independent
of the others, so that several threads can work on one tensor in constant memory.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from apr_jax.converters.checkpoint.distance import Sums
from apr_jax.converters.checkpoint.tensor import Tensor
from apr_jax.converters.errors import RefusedError
from apr_jax.converters.formats import casts, codecs, dtypes
from apr_jax.converters.formats.dtypes import DType

_PIECE_ELEMENTS = 1 << 16
# AprQ8 has one scale for the whole tensor: as blocks of the report count runs of as many values as a K-quant has.
_RUN_ELEMENTS = 256


@dataclasses.dataclass(frozen=True)
class QuantisationError:
    """How far the values of a quantised tensor are from those that it was made from.

    Attributes:
      sums: Over all values, the source as a and the result as b; elements alone are counted, not which of them differ.
      worst_first: The position of the first value of the block with the largest relative L2 error, in C order.
      worst_relative_l2: That error.
    """

    sums: Sums
    worst_first: int
    worst_relative_l2: float

    @property
    def cosine(self) -> float:
        """The cosine of the angle between both; 0 where quantising left zeros alone."""
        return self.sums.cosine or 0.0

    def __add__(self, other: QuantisationError) -> QuantisationError:
        worst = max(other, self, key=lambda error: (error.worst_relative_l2, -error.worst_first))
        return dataclasses.replace(worst, sums=self.sums + other.sums)

    def to_note(self) -> list[Any]:
        """Returns it as JSON values from which `from_note` makes the very same."""
        return [vars(self.sums), self.worst_first, self.worst_relative_l2]

    @classmethod
    def from_note(cls, note: list[Any]) -> QuantisationError:
        """Makes it from what `to_note` returned."""
        return cls(Sums(**note[0]), *note[1:])

    def to_json(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """Returns the figures as plain JSON values; `shape` is the tensor's."""
        figures = {"relative_l2": self.sums.relative_l2, "cosine": self.cosine, "max_abs": self.sums.max_abs}
        return {name: _finite(value) for name, value in figures.items()} | {
            "worst_block": {
                "begins_at": [int(at) for at in np.unravel_index(self.worst_first, shape)],
                "relative_l2": _finite(self.worst_relative_l2),
            }
        }


def _finite(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


class Recoding:
    """The cast of one tensor from or to a quantised type.

    Attributes:
      tensor: The source.
      target: The type to cast to.
    """

    def __init__(self, tensor: Tensor, target: DType):
        self.tensor = tensor
        self.target = target
        self._columns = target.padded_columns(tensor.shape, target.encoded_nbytes(tensor.shape))
        self._encoder = target.codec if target.is_block else None
        self._prefix = b""

    def prepare(self) -> None:
        """Reads the source once where the encoding of any value depends on all of them; imports what threads need."""
        if not self.tensor.dtype.is_block:
            _ = self.tensor.dtype.numpy
        if isinstance(self._encoder, codecs.Encoder) and self._encoder.prefix_bytes and 0 not in self.tensor.shape:
            largest = np.float32(0)
            for values in self.tensor.values():
                largest = max(largest, np.abs(self._as_f32(values)[0]).max())
            self._prefix = self._encoder.prefix(largest)

    def pieces(self) -> Iterator[tuple[int, int, int, int]]:
        """Yields (first value, end, offset, bytes): pieces of the source, and where in the output each belongs."""
        source = self.tensor.dtype.padded_columns(self.tensor.shape, self.tensor.nbytes) or 1
        group = _RUN_ELEMENTS if self.target.block_elements == 1 else self.target.block_elements
        unit = math.lcm(source, self._columns or group)
        step = max(1, _PIECE_ELEMENTS // unit) * unit
        count = dtypes.element_count(self.tensor.shape)
        for first in range(0, count, step):
            end = min(first + step, count)
            begin, stop = (self._offset(at) for at in (first, end))
            yield first, end, begin if first else 0, stop - (begin if first else 0)

    def _offset(self, element: int) -> int:
        prefix = self._encoder.prefix_bytes if self._encoder else 0
        per_block = self.target.block_elements
        blocks = -(-element // per_block)
        if self._columns is not None:
            blocks = element // self._columns * -(-self._columns // per_block)
        return prefix + blocks * self.target.block_bytes

    def recode(self, first: int, end: int) -> tuple[bytes | memoryview, casts.Damage, QuantisationError | None]:
        """Returns the bytes of a piece, what the cast did to its values, and, if quantised, how far they moved.

        Raises:
          RefusedError: Code "cast-non-finite": NaN and infinities have no quantised form.
        """
        values, damage = self._as_f32(self.tensor.read_flat(first, end))
        if self._encoder is not None:
            return self._quantise(values, first, damage)
        if self.target.name == "f32":
            return values.data.cast("B"), damage, None
        written, narrowed = casts.cast(values.data.cast("B"), "f32", self.target.name)
        return written, damage + narrowed, None

    def _as_f32(self, values: np.ndarray) -> tuple[np.ndarray, casts.Damage]:
        if values.dtype == np.float32:
            return values, casts.Damage()
        written, damage = casts.cast(values.view("u1").data, self.tensor.dtype.name, "f32")
        return np.frombuffer(written, "<f4"), damage

    def _quantise(
        self, values: np.ndarray, first: int, damage: casts.Damage
    ) -> tuple[bytes, casts.Damage, QuantisationError]:
        encoder, per_block = self._encoder, self.target.block_elements
        assert isinstance(encoder, codecs.Encoder)
        if not np.isfinite(values).all():
            raise RefusedError(
                f"NaN and infinities cannot be quantised to {self.target.name}",
                code="cast-non-finite",
                file=self.tensor.source.path,
                tensor=self.tensor.name,
                hint="Give this tensor a floating-point type with a later --cast NAME=TYPE",
            )
        padded = codecs.pad_rows(values, self._columns, per_block)
        blocks = encoder.encode(padded, self._prefix)
        decoded = np.empty(padded.size, np.float32)
        encoder.decode(self._prefix + blocks, decoded)
        if self._columns is not None:
            # What stands behind the end of a row means nothing.
            decoded.reshape(-1, -(-self._columns // per_block) * per_block)[:, self._columns :] = 0
        overflowed = int(np.count_nonzero(~np.isfinite(decoded)))
        written = (b"" if first else self._prefix) + blocks
        return written, damage + casts.Damage(overflowed=overflowed), self._error(padded, decoded, first)

    def _error(self, source: np.ndarray, result: np.ndarray, first: int) -> QuantisationError:
        """Compares values, rows padded with zeros on both sides, that begin at element `first` of the tensor."""
        group = self.target.block_elements if self.target.block_elements > 1 else _RUN_ELEMENTS
        x, q = (np.pad(values, (0, -values.size % group)).reshape(-1, group) for values in (source, result))
        with np.errstate(all="ignore"):
            x = x.astype(np.float64)
            moved = q - x
            # Sums block by block; einsum, since BLAS would start threads of its own beside ours.
            errors, sizes, crossed = (np.einsum("ij,ij->i", a, b) for a, b in ((moved, moved), (x, x), (x, moved)))
            relative = np.sqrt(np.divide(errors, sizes, out=np.zeros_like(errors), where=sizes > 0))
            error, size, cross = (float(sums.sum()) for sums in (errors, sizes, crossed))
            max_abs = float(max(moved.max(), -moved.min()))
        worst = int(np.argmax(relative))
        at = worst * group
        if self._columns is not None:
            row, block = divmod(worst, -(-self._columns // group))
            at = row * self._columns + block * group
        # q = x + moved, so that |q|^2 and q x follow from the three sums.
        sums = Sums(
            elements=source.size, aa=size, bb=size + 2 * cross + error, ab=size + cross, dd=error, max_abs=max_abs
        )
        return QuantisationError(sums, first + at, float(relative[worst]))
