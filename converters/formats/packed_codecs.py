"""Values of the packed forms in which quantised checkpoints are published: codes, scales, zero points and a formula.

Whatever a library calls its tensors, a value is

    (code - zero point) * scale,

where the code is a number of a few bits (or an index into a table of 16, or a float of 8 bits) and scale and zero point
belong to a group of neighbours. `Grouped` decodes that; a function for each layout brings its tensors into the one
order that `Grouped` reads: rows of the weight [out, in], codes packed from the lowest bits of a byte on.

Values are float32: products of codes of at most 8 bits with half-precision scales are exact there, so that a library
which computes in half precision gives the same numbers rounded. Sources: qlinear of GPTQModel and AutoGPTQ (`pack`,
`dequantize_weight`, the zero point that version 1 stores less one); `awq/utils/packing_utils.py` of AutoAWQ;
`functional.py` of bitsandbytes; `compressors/*/base.py` of compressed-tensors; OCP Microscaling Formats 1.0 (E2M1).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Protocol

import numpy as np

# Values decoded at once: they are about what the second-level cache holds; with fewer, threads wait for each other.
_TILE = 1 << 17
# Position in an int32 of AWQ's gemm layout -> which of its 8 columns is there.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
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


@dataclasses.dataclass(frozen=True)
class Grouped:
    """Codes in rows, with a scale for each group of columns of some rows.

    Attributes:
      codes: uint8 [rows, bytes], or uint16 of two bytes each; int8 or uint8 [rows, columns] where they are the values
        themselves.
      table: float32 [256 or 65536, k]: the values of the k codes in one of them; None: the codes are their values.
      scales: float32 [ceil(rows / rows_per_scale), groups].
      columns: Values of one row; bytes that are left over are padding.
      group: Columns that share a scale, in order; the last group may be shorter.
      zeros: float32, shaped as the scales: taken from the codes' values before they are scaled; None: 0.
      rows_per_scale: Rows that share scales.
      group_of_column: int64 [columns], where the groups are not neighbours (act-order); `group` does not count then.
    """

    codes: np.ndarray
    table: np.ndarray | None
    scales: np.ndarray
    columns: int
    group: int
    zeros: np.ndarray | None = None
    rows_per_scale: int = 1
    group_of_column: np.ndarray | None = None

    @property
    def width(self) -> int:
        return self.columns

    def decode(self, first: int, last: int, out: np.ndarray) -> None:
        step = max(1, _TILE // max(1, self.columns))
        # One for all tiles: the system would give the pages of each new one anew.
        rows = min(step, last - first)
        indices = None if self.table is None else np.empty((rows, self.codes.shape[1]), np.intp)
        spread = None if self.group_of_column is None else np.empty((rows, self.columns), np.float32)
        with np.errstate(all="ignore"):
            for begin in range(first, last, step):
                end = min(begin + step, last)
                tile = out[begin - first : end - first]
                self._look_up(self.codes[begin:end], tile, indices)
                if self.zeros is not None:
                    self._apply(np.subtract, self.zeros, begin, end, tile, spread)
                self._apply(np.multiply, self.scales, begin, end, tile, spread)

    def _look_up(self, codes: np.ndarray, out: np.ndarray, indices: np.ndarray | None) -> None:
        if self.table is None or indices is None:
            out[:] = codes
        else:
            indices = indices[: len(codes)]
            indices[:] = codes
            if codes.shape[1] * self.table.shape[1] == self.columns:
                target = out.reshape(*codes.shape, self.table.shape[1])
                np.take(self.table, indices, axis=0, out=target, mode="clip")
            else:
                out[:] = np.take(self.table, indices, axis=0).reshape(len(codes), -1)[:, : self.columns]

    def _apply(
        self,
        operation: np.ufunc,
        per_group: np.ndarray,
        begin: int,
        end: int,
        out: np.ndarray,
        spread: np.ndarray | None,
    ) -> None:
        if self.rows_per_scale == 1:
            rows = per_group[begin:end]
        else:
            rows = per_group[np.arange(begin, end) // self.rows_per_scale]
        if rows.shape[1] == 1:
            operation(out, rows, out=out)
        elif self.group_of_column is not None and spread is not None:
            # "wrap" costs least; no index is out of range.
            np.take(rows, self.group_of_column, axis=1, out=spread[: len(rows)], mode="wrap")
            operation(out, spread[: len(rows)], out=out)
        elif self.columns % self.group:
            operation(out, np.repeat(rows, self.group, axis=1)[:, : self.columns], out=out)
        else:
            grouped = out.reshape(end - begin, -1, self.group)
            operation(grouped, rows[:, :, None], out=grouped)


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


# --- tables: byte -> the values of its codes


def integers(bits: int, offset: int = 0) -> np.ndarray:
    """Returns float32 [256, 8 // bits]: codes of 1, 2, 4 or 8 bits from the lowest bit on, less an offset."""
    bytes_ = np.arange(256)[:, None]
    return ((bytes_ >> np.arange(0, 8, bits) & (1 << bits) - 1) - offset).astype(np.float32)


def indexed(values: np.ndarray, high_first: bool) -> np.ndarray:
    """Returns float32 [256, 2]: each half of a byte is an index into 16 values."""
    bytes_ = np.arange(256)
    halves = (bytes_ >> 4, bytes_ & 15) if high_first else (bytes_ & 15, bytes_ >> 4)
    return np.stack([np.asarray(values, np.float32)[half] for half in halves], 1)


def e2m1() -> np.ndarray:
    """Returns float32 [256, 2]: floats of 4 bits, the lower half of a byte first."""
    return indexed(np.array([*_E2M1, *(-value for value in _E2M1)]), high_first=False)


@functools.cache
def floats(dtype: np.dtype, pairs: bool = False) -> np.ndarray:
    """Returns float32 [256, 1]: floats of 8 bits; or float32 [65536, 2]: two of them, looked up at once."""
    values = np.arange(256).astype(np.uint8).view(dtype).astype(np.float32)
    if not pairs:
        return values[:, None]
    return np.stack([np.tile(values, 256), np.repeat(values, 256)], 1)


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
    codes, table = _byte_codes(np.ascontiguousarray(qweight.T), bits, inputs)
    if zeros_less_one and bits in _ONES:
        # As GPTQModel does it: what one field borrowed from the next when 1 was taken is given back.
        qzeros = qzeros + np.uint32(_ONES[bits])
    zeros = unpacked(qzeros, bits, scales.shape[1])
    if zeros_less_one and bits not in _ONES:
        zeros = zeros + 1 & (1 << bits) - 1
    if table is not None and (zeros == zeros[0, 0]).all():
        # As symmetric quantisation has them: one pass less.
        return Grouped(
            codes, table - np.float32(zeros[0, 0]), _f32(scales.T), inputs, group, group_of_column=group_of_column
        )
    return Grouped(codes, table, _f32(scales.T), inputs, group, zeros=_f32(zeros.T), group_of_column=group_of_column)


def awq(qweight: np.ndarray, qzeros: np.ndarray, scales: np.ndarray, group: int) -> Grouped:
    """AWQ's gemm layout: eight outputs of one input share an int32, in an order of their own.

    Args:
      qweight: uint32 [in, out / 8].
      qzeros: uint32 [groups, out / 8].
      scales: Any float [groups, out].
      group: Inputs that share a scale.
    """
    codes = _awq_columns(qweight)
    return Grouped(codes, None, _f32(scales.T), codes.shape[1], group, zeros=_f32(_awq_columns(qzeros)))


def _awq_columns(packed: np.ndarray) -> np.ndarray:
    """Returns uint8 [8 * words, rows] from uint32 [rows, words]."""
    words = np.ascontiguousarray(packed.T)
    out = np.empty((words.shape[0], 8, words.shape[1]), np.uint8)
    step = max(1, _TILE // (4 * max(1, words.shape[1])))
    for first in range(0, len(words), step):
        tile, into = words[first : first + step], out[first : first + step]
        for position in range(0, 8, 2):
            pair = (tile >> np.uint32(4 * position)).astype(np.uint8)
            np.bitwise_and(pair, 15, out=into[:, _AWQ_ORDER[position]])
            np.right_shift(pair, 4, out=into[:, _AWQ_ORDER[position + 1]])
    return out.reshape(-1, words.shape[1])


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
    codes, table = _byte_codes(words, bits, columns)
    half = 1 << bits - 1
    if zeros is None and table is not None:
        table = table - np.float32(half)
    elif zeros is None:
        codes = (codes ^ 128 if bits == 8 else codes - half).view(np.int8)
    else:
        zeros = _f32(unpacked(np.ascontiguousarray(zeros.T), bits, len(words)).T)
    return Grouped(codes, table, _f32(scales), columns, group, zeros=zeros)


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
    return Grouped(rows, indexed(code, high_first=True), _f32(absmax)[:, None], block, block)


def nested_absmax(codes: np.ndarray, code: np.ndarray, absmax: np.ndarray, block: int, offset: float) -> np.ndarray:
    """Returns the float32 scales that bitsandbytes' double quantisation stores as codes of 8 bits."""
    scales = np.repeat(_f32(absmax), block)[: codes.size]
    return np.asarray(_f32(code)[codes] * scales + np.float32(offset), np.float32)


def int8_rows(codes: np.ndarray, absmax: np.ndarray) -> Grouped:
    """LLM.int8: uint8 [rows, columns] (int8 bytes), float32 [rows]: the largest magnitude of each row."""
    scales = (_f32(absmax) * _INT8_STEP)[:, None]
    return Grouped(codes.view(np.int8), None, scales, codes.shape[1], codes.shape[1])


def _byte_codes(words: np.ndarray, bits: int, columns: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns codes and table as `Grouped` has them, from rows of densely packed little-endian words."""
    if 8 % bits:
        return unpacked(words, bits, columns).astype(np.uint8), None
    codes = words.view(np.uint8).reshape(len(words), -1)
    return (codes[:, :columns], None) if bits == 8 else (codes, integers(bits))


def unpacked(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Returns the first `count` codes of each row of densely packed words, uint32 [rows, words], as int64."""
    words = np.ascontiguousarray(words)
    starts = np.arange(count) * bits
    at, shift = starts // 32, (starts % 32).astype(np.uint64)
    # A code may begin in one word and end in the next.
    following = np.minimum(at + 1, words.shape[1] - 1)
    pairs = words[:, at].astype(np.uint64) | words[:, following].astype(np.uint64) << np.uint64(32)
    return np.asarray((pairs >> shift & np.uint64((1 << bits) - 1)).astype(np.int64))


def _f32(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, np.float32)
