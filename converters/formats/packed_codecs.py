"""Values of the packed forms in which quantised checkpoints are published: codes, scales, zero points and a formula.

Whatever a library calls its tensors, a value is

    (code - zero point) * scale,

where the code is a number of a few bits (or an index into a table of 16, or a float of 8 bits) and scale and zero point
belong to a group of neighbours. `Grouped` decodes that from rows of the weight [out, in], some at a time; a class of
`Codes` for each way to pack gives it their numbers.

Values are float32: products of codes of at most 8 bits with half-precision scales are exact there, so that a library
which computes in half precision gives the same numbers rounded. Sources: qlinear of GPTQModel and AutoGPTQ (`pack`,
`dequantize_weight`, the zero point that version 1 stores less one); `awq/utils/packing_utils.py` of AutoAWQ;
`functional.py` of bitsandbytes; `compressors/*/base.py` of compressed-tensors; OCP Microscaling Formats 1.0 (E2M1).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Protocol

import numpy as np

# Values decoded at once: they are about what the second-level cache holds; with fewer, threads wait for each other.
_TILE = 1 << 17
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# What makes int8 codes of bitsandbytes fractions of the largest magnitude of a row; its own float literal.
_INT8_STEP = np.float32(7.874015718698502e-3)
# AWQ's and GPTQ's packed zero points of version 1 are stored less one, field by field.
_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


class Decoder(Protocol):
    """What turns the parts of a packed tensor into its values.

    Attributes:
      width: Values of one row; a decoder may see the tensor in other rows than it has.
    """

    @property
    def width(self) -> int: ...

    def decode(self, first: int, last: int, out: np.ndarray) -> None:
        """Writes rows `first` to `last` into `out`, float32 [rows, width], contiguous."""


class Codes(Protocol):
    """The codes of a packed tensor as numbers.

    Attributes:
      columns: Values of one row.
    """

    @property
    def columns(self) -> int: ...

    def tiles(self, first: int, last: int, step: int, out: np.ndarray) -> Iterator[np.ndarray]:
        """Yields rows `first` to `last`, so many at a time, a multiple of 8.

        Whole numbers are int8 or uint8 [rows, columns], in memory that the next tile overwrites or the file's own;
        others are written into the rows of `out`, float32, where they belong.
        """


@dataclasses.dataclass(frozen=True)
class Whole:
    """Numbers as they are: int8 or uint8 [rows, columns]."""

    codes: np.ndarray

    @property
    def columns(self) -> int:
        return int(self.codes.shape[1])

    def tiles(self, first: int, last: int, step: int, out: np.ndarray) -> Iterator[np.ndarray]:
        for begin in range(first, last, step):
            yield self.codes[begin : min(begin + step, last)]


@dataclasses.dataclass(frozen=True)
class Packed:
    """Numbers of few bits, packed densely from the lowest bits of each word on.

    Attributes:
      words: uint32 [rows, words], not necessarily contiguous.
      bits: 1, 2, 4 or 8.
      columns: Values of one row; bytes that are left over are padding.
      offset: Taken from each of them; what is left fits int8.
    """

    words: np.ndarray
    bits: int
    columns: int
    offset: int = 0

    def tiles(self, first: int, last: int, step: int, out: np.ndarray) -> Iterator[np.ndarray]:
        rows = min(step, last - first)
        words = np.empty((rows, self.words.shape[1]), "<u4")
        spread = _Spread(self.bits, words.nbytes)
        for begin in range(first, last, step):
            here = words[: min(step, last - begin)]
            # A transposition, where codes are packed along the inputs.
            np.copyto(here, self.words[begin : begin + len(here)])
            numbers = spread(here.reshape(-1).view(np.uint8)).reshape(len(here), -1)
            if self.offset:
                numbers -= np.uint8(self.offset)
            signed = self.offset or self.bits < 8
            yield (numbers.view(np.int8) if signed else numbers)[:, : self.columns]


@dataclasses.dataclass(frozen=True)
class Eights:
    """AWQ's gemm layout: numbers of 4 bits, those of eight rows in one word, in an order of their own.

    Attributes:
      words: uint32 [columns, ceil(rows / 8)], as they stand in the file.
    """

    words: np.ndarray

    @property
    def columns(self) -> int:
        return int(self.words.shape[0])

    def tiles(self, first: int, last: int, step: int, out: np.ndarray) -> Iterator[np.ndarray]:
        most = -(-min(step, last - first) // 8) + 1
        turned = np.empty((most, self.columns), "<u4")
        pairs = np.empty((most, 2, 2, self.columns), np.uint8)
        numbers = np.empty((most, 2, 2, 2, self.columns), np.uint8)
        for begin in range(first, last, step):
            end = min(begin + step, last)
            low, high = begin // 8, -(-end // 8)
            np.copyto(turned[: high - low], self.words[:, low:high].T)
            # The halves of byte 2 j + k of a word belong to its rows j + 4 k and j + 4 k + 2.
            there = pairs[: high - low]
            bytes_ = turned[: high - low].view(np.uint8).reshape(high - low, self.columns, 2, 2)
            np.copyto(there, bytes_.transpose(0, 3, 2, 1))
            np.bitwise_and(there, 15, out=numbers[: high - low, :, 0])
            np.right_shift(there, 4, out=numbers[: high - low, :, 1])
            yield numbers.reshape(-1, self.columns)[begin - 8 * low : end - 8 * low].view(np.int8)


@dataclasses.dataclass(frozen=True)
class Table:
    """Numbers that are looked up, all of a byte or of two at once.

    Attributes:
      codes: uint8 or uint16 [rows, codes].
      values: float32 [256 or 65536, k]: the numbers that one of them stands for.
    """

    codes: np.ndarray
    values: np.ndarray

    @property
    def columns(self) -> int:
        return int(self.codes.shape[1] * self.values.shape[1])

    def tiles(self, first: int, last: int, step: int, out: np.ndarray) -> Iterator[np.ndarray]:
        indices = np.empty((min(step, last - first), self.codes.shape[1]), np.intp)
        width = self.values.shape[1]
        for begin in range(first, last, step):
            end = min(begin + step, last)
            here, target = indices[: end - begin], out[begin - first : end - first]
            np.copyto(here, self.codes[begin:end])
            np.take(self.values, here, axis=0, out=target.reshape(*here.shape, width), mode="clip")
            yield target


class _Spread:
    """Brings the fields of bytes into bytes of their own."""

    def __init__(self, bits: int, most: int):
        """Takes the bits of a field, and the most bytes that there will be at once."""
        # Bits of a field once bytes are halved so far -> memory for pairs of bytes, and for what is moved in them.
        self._halved: dict[int, np.ndarray] = {}
        width = 8
        while width > bits:
            width //= 2
            self._halved[width] = np.empty((2, most), "<u2")
            most *= 2

    def __call__(self, fields: np.ndarray) -> np.ndarray:
        """Returns uint8, 8 / bits for each of `fields`, uint8; the next call overwrites them."""
        for width, (pairs, moved) in self._halved.items():
            pairs, moved = pairs[: fields.size], moved[: fields.size]
            np.copyto(pairs, fields)
            # The upper field goes into the next byte.
            np.left_shift(pairs, np.uint16(8 - width), out=moved)
            np.bitwise_or(pairs, moved, out=pairs)
            np.bitwise_and(pairs, np.uint16(((1 << width) - 1) * 0x0101), out=pairs)
            fields = pairs.view(np.uint8)
        return fields


@dataclasses.dataclass(frozen=True)
class Grouped:
    """Codes in rows, with a scale for each group of columns of some rows.

    Attributes:
      codes: The codes.
      scales: float32 [ceil(rows / rows_per_scale), groups].
      group: Columns that share a scale, in order; the last group may be shorter.
      zeros: Shaped as the scales: taken from the codes before they are scaled, in their own type, which holds the
        differences: int8, int16 or float32; None: 0.
      rows_per_scale: Rows that share scales.
      group_of_column: int64 [columns], where the groups are not neighbours (act-order); `group` does not count then.
    """

    codes: Codes
    scales: np.ndarray
    group: int
    zeros: np.ndarray | None = None
    rows_per_scale: int = 1
    group_of_column: np.ndarray | None = None

    @property
    def width(self) -> int:
        return self.codes.columns

    def decode(self, first: int, last: int, out: np.ndarray) -> None:
        step = max(1, _TILE // max(1, 8 * self.width)) * 8
        # Memory for all tiles: the system would give the pages of each new one anew.
        shape = min(step, last - first), self.width
        types = {out.dtype} if self.zeros is None else {out.dtype, self.zeros.dtype}
        spread = {} if self.group_of_column is None else {kind: np.empty(shape, kind) for kind in types}
        differences = out if self.zeros is None else np.empty(shape, self.zeros.dtype)
        begin = first
        with np.errstate(all="ignore"):
            for numbers in self.codes.tiles(first, last, step, out):
                rows = len(numbers)
                tile = out[begin - first : begin - first + rows]
                for operation, per_group in ((np.subtract, self.zeros), (np.multiply, self.scales)):
                    if per_group is None:
                        continue
                    values = tile if per_group.dtype == tile.dtype else differences[:rows]
                    if numbers.dtype != tile.dtype:
                        np.copyto(values, numbers)
                    self._apply(operation, per_group, begin, values, spread.get(per_group.dtype))
                    numbers = values
                begin += rows

    def _apply(
        self, operation: np.ufunc, per_group: np.ndarray, begin: int, values: np.ndarray, spread: np.ndarray | None
    ) -> None:
        """Applies the numbers of the groups to rows from `begin` on, in place."""
        height, end = self.rows_per_scale, begin + len(values)
        if height > 1:
            for block in range(begin // height, -(-end // height)):
                rows = values[max(0, block * height - begin) : (block + 1) * height - begin]
                operation(rows, self._repeated(per_group[block : block + 1]), out=rows)
            return
        per_group = per_group[begin:end]
        if self.group_of_column is not None and spread is not None:
            # "wrap" costs least; no index is out of range.
            spread = np.take(per_group, self.group_of_column, axis=1, out=spread[: len(values)], mode="wrap")
            operation(values, spread, out=values)
        elif self.width % self.group or per_group.shape[1] == 1:
            operation(values, self._repeated(per_group), out=values)
        else:
            grouped = values.reshape(len(values), -1, self.group)
            operation(grouped, per_group[:, :, None], out=grouped)

    def _repeated(self, per_group: np.ndarray) -> np.ndarray:
        """Returns the numbers of groups, [rows, groups], for each column, or the one that all of a row share."""
        if per_group.shape[1] == 1:
            return per_group
        return np.repeat(per_group, self.group, axis=1)[:, : self.width]


@dataclasses.dataclass(frozen=True)
class Sum:
    """Two factors and what their product is added to: base + scale * (b @ a), rows scaled afterwards; all float32.

    Attributes:
      base: [rows, columns].
      a: [rank, columns].
      b: [rows, rank].
      scale: Of the product.
      lengths: [rows]: the Euclidean length that each row is brought to; None: rows stay as they are.
    """

    base: np.ndarray
    a: np.ndarray
    b: np.ndarray
    scale: float
    lengths: np.ndarray | None = None

    @property
    def width(self) -> int:
        return int(self.base.shape[1])

    def decode(self, first: int, last: int, out: np.ndarray) -> None:
        np.matmul(self.b[first:last], self.a, out=out)
        out *= np.float32(self.scale)
        out += self.base[first:last]
        if self.lengths is not None:
            out *= (self.lengths[first:last] / np.linalg.norm(out, axis=1))[:, None]


# --- numbers of few bits


def packed(words: np.ndarray, bits: int, columns: int, offset: int = 0) -> Codes:
    """Returns the codes of rows of densely packed words, uint32 [rows, words], less an offset; see `Packed`."""
    if 8 % bits == 0:
        return Packed(words, bits, columns, offset)
    return Whole((unpacked(words, bits, columns) - offset).astype(np.int8))


def fits_int8(bits: int, zero: int) -> bool:
    """Whether codes less a zero point do."""
    return (1 << bits) - 1 - zero < 128 and zero <= 128


def unpacked(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Returns the first `count` codes of each row of densely packed words, uint32 [rows, words], as int16."""
    words = np.ascontiguousarray(words, "<u4")
    if 8 % bits == 0:
        codes = _Spread(bits, words.nbytes)(words.reshape(-1).view(np.uint8))
        return codes.reshape(len(words), -1)[:, :count].astype(np.int16)
    starts = np.arange(count) * bits
    at, shift = starts // 32, (starts % 32).astype(np.uint64)
    # A code may begin in one word and end in the next.
    following = np.minimum(at + 1, words.shape[1] - 1)
    pairs = words[:, at].astype(np.uint64) | words[:, following].astype(np.uint64) << np.uint64(32)
    return (pairs >> shift & np.uint64((1 << bits) - 1)).astype(np.int16)


