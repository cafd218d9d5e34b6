"""One tensor of a checkpoint: where its bytes lie, and how they are read, whole, by rows or as values."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from apr_jax.converters.errors import AprJaxError, BrokenContainerError, RefusedError
from apr_jax.converters.formats.dtypes import DType, element_count
from apr_jax.converters.storage.source import SourceFile

if TYPE_CHECKING:
    import numpy as np

_ALIGNMENT = 64
_PART_BYTES = 1 << 20
# Values decoded at once: they and their blocks stay in the second-level cache while codecs go over them.
_DECODED_BYTES = 1 << 19


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor:
    """One tensor, not read yet.

    Attributes:
      name: Its name in the checkpoint.
      dtype: Its element type.
      shape: Dimensions, outermost first; the data are in C order.
      nbytes: Bytes of its data.
      source: The file that holds them.
      offset: Where in that file they begin; need not be aligned.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    nbytes: int
    source: SourceFile
    offset: int

    @property
    def written_as(self) -> DType:
        """The type in which a conversion writes it unless another one is asked for."""
        return self.dtype

    def readinto(self, buffer: bytearray | memoryview) -> None:
        """Reads all bytes into a writable, C-contiguous buffer of exactly `nbytes` bytes (of an array: its u1 view).

        Raises:
          ValueError: The buffer has another size.
          StorageError: The file cannot be read.
        """
        view = memoryview(buffer)
        if view.nbytes != self.nbytes:
            raise ValueError(f"tensor {self.name!r} has {self.nbytes} bytes, the buffer {view.nbytes}")
        if self.nbytes:
            self.readinto_at(0, view)

    def readinto_at(self, begin: int, buffer: bytearray | memoryview) -> None:
        """Fills the whole buffer with the tensor's bytes from number `begin` on, as many as it has room for.

        Raises:
          StorageError: The file cannot be read.
        """
        try:
            self.source.readinto_at(self.offset + begin, buffer)
        except AprJaxError as error:
            error.tensor = self.name
            raise

    def stream(self, chunk_bytes: int = 1 << 20) -> Iterator[memoryview]:
        """Yields the bytes in order, in chunks; every chunk is overwritten by the next one.

        Raises:
          StorageError: The file cannot be read.
        """
        buffer = memoryview(bytearray(min(chunk_bytes, self.nbytes)))
        for begin in range(0, self.nbytes, chunk_bytes):
            chunk = buffer[: min(chunk_bytes, self.nbytes - begin)]
            self.readinto_at(begin, chunk)
            yield chunk

    def raw(self, rows: slice | None = None) -> bytes:
        """Returns the bytes as they stand in the file, of all or of some rows of axis 0.

        Raises:
          ValueError: The tensor is a scalar, or the slice has a step.
          RefusedError: Code "rows-not-addressable", if blocks or packed elements run across rows.
          StorageError: The file cannot be read.
        """
        begin, end = 0, self.nbytes
        if rows is not None:
            first, last = _bounds(rows, self._rows())
            width = self._row_bytes()
            begin, end = first * width, last * width
        data = bytearray(end - begin)
        self.readinto_at(begin, memoryview(data))
        return bytes(data)

    def read(self, slices: tuple[slice, ...] | None = None) -> np.ndarray:
        """Returns the values, or a rectangular part of them, as an array with memory of its own.

        Args:
          slices: One slice per axis from the first on, without steps; missing ones mean the whole axis.

        Returns:
          An array of the type's numpy or ml_dtypes dtype (quantised: float32), in C order, aligned to 64 bytes.

        Raises:
          ValueError: More slices than axes, or a slice with a step.
          RefusedError: Code "dtype-not-decoded" for packed types, and quantised ones that nothing here decodes.
          BrokenContainerError: Code "bool-value", if a BOOL is neither 0 nor 1.
          StorageError: The file cannot be read.
        """
        dtype = self._values_dtype()
        bounds = [_bounds(part, size) for part, size in zip(slices or (), self.shape, strict=False)]
        if slices is not None and len(slices) > len(self.shape):
            raise ValueError(f"tensor {self.name!r} has {len(self.shape)} axes, {len(slices)} slices were given")
        bounds += [(0, size) for size in self.shape[len(bounds) :]]
        values = _empty(tuple(end - begin for begin, end in bounds), dtype)
        if values.size:
            self._read_part(values, bounds)
        return self._checked(values)

    def values(self, elements: int = 1 << 18) -> Iterator[np.ndarray]:
        """Yields the values in C order, as flat arrays with memory of their own.

        Args:
          elements: About how many values an array has; a padded row of a K-quant is never divided.

        Raises:
          As `read`.
        """
        count = element_count(self.shape)
        unit = self.dtype.padded_columns(self.shape, self.nbytes) or self.dtype.block_elements
        step = max(1, elements // unit) * unit
        for begin in range(0, count, step):
            yield self.read_flat(begin, min(begin + step, count))

    def read_flat(self, begin: int, end: int) -> np.ndarray:
        """Returns the values number `begin` to `end` in C order, flat; of a row-padded K-quant only whole rows.

        Raises:
          As `read`.
        """
        values = _empty((end - begin,), self._values_dtype())
        if values.size:
            self._read_range(values, begin)
        return self._checked(values)

    def decode_into(self, values: np.ndarray) -> None:
        """Decodes all of a quantised tensor into float32 of its shape, contiguous: `read` without an array of its own.

        Raises:
          As `read`.
        """
        self._values_dtype()
        self._read_range(values.reshape(-1), 0)

    def _values_dtype(self) -> np.dtype:
        try:
            if not self.dtype.is_block:
                return self.dtype.numpy
            _ = self.dtype.codec
        except AprJaxError as error:
            error.file, error.tensor = self.source.path, self.name
            raise
        import numpy as np

        return np.dtype(np.float32)

    def _checked(self, values: np.ndarray) -> np.ndarray:
        if self.dtype.name == "bool" and (values.view("u1") > 1).any():
            raise BrokenContainerError(
                "a BOOL is neither 0 nor 1", code="bool-value", file=self.source.path, tensor=self.name
            )
        return values

    def _read_part(self, values: np.ndarray, bounds: Sequence[tuple[int, int]]) -> None:
        width = element_count(self.shape[1:])
        if list(self.shape[1:]) == [end - begin for begin, end in bounds[1:]]:
            self._read_range(values.reshape(-1), bounds[0][0] * width if bounds else 0)
            return
        # Whole rows are read and cut, some at a time: one system call for each piece of each row would cost more.
        step = max(1, _PART_BYTES // (width * values.itemsize))
        inner = tuple(slice(begin, end) for begin, end in bounds[1:])
        first, last = bounds[0]
        rows = _empty((min(step, last - first), *self.shape[1:]), values.dtype)
        for row in range(first, last, step):
            part = rows[: min(step, last - row)]
            self._read_range(part.reshape(-1), row * width)
            values[row - first : row - first + len(part)] = part[(slice(None), *inner)]

    def _read_range(self, values: np.ndarray, begin: int) -> None:
        """Reads the flat `values` from element `begin` on; of a row-padded K-quant only whole rows."""
        if not self.dtype.is_block:
            self.readinto_at(begin * values.itemsize, _bytes_of(values))
            return
        columns = self.dtype.padded_columns(self.shape, self.nbytes)
        if columns is None:
            self._decode_flat(values, begin)
        else:
            self._decode_rows(values.reshape(-1, columns), begin // columns)

    def _decode_flat(self, values: np.ndarray, begin: int) -> None:
        """Decodes blocks that run on across rows; `begin` may be amid one."""
        elements, end = self.dtype.block_elements, begin + values.size
        step = max(1, _DECODED_BYTES // (4 * elements)) * elements
        data = self._buffer(min(step, values.size + elements))
        for low in range(begin // elements * elements, end, step):
            high = min(low + step, end)
            skipped = max(0, begin - low)
            if not skipped:
                self._decode_blocks(values[low - begin : high - begin], low // elements, data)
                continue
            part = _empty((high - low,), values.dtype)
            self._decode_blocks(part, low // elements, data)
            values[: high - begin] = part[skipped:]

    def _decode_rows(self, values: np.ndarray, first: int) -> None:
        """Decodes rows that are padded to whole blocks each."""
        elements = self.dtype.block_elements
        blocks = -(-values.shape[1] // elements)
        step = max(1, _DECODED_BYTES // (4 * elements * blocks))
        padded = _empty((min(step, len(values)), blocks * elements), values.dtype)
        data = self._buffer(padded.size)
        for row in range(0, len(values), step):
            part = padded[: min(step, len(values) - row)]
            self._decode_blocks(part.reshape(-1), (first + row) * blocks, data)
            values[row : row + len(part)] = part[:, : values.shape[1]]

    def _buffer(self, values: int) -> memoryview:
        """Returns memory for the prefix and the blocks of so many values, to be used again and again."""
        blocks = -(-values // self.dtype.block_elements)
        return memoryview(bytearray(self.dtype.codec.prefix_bytes + blocks * self.dtype.block_bytes))

    def _decode_blocks(self, values: np.ndarray, first: int, buffer: memoryview) -> None:
        """Decodes all values of blocks from number `first` on, but for the last ones of the last block."""
        codec, width = self.dtype.codec, self.dtype.block_bytes
        prefix = codec.prefix_bytes
        blocks = -(-values.size // self.dtype.block_elements)
        data = buffer[: prefix + blocks * width]
        self.readinto_at(0, data[:prefix])
        self.readinto_at(prefix + first * width, data[prefix:])
        codec.decode(data, values)

    def _rows(self) -> int:
        if not self.shape:
            raise ValueError(f"tensor {self.name!r} is a scalar and has no rows")
        return self.shape[0]

    def _row_bytes(self) -> int:
        if 0 in self.shape:
            return 0
        sizes = self.dtype.sizes(self.shape[1:])
        for size in sizes:
            if size * self.shape[0] == self.nbytes:
                return size
        raise RefusedError(
            f"rows of {self.dtype.name} {list(self.shape)} cannot be read one by one: they share blocks",
            code="rows-not-addressable",
            file=self.source.path,
            tensor=self.name,
            hint="`convert --dequantise` writes it dense, so that they can",
        )


def _bounds(part: slice, size: int) -> tuple[int, int]:
    begin, end, step = part.indices(size)
    if step != 1:
        raise ValueError(f"slices cannot have steps, got {part}")
    return begin, max(begin, end)


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns an array aligned to 64 bytes, as JAX needs it to take it over without a copy."""
    import numpy as np

    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    memory = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + nbytes].view(dtype).reshape(shape)


def _bytes_of(values: np.ndarray) -> memoryview:
    return values.reshape(-1).view("u1").data
