"""A matrix whose parts lie in several files, as each of several devices has written its own: read like one file.

Zarr 2, not compressed: file I.J holds rows I * r to (I + 1) * r and columns J * c to (J + 1) * c of a matrix that is
cut into equal parts of r x c. A vector is cut into rows alone.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import threading
from collections.abc import Sequence

from apr_jax.converters.errors import BrokenContainerError, StorageError
from apr_jax.converters.storage.source import SourceFile, changed

# What is read at once and then taken apart into rows.
_SCRATCH_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """One of the files, as it was when the matrix was opened."""

    path: str
    size: int
    stamp: tuple[int, int]


class ChunkedFile(SourceFile):
    """The files of one matrix. Its bytes are those of the matrix in C order.

    A model of 7B saved from 8 devices has thousands of such files, more than a process may have open: each is opened
    when it is read, and has to be what it was at the beginning.
    """

    def __init__(self, folder: str, shape: Sequence[int], chunks: Sequence[int], element_bytes: int):
        """Looks at every file.

        Args:
          folder: Where they are.
          shape: Of the matrix; one axis or more, of which only the first two are cut.
          chunks: Shape of a part; divides `shape`.
          element_bytes: Of an element.

        Raises:
          MissingFileError, RefusedError, StorageError: As `SourceFile`.
          BrokenContainerError: Code "prepared-size": a file has another size.
        """
        self.path = folder
        self.links = 1
        self.bytes_read = 0
        self._counting = threading.Lock()
        inner = math.prod(shape[2:]) * element_bytes
        columns = shape[1] if len(shape) > 1 else 1
        self._pitch = columns * inner
        self._piece = (chunks[1] if len(shape) > 1 else 1) * inner
        self._rows = chunks[0]
        self.size = shape[0] * self._pitch
        self._across = self._pitch // self._piece
        grid = [range(whole // part) for whole, part in zip(shape, chunks, strict=True)]
        names = (".".join(map(str, place)) for place in itertools.product(*grid))
        self._chunks = [self._looked_at(os.path.join(folder, name)) for name in names]

    def _looked_at(self, path: str) -> _Chunk:
        with SourceFile(path) as source:
            if source.size != self._rows * self._piece:
                raise BrokenContainerError(
                    "a part of a parameter has another size",
                    code="prepared-size",
                    file=path,
                    found=f"{source.size} bytes",
                    expected=f"{self._rows * self._piece} bytes",
                )
            return _Chunk(path, source.size, source.stamp)

    def readinto_at(self, offset: int, buffer: bytearray | memoryview) -> None:
        view = memoryview(buffer).cast("B")
        if offset + len(view) > self.size:
            raise StorageError("the file ends before the data does", code="short-read", file=self.path, offset=offset)
        while view:
            row, column = divmod(offset, self._pitch)
            rows = min(len(view) // self._pitch, self._rows - row % self._rows)
            if self._across > 1 and (column or not rows):
                read = self._read_piece(row, column, view)
            else:
                read = self._read_rows(row, column, view, rows)
            view, offset = view[read:], offset + read

    def _read_piece(self, row: int, column: int, view: memoryview) -> int:
        """Reads what one file holds of a row from byte `column` on; returns how much."""
        across, within = divmod(column, self._piece)
        part = view[: self._piece - within]
        self._read(row, across, row % self._rows * self._piece + within, part)
        return len(part)

    def _read_rows(self, row: int, column: int, view: memoryview, rows: int) -> int:
        """Reads whole rows of one row of files, or, where a file holds whole rows, as much as it has."""
        if self._across == 1:
            begin = row % self._rows * self._pitch + column
            part = view[: self._rows * self._pitch - begin]
            self._read(row, 0, begin, part)
            return len(part)
        rows = min(rows, max(1, _SCRATCH_BYTES // self._piece))
        scratch = memoryview(bytearray(rows * self._piece))
        for across in range(self._across):
            self._read(row, across, row % self._rows * self._piece, scratch)
            for number in range(rows):
                to = number * self._pitch + across * self._piece
                view[to : to + self._piece] = scratch[number * self._piece : (number + 1) * self._piece]
        return rows * self._pitch

    def _read(self, row: int, across: int, offset: int, part: memoryview) -> None:
        chunk = self._chunks[row // self._rows * self._across + across]
        with SourceFile(chunk.path) as source:
            _check(chunk, source)
            source.readinto_at(offset, part)
        with self._counting:
            self.bytes_read += len(part)

    def read_at(self, offset: int, nbytes: int) -> bytearray:
        data = bytearray(nbytes)
        self.readinto_at(offset, data)
        return data

    def check_unchanged(self) -> None:
        for chunk in self._chunks:
            with SourceFile(chunk.path) as source:
                _check(chunk, source)

    def close(self) -> None:
        """Nothing stays open."""


def _check(chunk: _Chunk, source: SourceFile) -> None:
    if source.stamp != chunk.stamp:
        raise changed(chunk.path, source.size, chunk.size)
