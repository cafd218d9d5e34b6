"""The safetensors container as pure functions over bytes.

    u64 LE header length N | N bytes of JSON, padded with spaces | tensor data, back to back

The header maps names to {"dtype", "shape", "data_offsets": [begin, end]}, offsets counted from the end of the header,
and "__metadata__" to an object of strings. Everything is checked here rather than left to the safetensors package,
which lets duplicate keys, unknown fields and other leftovers through. Format: the README of huggingface/safetensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from apr_jax.converters.errors import AprJaxError, BrokenContainerError, RefusedError
from apr_jax.converters.formats import dtypes, strict_json, tensor_names
from apr_jax.converters.storage.crc import Bytes

PREFIX_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
# What describes a model takes some 500 bytes a tensor here: this many take 50 MB. The largest models known have 90,000.
MAX_TENSORS = 100_000
MAX_NAME_BYTES = 65_535
# numpy's own limit.
MAX_DIMENSIONS = 64
METADATA_KEY = "__metadata__"

_FIELDS = ("dtype", "shape", "data_offsets")
_ALIGNMENT = 8


@dataclasses.dataclass(frozen=True)
class SafetensorsEntry:
    """One tensor of the header.

    Attributes:
      name: Its key.
      dtype: Its element type.
      shape: Dimensions, outermost first.
      begin, end: Byte range, counted from the end of the header.
    """

    name: str
    dtype: dtypes.DType
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclasses.dataclass(frozen=True)
class SafetensorsHeader:
    """A parsed header.

    Attributes:
      entries: In the order of the header.
      metadata: The strings of `__metadata__`; None where the key is absent.
      data_start: Where in the file the data begins.
      warnings: What is allowed but worth saying.
    """

    entries: tuple[SafetensorsEntry, ...]
    metadata: dict[str, str] | None
    data_start: int
    warnings: tuple[str, ...] = ()


def parse_header_length(prefix: Bytes, file_size: int, *, file: str | None = None) -> int:
    """Returns the header's length N from the first 8 bytes of a file.

    Raises:
      BrokenContainerError: Codes "file-too-short", "header-length".
    """
    if len(prefix) < PREFIX_BYTES:
        raise BrokenContainerError(
            "the file is empty" if file_size == 0 else "the file is too short for safetensors",
            code="file-too-short",
            file=file,
            found=f"{file_size} bytes",
            expected=f"at least {PREFIX_BYTES + 2} bytes",
        )
    length = int.from_bytes(prefix[:PREFIX_BYTES], "little")
    limit = min(file_size - PREFIX_BYTES, MAX_HEADER_BYTES)
    if not 2 <= length <= limit:
        raise BrokenContainerError(
            "the header's length is impossible",
            code="header-length",
            file=file,
            offset=0,
            found=length,
            expected=f"2..{limit} for a file of {file_size} bytes",
        )
    return length


def parse_header(header: Bytes, file_size: int, *, file: str | None = None) -> SafetensorsHeader:
    """Parses the N bytes after the length and checks them against the size of the file.

    Args:
      header: The JSON text.
      file_size: Bytes of the whole file.
      file: Its path, for error messages.

    Raises:
      BrokenContainerError: The header is malformed, or does not describe this file: every byte of the data belongs to
        exactly one tensor.
    """
    if bytes(header[:1]) != b"{":
        raise BrokenContainerError(
            "the header is not a JSON object", code="header-json", file=file, offset=PREFIX_BYTES, expected="'{'"
        )
    parsed = strict_json.loads(
        header,
        what="the header",
        max_bytes=MAX_HEADER_BYTES,
        max_depth=3,
        wide=True,
        file=file,
        offset=PREFIX_BYTES,
    )
    metadata = _metadata(parsed.pop(METADATA_KEY), file) if METADATA_KEY in parsed else None
    if len(parsed) > MAX_TENSORS:
        raise BrokenContainerError(
            "too many tensors", code="tensor-count", file=file, found=len(parsed), expected=f"at most {MAX_TENSORS}"
        )
    entries = []
    for name, value in parsed.items():
        try:
            entries.append(_entry(name, value))
        except AprJaxError as error:
            error.file, error.tensor = file, name[:300]
            raise
    data_start = PREFIX_BYTES + len(header)
    _check_cover(entries, file_size - data_start, data_start, file)
    return SafetensorsHeader(tuple(entries), metadata, data_start, tuple(tensor_names.alike(parsed)))


def serialise_header(
    tensors: Iterable[tuple[str, dtypes.DType, Sequence[int]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Returns the length and the header of a file whose tensors follow back to back in the given order.

    Args:
      tensors: (name, type, shape) in the order of the data.
      metadata: The strings of `__metadata__`; None leaves the key out.

    Returns:
      The bytes before the data, a multiple of 8.

    Raises:
      RefusedError: A type that safetensors lacks, a reserved, doubled or unusable name, metadata that is not text, or a
        header over 100 MB.
    """
    header: dict[str, Any] = {}
    if metadata is not None:
        header[METADATA_KEY] = dict(metadata)
        if not all(isinstance(text, str) for pair in header[METADATA_KEY].items() for text in pair):
            raise RefusedError(
                "safetensors metadata has to be text",
                code="metadata-type",
                hint="Give numbers and objects as JSON text",
            )
    position = 0
    seen: set[str] = set()
    for name, dtype, shape in tensors:
        if name == METADATA_KEY or name in seen:
            raise RefusedError(
                "this name cannot be used (again)",
                code="name-reserved",
                tensor=name,
                hint="`convert --rename FROM=TO` gives it another",
            )
        if dtype.safetensors is None:
            raise RefusedError(
                f"safetensors has no code for {dtype.name}",
                code="dtype-unsupported",
                tensor=name,
                hint="`convert --dequantise` writes blocks dense, `convert --cast GLOB=TYPE` in a type that it has",
            )
        tensor_names.check(name, max_bytes=MAX_NAME_BYTES)
        seen.add(name)
        end = position + dtype.nbytes(shape)
        header[name] = {"dtype": dtype.safetensors, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = strict_json.dumps(header)
    text += b" " * (-len(text) % _ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES:
        raise RefusedError(
            "the header is too large",
            code="header-length",
            found=len(text),
            expected=MAX_HEADER_BYTES,
            hint="`convert --max-shard-size` writes several files, each with a header of its own",
        )
    return len(text).to_bytes(PREFIX_BYTES, "little") + text


def data_order(tensors: Iterable[tuple[str, dtypes.DType]]) -> list[str]:
    """Returns the names in the order in which the safetensors package stores them: wide types first, then by name.

    In this order every tensor is aligned to its own width.
    """
    rank = {dtype.name: position for position, dtype in enumerate(_WIDE_FIRST)}
    return [name for name, _ in sorted(tensors, key=lambda tensor: (rank[tensor[1].name], tensor[0].encode()))]


# The package sorts by its own enumeration, backwards.
_WIDE_FIRST = tuple(
    dtypes.by_safetensors(code)
    for code in """U64 I64 F64 C64 F32 U32 I32 BF16 F16 U16 I16 F8_E5M2FNUZ F8_E4M3FNUZ F8_E8M0 F8_E4M3 F8_E5M2 I8 U8
    F6_E3M2 F6_E2M3 F4 BOOL""".split()
)


def _metadata(value: Any, file: str | None) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise BrokenContainerError(
            f"{METADATA_KEY} is not an object of strings", code="metadata-type", file=file, offset=PREFIX_BYTES
        )
    return value


def _entry(name: str, value: Any) -> SafetensorsEntry:
    tensor_names.check(name, max_bytes=MAX_NAME_BYTES)
    if not isinstance(value, dict) or sorted(value) != sorted(_FIELDS):
        found = sorted(value)[:9] if isinstance(value, dict) else type(value).__name__
        raise BrokenContainerError(
            "the entry has not exactly the fields it should have",
            code="entry-fields",
            found=str(found)[:300],
            expected=f"an object with {', '.join(_FIELDS)}",
        )
    code, shape, offsets = (value[field] for field in _FIELDS)
    if not isinstance(code, str):
        raise BrokenContainerError("the dtype is not a string", code="dtype-unknown", found=repr(code)[:80])
    dtype = dtypes.by_safetensors(code)
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS:
        raise BrokenContainerError(
            "the shape is malformed",
            code="shape-type",
            found=f"{len(shape)} dimensions" if isinstance(shape, list) else repr(shape)[:80],
            expected=f"a list of at most {MAX_DIMENSIONS} integers",
        )
    if not isinstance(offsets, list) or len(offsets) != 2 or any(type(offset) is not int for offset in offsets):
        raise BrokenContainerError(
            "the data offsets are malformed", code="offsets-type", found=repr(offsets)[:80], expected="two integers"
        )
    begin, end = offsets
    nbytes = dtype.nbytes(shape)
    if not 0 <= begin <= end:
        raise BrokenContainerError("the data offsets are impossible", code="offsets-order", found=str(offsets)[:80])
    if end - begin != nbytes:
        raise BrokenContainerError(
            f"the data offsets do not fit {dtype.name} {shape}",
            code="size-mismatch",
            found=f"{end - begin} bytes",
            expected=f"{nbytes} bytes",
        )
    return SafetensorsEntry(name, dtype, tuple(shape), begin, end)


def _check_cover(entries: Iterable[SafetensorsEntry], data_bytes: int, data_start: int, file: str | None) -> None:
    """Checks that the tensors follow each other without hole or overlap and fill the file to its end."""
    position, before = 0, ""
    for entry in sorted(entries, key=lambda entry: (entry.begin, entry.end)):
        if entry.end > data_bytes:
            raise BrokenContainerError(
                "the file is cut short, or its header is wrong: the tensor's data ends past the end of the file",
                code="file-truncated",
                file=file,
                offset=data_start + entry.begin,
                tensor=entry.name,
                found=f"{data_bytes} bytes of data",
                expected=f"{entry.end}",
            )
        if entry.begin != position:
            overlap = entry.begin < position
            raise BrokenContainerError(
                f"the data overlaps that of '{before}'" if overlap else "there is a hole before the data",
                code="data-overlap" if overlap else "data-hole",
                file=file,
                offset=data_start + entry.begin,
                tensor=entry.name,
                found=entry.begin,
                expected=position,
            )
        position, before = entry.end, entry.name
    if position != data_bytes:
        raise BrokenContainerError(
            "bytes follow the last tensor",
            code="trailing-bytes",
            file=file,
            offset=data_start + position,
            found=f"{data_bytes - position} bytes",
        )
