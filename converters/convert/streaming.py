"""Moves tensor data from source files into an output file: each byte read once, written once, summed on the way.

The data is cut into blocks that a few threads copy independently, each through one small buffer, so that memory is
constant and a second core pays off (reading, writing and the CRC all release the interpreter lock). Each block has its
own CRC-32; they are combined in the order of the output for its footer, and in the order of the source to check that.

A conversion that can be resumed notes each block that is written. Another run keeps it if what stands in the output has
the CRC-32 that was noted: the source is not read again for it, nor a cast computed again, as comparing with the source
would ask for. Blocks of at most 16 MiB and not whole tensors, since the embedding of a 7B model is 7 % of it.
"""

from __future__ import annotations

import abc
import dataclasses
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from apr_jax.converters.errors import BrokenContainerError
from apr_jax.converters.formats import casts, dtypes
from apr_jax.converters.storage.crc import crc32, crc32_combine
from apr_jax.converters.storage.journal import Pieces
from apr_jax.converters.storage.output import OutputFile
from apr_jax.converters.storage.source import SourceFile
from apr_jax.converters.storage.workers import Workers, at_once

if TYPE_CHECKING:
    from apr_jax.converters.convert.recoding import QuantisationError, Recoding

# Fits the second-level cache, and is long enough that the interpreter does not show.
_CHUNK_BYTES = 1 << 20
_BLOCK_BYTES = 16 << 20
# More threads than this do not copy faster: memory is the limit.
_MAX_THREADS = 4

Progress = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class Part:
    """A run of bytes that goes from a source to an output, as it is or cast.

    Attributes:
      source: Where it is read.
      source_offset: From which byte on.
      nbytes: Bytes in the source.
      output_offset: Where it goes in the output.
      tensor: The tensor it belongs to, the first one if there are several.
      cast: Names of the types to cast from and to; None copies.
      again: Whether another part reads the same bytes for their first use.
      recoding: The cast, if one of its types is quantised.
    """

    source: SourceFile
    source_offset: int
    nbytes: int
    output_offset: int
    tensor: str
    cast: tuple[str, str] | None = None
    again: bool = False
    recoding: Recoding | None = None


@dataclasses.dataclass
class Block:
    """A piece of a part, small enough for one thread, and what was found while it was moved.

    Attributes:
      part: What it is a piece of.
      source_offset, nbytes: Its bytes in the source.
      output_offset, written: Its bytes in the output.
      read_crc, written_crc: CRC-32 of both, where asked for.
      damage: What a cast did.
      values: The values it holds, first and end, if it is recoded; its source bytes are then only an estimate.
      error: How far quantising moved its values.
      kept: Whether an earlier run has written it.
    """

    part: Part
    source_offset: int
    nbytes: int
    output_offset: int
    written: int
    read_crc: int = 0
    written_crc: int = 0
    damage: casts.Damage = dataclasses.field(default_factory=casts.Damage)
    values: tuple[int, int] | None = None
    error: QuantisationError | None = None
    kept: bool = False

    def note(self, done: Pieces) -> None:
        """Notes that it is written, and what was found meanwhile."""
        error = None if self.error is None else self.error.to_note()
        found = {"read_crc": self.read_crc, "damage": vars(self.damage), "error": error}
        done.note(self.output_offset, self.written, self.written_crc, **found)

    def keep(self, note: Mapping[str, Any]) -> None:
        """Takes over what an earlier run noted."""
        self.kept = True
        self.written_crc, self.read_crc = note["crc"], note["read_crc"]
        self.damage = casts.Damage(**note["damage"])
        if note["error"] is not None:
            from apr_jax.converters.convert.recoding import QuantisationError

            self.error = QuantisationError.from_note(note["error"])


