"""The GGUF container (llama.cpp), versions 2 and 3, little-endian: its metadata, and where its tensors lie.

    "GGUF" | u32 version | u64 tensors | u64 pairs | key, value ... | name, shape, type, offset ... | padding | data

Everything is bounded before it is believed: counts by the bytes that are left, sizes by the file. Dimensions stand
innermost first in the file and outermost first here. Format: docs/gguf.md of ggml-org/ggml.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import struct
from collections.abc import Iterator
from typing import Any

from apr_jax.converters.errors import AprJaxError, BrokenContainerError, RefusedError
from apr_jax.converters.formats import dtypes, tensor_names
from apr_jax.converters.storage.source import SourceFile

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_TENSORS = 1_000_000
MAX_PAIRS = 1 << 16
# A vocabulary has hundreds of thousands of strings; what follows costs memory many times its bytes.
MAX_ITEMS = 1 << 23
MAX_DIMENSIONS = 4
MAX_NAME_BYTES = 1024
_MAX_STRING = 64 << 20
_MAX_NESTING = 3
_READ_BYTES = 1 << 20
_DEFAULT_ALIGNMENT = 32
_MAX_ALIGNMENT = 1 << 20

# Value types: number -> struct code; strings and arrays beside them.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_BY_GGML = {dtype.ggml: dtype for dtype in dtypes.TYPES.values() if dtype.ggml is not None}


@dataclasses.dataclass(frozen=True)
class GgufEntry:
    """One tensor.

    Attributes:
      name: As it stands in the file.
      dtype: Its type.
      shape: Dimensions, outermost first.
      offset: Where in the file its data begin.
      nbytes: Bytes of its data.
    """

    name: str
    dtype: dtypes.DType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class GgufHeader:
    """What stands before the data.

    Attributes:
      metadata: The pairs, in order; single floats of 32 bits are the shortest decimals that stand for them.
      entries: The tensors, in order.
    """

    metadata: dict[str, Any]
    entries: tuple[GgufEntry, ...]


def read_header(source: SourceFile) -> GgufHeader:
    """Reads and checks everything but the data.

    Raises:
      BrokenContainerError: The file is not what the format says; with the byte at which that shows.
      RefusedError: It is, in another version or byte order, or with a type of tensors that is not known.
      StorageError: It cannot be read.
    """
    reader = _Reader(source)
    if reader.take(4) != MAGIC:
        raise reader.broken("the file does not begin as GGUF does", "gguf-magic")
    version = reader.number("I")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
        raise RefusedError(
            "the GGUF file is big-endian" if swapped else "the GGUF file is of another version",
            code="gguf-version",
            file=source.path,
            offset=4,
            found=version,
            expected=" or ".join(map(str, VERSIONS)),
            hint="`gguf-convert-endian` of the gguf package turns it round"
            if swapped
            else "llama.cpp writes it anew: `llama-quantize --allow-requantize FILE OUT COPY`",
        )
    tensors = reader.count(min(MAX_TENSORS, reader.left // 24), "tensors")
    pairs = reader.count(min(MAX_PAIRS, reader.left // 13), "pairs of metadata")
    metadata: dict[str, Any] = {}
    for _ in range(pairs):
        key = reader.string(65535)
        if key in metadata:
            raise reader.broken(f"the key {key[:80]!r} occurs twice", "gguf-metadata")
        metadata[key] = reader.value(reader.number("I"))
    found = [reader.tensor() for _ in range(tensors)]
    return GgufHeader(metadata, tuple(_placed(found, metadata, reader)))


class _Reader:
    """A position in a file, read in pieces."""

    def __init__(self, source: SourceFile):
        self.source = source
        self.position = 0
        self._window = b""
        self._start = 0
        self._items = 0

    @property
    def left(self) -> int:
        return self.source.size - self.position

    def broken(self, what: str, code: str, **details: Any) -> BrokenContainerError:
        return BrokenContainerError(what, code=code, file=self.source.path, offset=self.position, **details)

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise self.broken("the file ends before its header does", "file-truncated", found=self.source.size)
        end = self.position + count
        if end > self._start + len(self._window):
            wanted = min(max(count, _READ_BYTES), self.left)
            self._window, self._start = bytes(self.source.read_at(self.position, wanted)), self.position
        begin = self.position - self._start
        self.position = end
        return self._window[begin : begin + count]

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def count(self, most: int, what: str) -> int:
        count: int = self.number("Q")
        if count > most:
            self.position -= 8
            raise self.broken(f"impossible number of {what}", "gguf-count", found=count, expected=f"at most {most}")
        return count

    def string(self, most: int = _MAX_STRING) -> str:
        length = self.count(min(most, self.left), "bytes of a string")
        text = self.take(length)
        try:
            return text.decode()
        except UnicodeDecodeError:
            self.position -= length
            raise self.broken("a string is not UTF-8", "gguf-string") from None

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            if depth == _MAX_NESTING:
                raise self.broken("arrays are nested too deeply", "gguf-metadata")
            return self._array(depth)
        if kind not in _NUMBERS:
            raise self.broken("unknown type of a value", "gguf-metadata", found=kind, expected="0 to 12")
        return self._checked(kind, self.number(_NUMBERS[kind]))

    def _array(self, depth: int) -> list[Any]:
        kind = self.number("I")
        if kind not in (*_NUMBERS, _STRING, _ARRAY):
            raise self.broken("unknown type of values", "gguf-metadata", found=kind, expected="0 to 12")
        width = struct.calcsize(_NUMBERS[kind]) if kind in _NUMBERS else 8
        count = self.count(min(MAX_ITEMS - self._items, self.left // width), "values of an array")
        self._items += count
        if kind in _NUMBERS:
            numbers = struct.unpack(f"<{count}{_NUMBERS[kind]}", self.take(count * width))
            return [self._checked(kind, number) for number in numbers] if kind == _BOOL else list(numbers)
        if kind == _STRING:
            return self._strings(count)
        return [self.value(kind, depth + 1) for _ in range(count)]

    def _strings(self, count: int) -> list[str]:
        """A vocabulary and its merges are most of a header: the window's are taken at once."""
        strings: list[str] = []
        while len(strings) < count:
            # One that the window does not hold, or no UTF-8.
            strings.append(self.string())
            at = self._take_strings(self.position - self._start, count - len(strings), strings)
            self.position = self._start + at
        return strings

    def _take_strings(self, at: int, most: int, strings: list[str]) -> int:
        """Appends the strings that the window holds from `at` on, `most` at most; returns where the next one begins."""
        window, length_at = self._window, struct.Struct("<Q").unpack_from
        with contextlib.suppress(struct.error, UnicodeDecodeError):
            for _ in range(most):
                end = at + 8 + length_at(window, at)[0]
                if end > len(window):
                    break
                strings.append(window[at + 8 : end].decode())
                at = end
        return at

    def _checked(self, kind: int, number: Any) -> Any:
        if kind == _BOOL:
            if number > 1:
                raise self.broken("a truth value is neither 0 nor 1", "gguf-metadata", found=number)
            return bool(number)
        return _shortest(number) if kind == 6 else number

    def tensor(self) -> tuple[str, int, tuple[int, ...], int, int]:
        """Returns name, type, shape, offset within the data, and where in the file that is said."""
        at = self.position
        name = self.string(MAX_NAME_BYTES)
        rank = self.number("I")
        if not 0 < rank <= MAX_DIMENSIONS:
            raise self.broken("impossible number of dimensions", "gguf-shape", tensor=name[:300], found=rank)
        shape = struct.unpack(f"<{rank}Q", self.take(8 * rank))[::-1]
        kind, offset = self.number("I"), self.number("Q")
        return name, kind, shape, offset, at