def indexed(values: np.ndarray, high_first: bool) -> np.ndarray:
    """Returns float32 [256, 2]: each half of a byte is an index into 16 values."""
    bytes_ = np.arange(256)
    halves = (bytes_ >> 4, bytes_ & 15) if high_first else (bytes_ & 15, bytes_ >> 4)
    return np.stack([np.asarray(values, np.float32)[half] for half in halves], 1)


def four_bit_floats(data: np.ndarray) -> Table:
    """E2M1, uint8 [rows, bytes]: two to a byte, the lower half first."""
    values = indexed(np.array([*_E2M1, *(-value for value in _E2M1)]), high_first=False)
    return Table(data, values)


def eight_bit_floats(data: np.ndarray, dtype: np.dtype) -> Table:
    """Floats of 8 bits, uint8 [rows, columns], looked up in pairs where they can."""
    in_pairs = data.shape[1] % 2 == 0
    return Table(data.view("<u2") if in_pairs else data, _floats8(dtype, in_pairs))


@functools.cache
def _floats8(dtype: np.dtype, pairs: bool) -> np.ndarray:
    values = np.arange(256).astype(np.uint8).view(dtype).astype(np.float32)
    return np.stack([np.tile(values, 256), np.repeat(values, 256)], 1) if pairs else values[:, None]