def coalesce(parts: Iterable[Part]) -> list[Part]:
    """Joins copies that follow each other both in the source and in the output."""
    joined: list[Part] = []
    for part in parts:
        last = joined[-1] if joined else None
        if (
            last is not None
            and last.source is part.source
            and last.cast is None
            and part.cast is None
            and last.recoding is None
            and part.recoding is None
            and last.again == part.again
            and last.source_offset + last.nbytes == part.source_offset
            and last.output_offset + last.nbytes == part.output_offset
        ):
            joined[-1] = dataclasses.replace(last, nbytes=last.nbytes + part.nbytes)
        elif part.nbytes:
            joined.append(part)
    return joined


def move(
    parts: Sequence[Part],
    output: OutputFile,
    *,
    summed: bool,
    progress: Progress,
    done: Pieces | None = None,
) -> list[Block]:
    """Moves all parts into `output`.

    Args:
      parts: What to move; their output ranges do not overlap.
      output: Where to.
      summed: Whether to compute CRCs.
      progress: Called with the number of bytes read, from any thread.
      done: What an earlier run has moved: what stands there with the CRC that was noted is kept. What this run moves is
        noted in it, and summed for that.

    Returns:
      The blocks moved, in the order of the parts.

    Raises:
      StorageError: Reading or writing failed.
      RefusedError: Values that cannot be quantised.
    """
    blocks = [block for part in parts for block in _cut(part)]
    if done is not None:
        noted = [block for block in blocks if done.noted(block.output_offset, block.written) is not None]
        _in_threads(_Keeper(noted, output, done, progress), len(noted))
    rest = [block for block in blocks if not block.kept]
    # What a thread would import is imported here.
    for recoding in dict.fromkeys(block.part.recoding for block in rest):
        if recoding is not None:
            recoding.prepare()
    if any(block.part.cast is not None for block in rest):
        casts.prepare()
    _in_threads(_Mover(rest, output, summed or done is not None, progress, done), len(rest))
    return blocks


def output_crc(prologue: bytes, blocks: Sequence[Block], end: int) -> int:
    """Returns the CRC-32 of an output's first `end` bytes: prologue, blocks by their place, zeros in between."""
    crc, position = crc32(prologue), len(prologue)
    for block in sorted(blocks, key=lambda block: block.output_offset):
        crc = crc32(bytes(block.output_offset - position), crc)
        crc = crc32_combine(crc, block.written_crc, block.written)
        position = block.output_offset + block.written
    return crc32(bytes(end - position), crc)


def check_footer(source: SourceFile, end: int, blocks: Iterable[Block]) -> None:
    """Compares the CRC-32 of a source's first `end` bytes with the footer that follows them.

    Args:
      source: An `.apr` file.
      end: Where its footer is.
      blocks: What has been read of it, with CRCs; the rest is read here.

    Raises:
      BrokenContainerError: Code "footer-crc".
    """
    crc, position = 0, 0
    read = (
        block
        for block in blocks
        if block.part.source is source and not block.part.again and block.part.recoding is None
    )
    for block in sorted(read, key=lambda block: block.source_offset):
        crc = _read_crc(source, position, block.source_offset, crc)
        crc = crc32_combine(crc, block.read_crc, block.nbytes)
        position = block.source_offset + block.nbytes
    crc = _read_crc(source, position, end, crc)
    stored = int.from_bytes(source.read_at(end, 4), "little")
    if stored != crc:
        raise BrokenContainerError(
            "the file's checksum is wrong: its content has changed since it was written",
            code="footer-crc",
            file=source.path,
            offset=end,
            found=f"{stored:#010x}",
            expected=f"{crc:#010x}",
        )


def _read_crc(source: SourceFile, begin: int, end: int, crc: int) -> int:
    buffer = memoryview(bytearray(min(_CHUNK_BYTES, end - begin)))
    while begin < end:
        chunk = buffer[: end - begin]
        source.readinto_at(begin, chunk)
        crc = crc32(chunk, crc)
        begin += len(chunk)
    return crc


def _cut(part: Part) -> Iterable[Block]:
    if part.recoding is not None:
        yield from _cut_values(part, part.recoding)
        return
    read, written = (1, 1) if part.cast is None else [dtypes.by_name(name).block_bytes for name in part.cast]
    for begin in range(0, part.nbytes, _BLOCK_BYTES):
        nbytes = min(_BLOCK_BYTES, part.nbytes - begin)
        yield Block(
            part,
            part.source_offset + begin,
            nbytes,
            part.output_offset + begin // read * written,
            nbytes // read * written,
        )


