"""The `.apr` v2 container, the model format of the Rust project aprender, as pure functions over bytes.

    64-byte header | metadata, JSON | tensor index | tensor data | CRC-32 of everything before, u32

Each part but the last is zero-padded to a multiple of 64, and so is each tensor. Two CRCs guard the file: one over the
header's other 60 bytes, checked here, and the footer, which only whoever reads all the data can check. Neither is
keyed: what a right CRC guards may still be hostile, so nothing is believed before it is in bounds.

Format: apr-v2-format sections 1 to 3; what is refused and what `lenient` lets pass with a warning: section 5 there.
"""

from __future__ import annotations

import dataclasses
import itertools
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from apr_jax.converters.errors import AprJaxError, BrokenContainerError, RefusedError
from apr_jax.converters.formats import dtypes, strict_json, tensor_names
from apr_jax.converters.formats.foreign import refuse_foreign
from apr_jax.converters.storage.crc import Bytes, crc32

HEADER_BYTES = 64
ALIGNMENT = 64
FOOTER_BYTES = 4
MAX_METADATA_BYTES = 64 << 20
MAX_NAME_BYTES = 256
MAX_DIMENSIONS = 8
# What describes a model takes some 500 bytes a tensor here: this many take 50 MB. The largest models known have 90,000.
MAX_TENSORS = 100_000

MAGIC = b"APR\0"
OLD_MAGIC = b"APR2"
VERSION = (2, 0)
# A head of 0 bytes but full shape is `apr`'s way of saying that the head is the embedding (section 4.4).
HEAD_NAMES = frozenset(("lm_head.weight", "output.weight"))

_EXPORT = "What wrote it can read it: `apr export FILE --format safetensors -o OUT`, and convert that"

FLAG_ROW_MAJOR = 0x0400
FLAG_NAMES: Mapping[int, str] = {
    0x0001: "LZ4_COMPRESSED",
    0x0002: "ZSTD_COMPRESSED",
    0x0004: "ENCRYPTED",
    0x0008: "SIGNED",
    0x0010: "SHARDED",
    0x0020: "QUANTIZED",
    0x0040: "HAS_FILTERBANK",
    0x0080: "HAS_MODEL_CARD",
    0x0100: "STREAMING",
    0x0200: "HAS_VOCAB",
    0x0400: "LAYOUT_ROW_MAJOR",
    0x0800: "LAYOUT_COLUMN_MAJOR",
}
# With these the data are not the plain weights; with those there is more to the file than can be checked here.
_FLAGS_REFUSED = 0x0001 | 0x0002 | 0x0004 | 0x0800
_FLAGS_DOUBTFUL = 0x0008 | 0x0010 | 0xF000
_FLAG_QUANTIZED = 0x0020

_HEADER = struct.Struct("<4sBBHIQIQQI20s")
_CHECKSUM_AT = 40
_RESERVED_AT = 44
_SMALLEST_ENTRY = 2 + 1 + 1 + 1 + 8 + 8
_LARGEST_ENTRY = 2 + MAX_NAME_BYTES + 1 + 1 + 8 * MAX_DIMENSIONS + 8 + 8