# --- layouts


def gptq(
    qweight: np.ndarray,
    qzeros: np.ndarray,
    scales: np.ndarray,
    bits: int,
    group: int,
    group_of_column: np.ndarray | None,
    zeros_less_one: bool,
) -> Grouped:
    """GPTQ: codes packed along the inputs, zero points along the outputs.

    Args:
      qweight: uint32 [in * bits / 32, out].
      qzeros: uint32 [groups, out * bits / 32].
      scales: Any float [groups, out].
      bits: 2, 3, 4 or 8.
      group: Inputs that share a scale.
      group_of_column: As `Grouped`: `g_idx`.
      zeros_less_one: Whether zero points are stored less one (version 1 of the format), not as they are (version 2).
    """
    inputs = qweight.shape[0] * 32 // bits
    if zeros_less_one and bits in _ONES:
        # As GPTQModel does it: what one field borrowed from the next when 1 was taken is given back.
        qzeros = qzeros + np.uint32(_ONES[bits])
    zeros = unpacked(qzeros, bits, scales.shape[1]).T
    if zeros_less_one and bits not in _ONES:
        zeros = zeros + 1 & (1 << bits) - 1
    alike = int(zeros[0, 0])
    if not (zeros == alike).all() or not fits_int8(bits, alike):
        return Grouped(
            packed(qweight.T, bits, inputs), _f32(scales.T), group, _zeros(zeros, bits), group_of_column=group_of_column
        )
    # As symmetric quantisation has them.
    return Grouped(packed(qweight.T, bits, inputs, alike), _f32(scales.T), group, group_of_column=group_of_column)