def _cut_values(part: Part, recoding: Recoding) -> Iterable[Block]:
    pieces = list(recoding.pieces())
    for number, (first, end, offset, written) in enumerate(pieces):
        # Whole bytes of an even share, so that progress adds up.
        begin, stop = (part.nbytes * share // len(pieces) for share in (number, number + 1))
        at = part.output_offset + offset
        yield Block(part, part.source_offset + begin, stop - begin, at, written, values=(first, end))


def _in_threads(worker: _Worker, blocks: int) -> None:
    at_once(worker.work, min(_MAX_THREADS, len(os.sched_getaffinity(0)), blocks))


class _Worker(abc.ABC):
    """Takes blocks from a queue, in as many threads as call `work`."""

    def __init__(self, blocks: Sequence[Block], output: OutputFile, progress: Progress):
        self._queue = iter(blocks)
        self._output = output
        self.progress = progress
        self._lock = threading.Lock()

    def work(self, workers: Workers) -> None:
        buffer = memoryview(bytearray(_CHUNK_BYTES))
        while not workers.stopped:
            with self._lock:
                block = next(self._queue, None)
            if block is None:
                break
            self.handle(block, buffer, workers)

    @abc.abstractmethod
    def handle(self, block: Block, buffer: memoryview, workers: Workers) -> None:
        """Does what is to be done with a block, or less where `workers` are stopped."""


class _Keeper(_Worker):
    """Finds out which of the blocks that an earlier run has noted stand in the output as they should."""

    def __init__(self, blocks: Sequence[Block], output: OutputFile, done: Pieces, progress: Progress):
        super().__init__(blocks, output, progress)
        self._done = done

    def handle(self, block: Block, buffer: memoryview, workers: Workers) -> None:
        note = self._done.noted(block.output_offset, block.written)
        crc = at = 0
        while at < block.written and not workers.stopped:
            chunk = buffer[: block.written - at]
            self._output.readinto_at(block.output_offset + at, chunk)
            crc = crc32(chunk, crc)
            at += len(chunk)
        if at == block.written and note is not None and crc == note["crc"]:
            block.keep(note)
            self.progress(block.nbytes)


class _Mover(_Worker):
    def __init__(
        self,
        blocks: Sequence[Block],
        output: OutputFile,
        summed: bool,
        progress: Progress,
        done: Pieces | None,
    ):
        super().__init__(blocks, output, progress)
        self._summed = summed
        self._done = done

    def handle(self, block: Block, buffer: memoryview, workers: Workers) -> None:
        if block.part.recoding is not None and block.values is not None:
            self._recode(block, block.part.recoding, block.values)
        elif not self._move(block, buffer, workers):
            return
        if self._done is not None:
            block.note(self._done)

    def _recode(self, block: Block, recoding: Recoding, values: tuple[int, int]) -> None:
        written, block.damage, block.error = recoding.recode(*values)
        if self._summed:
            block.written_crc = crc32(written)
        self._output.write_at(written, block.output_offset)
        self.progress(block.nbytes)

    def _move(self, block: Block, buffer: memoryview, workers: Workers) -> bool:
        """Returns whether all of it was moved."""
        done = 0
        to = block.output_offset
        while done < block.nbytes:
            if workers.stopped:
                return False
            chunk = buffer[: block.nbytes - done]
            block.part.source.readinto_at(block.source_offset + done, chunk)
            if self._summed:
                block.read_crc = crc32(chunk, block.read_crc)
            written = chunk
            if block.part.cast is not None:
                written, damage = casts.cast(chunk, *block.part.cast)
                block.damage += damage
                if self._summed:
                    block.written_crc = crc32(written, block.written_crc)
            self._output.write_at(written, to)
            done += len(chunk)
            to += len(written)
            self.progress(len(chunk))
        if block.part.cast is None:
            block.written_crc = block.read_crc
        return True