def pad(nbytes: int) -> int:
    """Returns `nbytes` rounded up to a multiple of 64."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@dataclasses.dataclass(frozen=True)
class AprHeader:
    """The 64 bytes at the beginning.

    Attributes:
      magic: b"APR\\0", or b"APR2" until January 2026.
      version: (major, minor).
      flags: Bits named by `FLAG_NAMES`.
      tensor_count: Entries of the index.
      metadata_offset, metadata_size: Where the JSON text is; the size is without padding.
      index_offset: Where the index begins.
      data_offset: Where the data begin; tensor offsets count from here.
      checksum: CRC-32 of the other 60 bytes.
      reserved: 20 bytes, zero in every file known.
    """

    magic: bytes
    version: tuple[int, int]
    flags: int
    tensor_count: int
    metadata_offset: int
    metadata_size: int
    index_offset: int
    data_offset: int
    checksum: int
    reserved: bytes

    @property
    def flag_names(self) -> list[str]:
        """The flags that are set, by name; unknown bits as 0x1000."""
        bits = (1 << bit for bit in range(16) if self.flags >> bit & 1)
        return [FLAG_NAMES.get(bit, f"{bit:#06x}") for bit in bits]


@dataclasses.dataclass(frozen=True)
class AprEntry:
    """One tensor of the index.

    Attributes:
      name: Its name.
      dtype_id: The dtype byte as it stands in the file.
      dtype: What it means for a tensor of this shape and size.
      shape: Dimensions, outermost first.
      offset: Where its data begin, counted from `data_offset`.
      size: Bytes of its data, without padding.
    """

    name: str
    dtype_id: int
    dtype: dtypes.DType
    shape: tuple[int, ...]
    offset: int
    size: int

    @property
    def is_placeholder(self) -> bool:
        """Whether this is a head without data, which stands for the embedding."""
        return self.size == 0 and self.name in HEAD_NAMES and 0 not in self.shape


@dataclasses.dataclass(frozen=True)
class AprPrologue:
    """Everything before the data.

    Attributes:
      header: The header.
      metadata: The JSON object, in the file's order; floats keep their spelling.
      entries: In the order of the index.
      data_end: Where in the file the data end, their padding included.
      has_footer: Whether the CRC-32 of the file follows there.
      eras: Keys of `dtypes.ERAS`: when and by whom a file of these ids and sizes can have been written.
      warnings: What was let through and is worth saying.
    """

    header: AprHeader
    metadata: dict[str, Any]
    entries: tuple[AprEntry, ...]
    data_end: int
    has_footer: bool
    eras: tuple[str, ...]
    warnings: tuple[str, ...]


class _Judge:
    """Turns what is wrong into an error, or, where leniency is asked for and possible, into a warning."""

    def __init__(self, file: str | None, lenient: bool, legacy: dtypes.Legacy = False):
        self.file = file
        self.lenient = lenient
        self.legacy = legacy
        self.warnings: list[str] = []

    def broken(self, message: str, code: str, **where: Any) -> BrokenContainerError:
        return BrokenContainerError(message, code=code, file=self.file, **where)

    def soften(self, error: AprJaxError) -> None:
        """Raises `error`, or keeps it as a warning if this reader is lenient."""
        if not self.lenient:
            error.hint = error.hint or "With --lenient this is only a warning"
            raise error
        self.warnings.append(str(error))


def parse_header(data: Bytes, file_size: int, *, file: str | None = None, lenient: bool = False) -> AprHeader:
    """Parses and checks the first 64 bytes: how much of the file is the prologue is known after that.

    Args:
      data: At least the first 64 bytes, or the whole file if it is shorter.
      file_size: Bytes of the whole file.
      file: Its path, for error messages.
      lenient: Whether to let oddities pass with which the contents are still certain.

    Raises:
      BrokenContainerError: Another format, a wrong checksum, or sections out of bounds or order.
      RefusedError: Compressed, encrypted or column-major data, or another version.
    """
    return _parse_header(data, file_size, _Judge(file, lenient))


def parse_prologue(
    data: Bytes,
    file_size: int,
    *,
    file: str | None = None,
    lenient: bool = False,
    legacy: dtypes.Legacy = False,
) -> AprPrologue:
    """Parses and checks header, metadata and index.

    Args:
      data: The bytes up to the header's `data_offset` at least.
      file_size: Bytes of the whole file.
      file: Its path, for error messages.
      lenient: Whether to let oddities pass with which the contents are still certain.
      legacy: As `dtypes.by_apr_id`.

    Raises:
      BrokenContainerError: The bytes are no `.apr` v2 container, or not a whole one.
      RefusedError: Something that cannot be read rightly: see `parse_header`, and ids of `dtypes.by_apr_id`.
    """
    judge = _Judge(file, lenient, legacy)
    view = memoryview(data)
    header = _parse_header(view, file_size, judge)
    if len(view) < header.data_offset:
        raise judge.broken("the file ends within metadata or index", "file-truncated", offset=len(view))
    metadata_end = header.metadata_offset + header.metadata_size
    _check_gap(view, HEADER_BYTES, header.metadata_offset, judge)
    _check_gap(view, metadata_end, header.index_offset, judge)
    # The size is without padding, so the text is the object and nothing around it.
    if bytes((view[header.metadata_offset], view[metadata_end - 1])) != b"{}":
        raise judge.broken("the metadata is not a JSON object", "metadata-type", offset=header.metadata_offset)
    metadata = strict_json.loads(
        view[header.metadata_offset : metadata_end],
        what="the metadata",
        max_bytes=MAX_METADATA_BYTES,
        budget=strict_json.METADATA,
        wide=True,
        file=file,
        offset=header.metadata_offset,
    )
    entries, index_end = _parse_index(view, header, judge)
    eras = dtypes.fitting_eras((entry.dtype_id, entry.shape, entry.size) for entry in entries)
    _check_gap(view, index_end, header.data_offset, judge)
    data_end = _check_data(entries, header, file_size, judge)
    has_footer = _check_end(data_end, file_size, judge)
    if header.flags & _FLAG_QUANTIZED and not any(entry.dtype.is_block for entry in entries):
        judge.warnings.append("the flag QUANTIZED is set, but no tensor is quantised")
    judge.warnings += tensor_names.alike(entry.name for entry in entries)
    return AprPrologue(header, metadata, tuple(entries), data_end, has_footer, eras, tuple(judge.warnings))


def lay_out(
    tensors: Iterable[tuple[str, dtypes.DType, Sequence[int], int]], data_order: Sequence[str] | None = None
) -> list[AprEntry]:
    """Assigns ids and offsets.

    Args:
      tensors: (name, type, shape, size in bytes), each name once.
      data_order: The names in the order of their data; None means by name.

    Returns:
      The entries sorted by name, as the index has them.

    Raises:
      RefusedError: Naming every tensor that the format cannot hold, and why.
    """
    given = sorted(tensors, key=lambda tensor: tensor[0].encode("utf-8", "surrogatepass"))
    problems = [problem for tensor in given for problem in _unfit(*tensor)]
    known = [tensor[0] for tensor in given]
    problems += [f"{name}: occurs twice" for name, other in itertools.pairwise(known) if name == other]
    if problems:
        raise RefusedError(
            f"an .apr file cannot hold these tensors, {len(problems)} in all:\n  " + "\n  ".join(problems),
            code="apr-unsupported",
            hint="--cast [GLOB=]TYPE can give floating-point and quantised tensors another type; --dequantise decodes "
            "quantised ones, those of several parts (FP8 and its scales) included; --rename FROM=TO gives another "
            "name, --leave-out GLOB leaves tensors out",
        )
    sizes = {name: size for name, _, _, size in given}
    offsets, position = {}, 0
    for name in known if data_order is None else data_order:
        offsets[name] = position
        position += pad(sizes[name])
    return [
        AprEntry(name, dtype.apr_id, dtype, tuple(shape), offsets[name], size)
        for name, dtype, shape, size in given
        if dtype.apr_id is not None
    ]


def serialise_prologue(
    metadata: Mapping[str, Any] | Bytes, entries: Sequence[AprEntry], *, flags: int = FLAG_ROW_MAJOR
) -> bytes:
    """Returns the bytes of a file before its data: header, metadata and index, each padded.

    Args:
      metadata: The JSON object, or its text where that exists already.
      entries: Sorted by name; what `lay_out` returns, or what `parse_prologue` found.
      flags: The header's flags.

    Raises:
      RefusedError: Metadata over 64 MiB, of values that JSON cannot express, or beyond another limit of the reader.
    """
    text = strict_json.dumps(metadata) if isinstance(metadata, Mapping) else bytes(metadata)
    if not 0 < len(text) <= MAX_METADATA_BYTES:
        raise RefusedError(
            "the metadata has an impossible size",
            code="metadata-size",
            found=f"{len(text)} bytes",
            expected=f"1..{MAX_METADATA_BYTES}",
            hint="`convert --to safetensors` has no such bound: side files stay beside the tensors",
        )
    strict_json.check_limits(text, what="the metadata", budget=strict_json.METADATA)
    index = b"".join(map(_entry_bytes, entries))
    index_offset = HEADER_BYTES + pad(len(text))
    data_offset = index_offset + pad(len(index))
    fields = (MAGIC, *VERSION, flags, len(entries), HEADER_BYTES, len(text), index_offset, data_offset)
    header = _HEADER.pack(*fields, 0, b"")
    header = _HEADER.pack(*fields, _header_checksum(header), b"")
    return b"".join((header, text, bytes(-len(text) % ALIGNMENT), index, bytes(-len(index) % ALIGNMENT)))


def footer(crc: int) -> bytes:
    """Returns the last 4 bytes of a file, from the CRC-32 of all before."""
    return struct.pack("<I", crc)


def _header_checksum(header: Bytes) -> int:
    return crc32(header[_RESERVED_AT:HEADER_BYTES], crc32(header[:_CHECKSUM_AT]))


def _entry_bytes(entry: AprEntry) -> bytes:
    name = entry.name.encode()
    rank = len(entry.shape)
    return struct.pack(
        f"<H{len(name)}sBB{rank}QQQ", len(name), name, entry.dtype_id, rank, *entry.shape, entry.offset, entry.size
    )


def _unfit(name: str, dtype: dtypes.DType, shape: Sequence[int], size: int) -> Iterator[str]:
    try:
        tensor_names.check(name, max_bytes=MAX_NAME_BYTES)
        fitting = dtype.sizes(shape)
    except AprJaxError as error:
        yield f"{name[:300]}: {error.message}"
        return
    if dtype.apr_id is None:
        yield f"{name}: the format has no id for {dtype.name}"
    if len(shape) > MAX_DIMENSIONS:
        yield f"{name}: {len(shape)} dimensions, at most {MAX_DIMENSIONS} are possible"
    if size not in fitting and not (size == 0 and name in HEAD_NAMES):
        yield f"{name}: {size} bytes do not fit {dtype.name} {list(shape)}"


def _parse_header(data: Bytes, file_size: int, judge: _Judge) -> AprHeader:
    first = bytes(data[:HEADER_BYTES])
    refuse_foreign(first, wanted="an .apr container of version 2", file=judge.file)
    if min(len(first), file_size) < HEADER_BYTES:
        raise judge.broken(
            "the file is empty" if file_size == 0 else "the file is too short for .apr",
            "file-too-short",
            found=f"{file_size} bytes",
            expected=f"at least {HEADER_BYTES}",
        )
    magic, major, minor, flags, count, metadata_at, size, index_at, data_at, checksum, reserved = _HEADER.unpack(first)
    header = AprHeader(magic, (major, minor), flags, count, metadata_at, size, index_at, data_at, checksum, reserved)
    if magic not in (MAGIC, OLD_MAGIC):
        raise judge.broken("this is no .apr file", "magic", offset=0, found=repr(magic), expected=repr(MAGIC))
    if (computed := _header_checksum(first)) != checksum:
        raise judge.broken(
            "the header's checksum is wrong",
            "header-crc",
            offset=_CHECKSUM_AT,
            found=f"{checksum:#010x}",
            expected=f"{computed:#010x}",
        )
    _check_identity(header, judge)
    _check_flags(header, judge)
    _check_sections(header, file_size, judge)
    return header


def _check_identity(header: AprHeader, judge: _Judge) -> None:
    if header.magic == OLD_MAGIC:
        judge.soften(
            RefusedError(
                "this file has the magic of before 2026-01-18",
                code="magic-old",
                file=judge.file,
                offset=0,
                found="APR2",
            )
        )
    major, minor = header.version
    if major != VERSION[0]:
        raise RefusedError(
            "an unsupported version of the container",
            code="version",
            file=judge.file,
            offset=4,
            found=f"{major}.{minor}",
            expected=f"{VERSION[0]}.{VERSION[1]}",
            hint=_EXPORT,
        )
    if minor != VERSION[1]:
        judge.warnings.append(f"version {major}.{minor} is newer than {VERSION[0]}.{VERSION[1]}, which is known here")
    if any(header.reserved):
        judge.soften(judge.broken("reserved bytes of the header are not zero", "header-reserved", offset=_RESERVED_AT))


def _check_flags(header: AprHeader, judge: _Judge) -> None:
    for mask, how in ((_FLAGS_REFUSED, "cannot be read"), (_FLAGS_DOUBTFUL, "are not understood")):
        if header.flags & mask:
            named = dataclasses.replace(header, flags=header.flags & mask).flag_names
            error = RefusedError(
                f"files with the flags {' '.join(named)} {how}",
                code="flags",
                file=judge.file,
                offset=6,
                found=f"{header.flags:#06x}",
            )
            if mask == _FLAGS_REFUSED:
                error.hint = _EXPORT
                raise error
            judge.soften(error)
    if not header.flags & FLAG_ROW_MAJOR:
        judge.warnings.append("the flag LAYOUT_ROW_MAJOR is not set; the tensors are taken as row-major all the same")


def _check_sections(header: AprHeader, file_size: int, judge: _Judge) -> None:
    """Checks that header, metadata, index and data follow each other within the file, with nothing in between."""
    metadata_end = header.metadata_offset + header.metadata_size
    if not 0 < header.metadata_size <= MAX_METADATA_BYTES:
        raise judge.broken(
            "the metadata has an impossible size",
            "metadata-size",
            offset=20,
            found=header.metadata_size,
            expected=f"1..{MAX_METADATA_BYTES}",
        )
    limits = (
        ("metadata", 12, header.metadata_offset, HEADER_BYTES),
        ("index", 24, header.index_offset, metadata_end),
    )
    for section, at, offset, before in limits:
        if not before <= offset < before + ALIGNMENT:
            raise judge.broken(
                f"the {section} does not begin where the section before it ends",
                "section-bounds",
                offset=at,
                found=offset,
                expected=f"{pad(before)}",
            )
    index_bytes = header.data_offset - header.index_offset
    if not 0 <= index_bytes <= file_size - header.index_offset:
        raise judge.broken(
            "the index does not end before the data, or not within the file",
            "section-bounds",
            offset=32,
            found=header.data_offset,
            expected=f"{header.index_offset}..{file_size}",
        )
    if header.tensor_count > min(MAX_TENSORS, index_bytes // _SMALLEST_ENTRY):
        raise judge.broken(
            "more tensors are claimed than the index has room for",
            "tensor-count",
            offset=8,
            found=header.tensor_count,
            expected=f"at most {min(MAX_TENSORS, index_bytes // _SMALLEST_ENTRY)}",
        )
    if index_bytes >= header.tensor_count * _LARGEST_ENTRY + ALIGNMENT:
        raise judge.broken(
            "the index section is longer than its entries can be", "section-bounds", offset=32, found=header.data_offset
        )
    for section, at, offset in (
        ("metadata", 12, header.metadata_offset),
        ("index", 24, header.index_offset),
        ("data", 32, header.data_offset),
    ):
        if offset % ALIGNMENT:
            judge.soften(
                judge.broken(f"the {section} section is not aligned to 64", "unaligned", offset=at, found=offset)
            )


def _check_gap(view: memoryview, begin: int, end: int, judge: _Judge) -> None:
    """Checks that only padding lies between two sections."""
    gap = bytes(view[begin:end])
    if end - begin >= ALIGNMENT or any(gap):
        at = begin + len(gap) - len(gap.lstrip(b"\0"))
        raise judge.broken("there is something else between two sections than padding", "padding", offset=at)


class _RawEntry(NamedTuple):
    """An entry of the index whose dtype byte is not resolved yet, and where it stands in the file."""

    at: int
    name: str
    dtype_id: int
    shape: tuple[int, ...]
    offset: int
    size: int


def _parse_index(view: memoryview, header: AprHeader, judge: _Judge) -> tuple[list[AprEntry], int]:
    """Returns the entries and where the last one ends."""
    entries: list[_RawEntry] = []
    position, before = header.index_offset, b""
    seen: set[bytes] = set()
    for _ in range(header.tensor_count):
        begin = position
        try:
            raw_name, position = _take_name(view, position, header.data_offset)
            entry, position = _parse_entry(view, raw_name, begin, position, header.data_offset)
        except AprJaxError as error:
            error.file, error.offset = judge.file, begin if error.offset is None else error.offset
            raise
        if entry.size and entry.offset % ALIGNMENT:
            judge.soften(
                judge.broken(
                    "the data are not aligned to 64", "unaligned", offset=begin, tensor=entry.name, found=entry.offset
                )
            )
        if raw_name in seen:
            raise judge.broken("two tensors have the same name", "name-duplicate", offset=begin, tensor=entry.name)
        if raw_name < before:
            judge.soften(judge.broken("the index is not sorted by name", "unsorted", offset=begin, tensor=entry.name))
        seen.add(raw_name)
        before = raw_name
        entries.append(entry)
    return [_typed(entry, entries, judge) for entry in entries], position


def _typed(entry: _RawEntry, entries: Sequence[_RawEntry], judge: _Judge) -> AprEntry:
    try:
        if entry.size == 0 and entry.name in HEAD_NAMES and dtypes.element_count(entry.shape):
            dtype = dtypes.placeholder_type(entry.dtype_id, judge.legacy)
        else:
            dtype = dtypes.by_apr_id(entry.dtype_id, entry.shape, entry.size, judge.legacy)
    except AprJaxError as error:
        error.file, error.offset, error.tensor = judge.file, entry.at, entry.name
        if error.code in ("dtype-legacy", "dtype-ambiguous"):
            error.hint = f"{error.hint}. {_of_which_age(entries)}"
        raise
    return AprEntry(entry.name, entry.dtype_id, dtype, entry.shape, entry.offset, entry.size)


def _of_which_age(entries: Iterable[_RawEntry]) -> str:
    try:
        eras = dtypes.fitting_eras((entry.dtype_id, entry.shape, entry.size) for entry in entries)
    except BrokenContainerError:
        eras = ()
    if not eras:
        return "All ids and sizes of the file together fit no writer known"
    return f"All ids and sizes of the file together fit: {'; '.join(dtypes.ERAS[era] for era in eras)}"


def _take(position: int, nbytes: int, end: int) -> int:
    if position + nbytes > end:
        raise BrokenContainerError("an entry runs past the end of the index", code="index-truncated", offset=position)
    return position + nbytes


def _take_name(view: memoryview, position: int, end: int) -> tuple[bytes, int]:
    begin = _take(position, 2, end)
    length = int.from_bytes(view[position:begin], "little")
    if not 0 < length <= MAX_NAME_BYTES:
        raise BrokenContainerError(
            "a name has an impossible length", code="name-length", found=length, expected=f"1..{MAX_NAME_BYTES}"
        )
    position = _take(begin, length, end)
    return bytes(view[begin:position]), position


def _parse_entry(view: memoryview, raw_name: bytes, at: int, position: int, end: int) -> tuple[_RawEntry, int]:
    try:
        name = raw_name.decode()
    except UnicodeDecodeError:
        raise BrokenContainerError("a name is not UTF-8", code="name-utf8", found=repr(raw_name)[:300]) from None
    tensor_names.check(name, max_bytes=MAX_NAME_BYTES)
    try:
        body = _take(position, 2, end)
        dtype_id, rank = view[position], view[position + 1]
        if rank > MAX_DIMENSIONS:
            raise BrokenContainerError(
                "too many dimensions", code="shape-rank", found=rank, expected=f"at most {MAX_DIMENSIONS}"
            )
        position = _take(body, 8 * (rank + 2), end)
    except AprJaxError as error:
        error.tensor = name
        raise
    *shape, offset, size = struct.unpack_from(f"<{rank + 2}Q", view, body)
    return _RawEntry(at, name, dtype_id, tuple(shape), offset, size), position


def _check_data(entries: Iterable[AprEntry], header: AprHeader, file_size: int, judge: _Judge) -> int:
    """Checks that the tensors lie within the file, without overlap or hole; returns where the last padding ends."""
    position, before = 0, ""
    for entry in sorted(entries, key=lambda entry: (entry.offset, entry.size)):
        where: dict[str, Any] = {"tensor": entry.name, "offset": header.data_offset + entry.offset}
        if header.data_offset + entry.offset + entry.size > file_size:
            raise judge.broken(
                "the file is cut short, or its index is wrong: the data ends past the end of the file",
                "file-truncated",
                **where,
                found=f"{file_size} bytes",
                expected=f"at least {header.data_offset + entry.offset + entry.size}",
            )
        if not entry.size:
            continue
        if entry.offset < position:
            raise judge.broken(
                f"the data overlap those of '{before}'", "data-overlap", **where, expected=f"from {position} on"
            )
        if entry.offset - position >= ALIGNMENT:
            raise judge.broken("there is a hole before the data", "data-hole", **where, expected=f"at {pad(position)}")
        position, before = entry.offset + entry.size, entry.name
    return header.data_offset + pad(position)


def _check_end(data_end: int, file_size: int, judge: _Judge) -> bool:
    """Returns whether the file has a footer."""
    if file_size == data_end + FOOTER_BYTES:
        return True
    if file_size > data_end + FOOTER_BYTES:
        error = judge.broken(
            "bytes follow the footer", "trailing-bytes", offset=data_end + FOOTER_BYTES, found=file_size - data_end - 4
        )
        judge.soften(error)
        return True
    if file_size == data_end:
        # Whole but for its checksum, as other writers leave it, and `apr` opens it.
        judge.warnings.append("there is no footer (the last 4 bytes): nothing tells whether the content has changed")
        return False
    error = judge.broken("the footer is missing", "footer-missing", offset=file_size, expected=f"at byte {data_end}")
    judge.soften(error)
    return False