def _placed(found: list[tuple[str, int, tuple[int, ...], int, int]], metadata: dict[str, Any], reader: _Reader) -> Any:
    """Yields the entries, whose data follow each other with no more between them than padding."""
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 0 < alignment <= _MAX_ALIGNMENT or alignment % 8:
        raise reader.broken("impossible general.alignment", "gguf-metadata", found=repr(alignment)[:80])
    twice, times = collections.Counter(name for name, *_ in found).most_common(1)[0] if found else ("", 1)
    if times > 1:
        raise reader.broken("a tensor occurs twice", "gguf-tensors", tensor=twice[:300])
    start = _padded(reader.position, alignment)
    entries, position = [], 0
    for name, kind, shape, offset, at in sorted(found, key=lambda tensor: tensor[3]):
        reader.position = at
        try:
            tensor_names.check(name, max_bytes=MAX_NAME_BYTES)
            nbytes = _type(kind).nbytes(shape)
        except AprJaxError as error:
            error.file, error.tensor, error.offset = reader.source.path, name[:300], at
            raise
        if offset != position:
            what = "overlaps another's" if offset < position else "begins behind a hole"
            raise reader.broken(
                f"the data of a tensor {what}", "gguf-offset", tensor=name, found=offset, expected=position
            )
        if start + offset + nbytes > reader.source.size:
            raise reader.broken(
                "the file is cut short, or its index is wrong: the data of a tensor ends past the end of the file",
                "file-truncated",
                tensor=name,
                found=reader.source.size,
                expected=start + offset + nbytes,
            )
        entries.append(GgufEntry(name, _type(kind), shape, start + offset, nbytes))
        position = _padded(offset + nbytes, alignment)
    _check_end(start + position, entries, alignment, reader)
    return entries


def _check_end(end: int, entries: list[GgufEntry], alignment: int, reader: _Reader) -> None:
    """The last tensor may be padded or not."""
    last = max((entry.offset + entry.nbytes for entry in entries), default=reader.position)
    if reader.source.size not in (last, end) and not last <= reader.source.size < last + alignment:
        reader.position = last
        raise reader.broken(
            "bytes follow the last tensor", "trailing-bytes", found=f"{reader.source.size - last} bytes"
        )


def _type(number: int) -> dtypes.DType:
    if number not in _BY_GGML:
        raise RefusedError(
            "unknown type of a tensor",
            code="dtype-unknown",
            found=number,
            expected=f"one of {' '.join(str(known) for known in sorted(_BY_GGML))}",
            hint="llama.cpp can make it one of these: `llama-quantize --allow-requantize FILE OUT F16`",
        )
    return _BY_GGML[number]


def _padded(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def _shortest(number: float) -> float:
    """Returns the shortest decimal that stands for a float32: 1e-06, where its exact value is 9.999999974752427e-07."""
    if not math.isfinite(number):
        return number
    return next(value for value in _decimals(number) if struct.pack("<f", value) == struct.pack("<f", number))


def _decimals(number: float) -> Iterator[float]:
    for digits in range(1, 10):
        value = float(f"{number:.{digits}g}")
        # Rounding up the largest one would overflow.
        if abs(value) < 3.4028235677973366e38:
            yield value
