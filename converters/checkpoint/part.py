"""Rows and columns of a tensor as a tensor of its own: what one of several devices reads of a weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from apr_jax.converters.checkpoint.decoded import DecodedTensor
from apr_jax.converters.checkpoint.tensor import Tensor
from apr_jax.converters.formats import dtypes

# Two pieces of a file are read with what lies between them if that is less: a call for each would cost more.
_GAP_BYTES = 1 << 10
_SCRATCH_BYTES = 1 << 20


def part_of(tensor: Tensor, slices: Sequence[slice]) -> Tensor:
    """Returns a rectangular part of a tensor, not read yet.

    Of the file it reads the bytes that the part consists of: of rows that are cut their pieces, of quantised tensors
    their blocks. Where a block lies across the cut, or the tensor is computed from others, whole rows are decoded and
    cut; such a part of a quantised tensor is float32.

    Args:
      tensor: Of one axis or two.
      slices: One for each axis, without steps.

    Returns:
      A tensor of the part's shape, under the same name; the tensor itself if the part is all of it.
    """
    bounds = [part.indices(size)[:2] for part, size in zip(slices, tensor.shape, strict=True)]
    shape = tuple(end - begin for begin, end in bounds)
    if shape == tensor.shape:
        return tensor
    # A vector is one row.
    *rows, columns = tensor.shape
    (first, last), (left, right) = ((0, 1), *bounds) if not rows else bounds
    unit, width = tensor.dtype.block_elements, tensor.dtype.block_bytes
    in_rows = not rows or not columns % unit or tensor.dtype.padded_columns(tensor.shape, tensor.nbytes) is not None
    cut_amid = left % unit or (right % unit and right != columns)
    computed = isinstance(tensor, DecodedTensor) and (left, right) != (0, columns)
    if not in_rows or cut_amid or computed:
        return _values_of(tensor, shape, bounds)
    pitch, piece = -(-columns // unit) * width, -(-(right - left) // unit) * width
    begin, count = first * pitch + left // unit * width, last - first
    if piece == pitch:
        piece, pitch, count = count * pitch, count * pitch, 1
    prefix = tensor.dtype.codec.prefix_bytes if tensor.dtype.is_block else 0
    place = (tensor.source, tensor.offset, tensor, prefix, begin, pitch, piece)
    return _Pieces(tensor.name, tensor.dtype, shape, prefix + piece * count, *place)


@dataclasses.dataclass(frozen=True, eq=False)
class _Pieces(Tensor):
    """A part that consists of whole blocks: pieces of rows, all of one length.

    Attributes:
      whole: The tensor.
      prefix: Bytes at the beginning of the tensor that every part of it begins with.
      begin: Where behind them the first piece stands.
      pitch: From there to the next piece.
      piece: Bytes of one.
    """

    whole: Tensor
    prefix: int
    begin: int
    pitch: int
    piece: int

    def readinto_at(self, begin: int, buffer: bytearray | memoryview) -> None:
        view = memoryview(buffer).cast("B")
        if begin < self.prefix:
            shared = view[: self.prefix - begin]
            self.whole.readinto_at(begin, shared)
            view, begin = view[len(shared) :], begin + len(shared)
        begin -= self.prefix
        while view:
            row, within = divmod(begin, self.piece)
            rows = len(view) // self.piece if self.pitch - self.piece < _GAP_BYTES else 1
            if rows > 1 and not within:
                read = self._read_through(row, rows, view)
            else:
                read = min(self.piece - within, len(view))
                self.whole.readinto_at(self.prefix + self.begin + row * self.pitch + within, view[:read])
            view, begin = view[read:], begin + read

    def _read_through(self, row: int, rows: int, view: memoryview) -> int:
        """Reads pieces with what lies between them, as many as fit some scratch memory; returns how many bytes."""
        import numpy as np

        rows = max(1, min(rows, _SCRATCH_BYTES // self.pitch))
        scratch = np.empty(rows * self.pitch, np.uint8)
        # Behind the last piece the file may end.
        self.whole.readinto_at(
            self.prefix + self.begin + row * self.pitch, scratch[: (rows - 1) * self.pitch + self.piece].data
        )
        pieces = np.frombuffer(view[: rows * self.piece], np.uint8).reshape(rows, self.piece)
        pieces[:] = scratch.reshape(rows, self.pitch)[:, : self.piece]
        return rows * self.piece


@dataclasses.dataclass(frozen=True, eq=False)
class _Values(Tensor):
    """A part that is cut out of decoded values, some rows at a time.

    Attributes:
      whole: The tensor.
      bounds: First and last of each axis.
    """

    whole: Tensor
    bounds: tuple[tuple[int, int], ...]

    def readinto_at(self, begin: int, buffer: bytearray | memoryview) -> None:
        view = memoryview(buffer).cast("B")
        width = max(1, self.nbytes // max(1, self.shape[0]))
        offset = self.bounds[0][0]
        step = max(1, _SCRATCH_BYTES // width)
        while view:
            row, within = divmod(begin, width)
            last = min(self.shape[0], row + step)
            slices = (slice(offset + row, offset + last), *(slice(*each) for each in self.bounds[1:]))
            data = self.whole.read(slices).reshape(-1).view("u1").data[within : within + len(view)]
            view[: len(data)] = data
            view, begin = view[len(data) :], begin + len(data)


def _values_of(tensor: Tensor, shape: tuple[int, ...], bounds: Sequence[tuple[int, int]]) -> Tensor:
    dtype = dtypes.by_name("f32") if tensor.dtype.is_block else tensor.dtype
    nbytes = dtype.nbytes(shape)
    return _Values(tensor.name, dtype, shape, nbytes, tensor.source, tensor.offset, tensor, tuple(bounds))