def awq(qweight: np.ndarray, qzeros: np.ndarray, scales: np.ndarray, group: int) -> Grouped:
    """AWQ's gemm layout: eight outputs of one input share an int32, in an order of their own.

    Args:
      qweight: uint32 [in, out / 8].
      qzeros: uint32 [groups, out / 8].
      scales: Any float [groups, out].
      group: Inputs that share a scale.
    """
    outputs = scales.shape[1]
    (zeros,) = Eights(qzeros).tiles(0, outputs, outputs, np.empty(0))
    return Grouped(Eights(qweight), _f32(scales.T), group, zeros)


def packed_rows(
    words: np.ndarray, bits: int, columns: int, scales: np.ndarray, group: int, zeros: np.ndarray | None
) -> Grouped:
    """compressed-tensors' pack-quantized: codes of each row densely packed, 2 ** (bits - 1) above the signed number.

    Args:
      words: uint32 [rows, words].
      bits: 1 to 8.
      columns: Values of one row.
      scales: Any float [rows or 1, groups].
      group: Columns that share a scale.
      zeros: uint32 [ceil(rows * bits / 32), groups], packed along the rows; None: the numbers are symmetric.
    """
    if zeros is None:
        return Grouped(packed(words, bits, columns, 1 << bits - 1), _f32(scales), group)
    zeros = unpacked(zeros.T, bits, len(words)).T
    return Grouped(packed(words, bits, columns), _f32(scales), group, _zeros(zeros, bits))


def _zeros(zeros: np.ndarray, bits: int) -> np.ndarray:
    return np.ascontiguousarray(zeros, np.int8 if bits < 7 else np.int16)


def bitsandbytes(data: np.ndarray, code: np.ndarray, absmax: np.ndarray, block: int) -> Grouped:
    """NF4 and FP4: blocks run on over the flattened tensor, the upper half of a byte first.

    Args:
      data: uint8 [ceil(n / 2)].
      code: float32 [16].
      absmax: float32 [ceil(n / block)].
      block: Values that share a scale, an even number.
    """
    if data.size == absmax.size * block // 2:
        rows = data.reshape(absmax.size, block // 2)
    else:
        rows = np.zeros((absmax.size, block // 2), np.uint8)
        rows.reshape(-1)[: data.size] = data
    return Grouped(Table(rows, indexed(code, high_first=True)), _f32(absmax)[:, None], block)


def nested_absmax(codes: np.ndarray, code: np.ndarray, absmax: np.ndarray, block: int, offset: float) -> np.ndarray:
    """Returns the float32 scales that bitsandbytes' double quantisation stores as codes of 8 bits."""
    scales = np.repeat(_f32(absmax), block)[: codes.size]
    return np.asarray(_f32(code)[codes] * scales + np.float32(offset), np.float32)


def int8_rows(codes: np.ndarray, absmax: np.ndarray) -> Grouped:
    """LLM.int8: uint8 [rows, columns] (int8 bytes), float32 [rows]: the largest magnitude of each row."""
    return Grouped(Whole(codes.view(np.int8)), (_f32(absmax) * _INT8_STEP)[:, None], codes.shape[1])


def _f32(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, np.float32)
