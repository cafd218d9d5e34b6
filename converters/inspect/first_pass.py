"""One pass over the files of a checkpoint: checksum, padding, and a first look at the values of every tensor.

The pass costs little more than reading and summing the bytes. For each floating-point tensor it finds, of all
elements, how many are zero and the largest magnitude (and so whether any is NaN or infinite), and of a sample the mean,
the standard deviation and the shares that betray a relabelled type. Whoever finds something suspicious in that measures
the tensor (`statistics.measure`) before saying so.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from apr_jax.converters.checkpoint.checkpoint import Checkpoint
from apr_jax.converters.checkpoint.tensor import Tensor
from apr_jax.converters.inspect import statistics
from apr_jax.converters.storage.crc import crc32, crc32_combine
from apr_jax.converters.storage.source import SourceFile
from apr_jax.converters.storage.workers import Workers, at_once

# Long enough that the interpreter hardly shows, short enough for the caches.
_CHUNK_BYTES = 1 << 20
_BLOCK_BYTES = 32 << 20
# Of a matrix this many bytes are sampled, at the beginning of each so many.
_SAMPLE_BYTES, _SAMPLED_BYTES = 1 << 14, 16 << 20
_MAX_THREADS = 4
_INFINITIES = {"f16": 0x7C00, "bf16": 0x7F80, "f32": 0x7F80_0000, "f64": 0x7FF0_0000_0000_0000}

Progress = Callable[[int], None]


@dataclasses.dataclass
class Glance:
    """What the pass saw of one tensor.

    Attributes:
      count: Elements.
      zeros: Elements that are 0 or -0.
      finite: Whether no element is NaN or infinite.
      magnitude: The largest magnitude; infinite or NaN if not finite.
      sample: Statistics of a part of a matrix; of nothing for vectors.
    """

    count: int
    zeros: int
    finite: bool
    magnitude: float
    sample: statistics.Statistics


@dataclasses.dataclass(frozen=True)
class Screening:
    """What the pass found.

    Attributes:
      glances: Name -> what was seen of a tensor, for every tensor of plain floating-point numbers.
      crc: CRC-32 of an `.apr` file up to its footer; None for others.
      hidden: (offset, the tensor before it or None) of the first byte of padding that is not zero; None if all are.
    """

    glances: dict[str, Glance]
    crc: int | None
    hidden: tuple[int, str | None] | None


def screen(checkpoint: Checkpoint, progress: Progress | None = None) -> Screening:
    """Reads every file of a checkpoint once, an `.apr` from its first byte to the footer, others where tensors are.

    Args:
      checkpoint: An open checkpoint.
      progress: Called with numbers of bytes read, from any thread.

    Raises:
      StorageError: A file cannot be read.
    """
    looks = {name: _Look(tensor) for name, tensor in checkpoint.tensors.items() if tensor.dtype.name in _INFINITIES}
    reader = _Reader(_blocks(checkpoint), looks, checkpoint.kind == "apr", progress)
    at_once(reader.work, min(_MAX_THREADS, len(os.sched_getaffinity(0))))
    crc = None
    if checkpoint.kind == "apr":
        crc = 0
        for _, length, part in sorted(reader.sums):
            crc = crc32_combine(crc, part, length)
    hidden = None
    if reader.hidden:
        offset = min(reader.hidden)
        hidden = (offset, _tensor_before(checkpoint.tensors.values(), offset))
    return Screening({name: look.result() for name, look in looks.items()}, crc, hidden)


@dataclasses.dataclass(frozen=True)
class _Piece:
    """A run of bytes of one tensor, or of none: padding if `padding`, else header, metadata and index."""

    offset: int
    nbytes: int
    tensor: Tensor | None
    padding: bool = False
    sampled: bool = False


@dataclasses.dataclass
class _Block:
    """Pieces that follow each other in one file, read by one thread."""

    source: SourceFile
    pieces: list[_Piece]

    @property
    def nbytes(self) -> int:
        return self.pieces[-1].offset + self.pieces[-1].nbytes - self.pieces[0].offset

    def chunks(self) -> Iterator[list[_Piece]]:
        """Yields runs of pieces that fit one buffer; a block has some."""
        chunk: list[_Piece] = []
        size = 0
        for piece in self.pieces:
            if chunk and size + piece.nbytes > _CHUNK_BYTES:
                yield chunk
                chunk, size = [], 0
            chunk.append(piece)
            size += piece.nbytes
        yield chunk


def _blocks(checkpoint: Checkpoint) -> Iterator[_Block]:
    for source in checkpoint.sources:
        tensors = sorted(
            (tensor for tensor in checkpoint.tensors.values() if tensor.source is source and tensor.nbytes),
            key=lambda tensor: tensor.offset,
        )
        block = _Block(source, [])
        for piece in _apr_pieces(checkpoint, tensors) if checkpoint.apr else map(_cut, tensors):
            for part in piece:
                last = block.pieces[-1] if block.pieces else None
                if last and (block.nbytes >= _BLOCK_BYTES or last.offset + last.nbytes != part.offset):
                    yield block
                    block = _Block(source, [])
                block.pieces.append(part)
        if block.pieces:
            yield block


def _cut(tensor: Tensor) -> Iterator[_Piece]:
    # Cut from the tensor's beginning, so that no element is cut wherever the tensor stands.
    for begin in range(0, tensor.nbytes, _CHUNK_BYTES):
        nbytes = min(_CHUNK_BYTES, tensor.nbytes - begin)
        sampled = len(tensor.shape) > 1 and begin % _SAMPLED_BYTES == 0
        yield _Piece(tensor.offset + begin, nbytes, tensor, sampled=sampled)


def _gap(begin: int, end: int, padding: bool) -> Iterator[_Piece]:
    for offset in range(begin, end, _CHUNK_BYTES):
        yield _Piece(offset, min(_CHUNK_BYTES, end - offset), None, padding)


def _apr_pieces(checkpoint: Checkpoint, tensors: Iterable[Tensor]) -> Iterator[Iterator[_Piece]]:
    """Yields the whole file up to its footer."""
    assert checkpoint.apr is not None
    position = checkpoint.apr.header.data_offset
    yield _gap(0, position, padding=False)
    for tensor in tensors:
        yield _gap(position, tensor.offset, padding=True)
        yield _cut(tensor)
        position = tensor.offset + tensor.nbytes
    yield _gap(position, min(checkpoint.apr.data_end, checkpoint.sources[0].size), padding=True)


def _tensor_before(tensors: Iterable[Tensor], offset: int) -> str | None:
    ordered = sorted((tensor.offset, tensor.name) for tensor in tensors if tensor.nbytes)
    at = bisect.bisect(ordered, (offset,)) - 1
    return ordered[at][1] if at >= 0 else None


class _Look:
    """Gathers what the pieces of one tensor show."""

    def __init__(self, tensor: Tensor):
        self._dtype = tensor.dtype
        self._width = tensor.dtype.numpy.itemsize
        self._count = tensor.nbytes // self._width
        self._mask = np.dtype(f"<u{self._width}").type(2 ** (8 * self._width - 1) - 1)
        self._nonzero = 0
        self._top = 0
        self._sample = statistics.WideAccumulator(())
        self._lock = threading.Lock()

    def add(self, data: memoryview, sampled: bool, scratch: np.ndarray) -> None:
        """Takes some elements, in any order; from any thread, with `scratch` of its own of as many bytes."""
        bits = np.frombuffer(data, self._mask.dtype)
        magnitudes = np.bitwise_and(bits, self._mask, out=scratch[: len(data)].view(bits.dtype))
        top, nonzero = int(magnitudes.max()), int(np.count_nonzero(magnitudes))
        with self._lock:
            self._top = max(self._top, top)
            self._nonzero += nonzero
            if sampled:
                self._sample.add(np.frombuffer(data[:_SAMPLE_BYTES], self._dtype.numpy))

    def result(self) -> Glance:
        top = np.array(self._top, f"<u{self._width}").view(self._dtype.numpy)
        return Glance(
            count=self._count,
            zeros=self._count - self._nonzero,
            finite=self._top < _INFINITIES[self._dtype.name],
            magnitude=float(top.astype(np.float64)) if self._count else math.nan,
            sample=self._sample.result(),
        )


class _Reader:
    """Reads blocks in a few threads: reading, summing and numpy's loops all release the interpreter lock."""

    def __init__(self, blocks: Iterator[_Block], looks: dict[str, _Look], summed: bool, progress: Progress | None):
        self.sums: list[tuple[int, int, int]] = []
        self.hidden: list[int] = []
        self._blocks = blocks
        self._looks = looks
        self._summed = summed
        self._progress = progress
        self._lock = threading.Lock()

    def work(self, workers: Workers) -> None:
        # Fresh memory for every chunk would cost more than the arithmetic.
        buffer, scratch = memoryview(bytearray(_CHUNK_BYTES)), np.empty(_CHUNK_BYTES, np.uint8)
        while not workers.stopped:
            with self._lock:
                block = next(self._blocks, None)
            if block is None:
                break
            self._read(block, buffer, scratch)

    def _read(self, block: _Block, buffer: memoryview, scratch: np.ndarray) -> None:
        crc = 0
        for pieces in block.chunks():
            begin = pieces[0].offset
            data = buffer[: pieces[-1].offset + pieces[-1].nbytes - begin]
            block.source.readinto_at(begin, data)
            if self._summed:
                crc = crc32(data, crc)
            self._look(pieces, data, scratch)
            if self._progress is not None:
                self._progress(len(data))
        self.sums.append((block.pieces[0].offset, block.nbytes, crc))

    def _look(self, pieces: Sequence[_Piece], data: memoryview, scratch: np.ndarray) -> None:
        for piece in pieces:
            begin = piece.offset - pieces[0].offset
            part = data[begin : begin + piece.nbytes]
            if piece.padding:
                text = bytes(part)
                if text.strip(b"\0"):
                    self.hidden.append(piece.offset + len(text) - len(text.lstrip(b"\0")))
            elif piece.tensor is not None and piece.tensor.name in self._looks:
                self._looks[piece.tensor.name].add(part, piece.sampled, scratch)
