"""The cases of a list of bad inputs, by its numbers, as files that are made when they are needed.

A case is a name ("30 the first one fits"), what makes its file or folder, and the outcome: the code of the error, or
None for what has to be accepted. The list: file level 1 to 13, safetensors 14 to 67, `.apr` 68 to 110, shards 111 to
123.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import socket
import struct
import tempfile
import zlib
from collections.abc import Callable
from typing import Any
from unittest import mock

from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.convert.run import convert
from apr_jax.converters.errors import AprJaxError
from apr_jax.converters.formats import apr_format, gguf_format, safetensors_format
from apr_jax.converters.storage.source import SourceFile, exists

Make = Callable[[pathlib.Path], pathlib.Path]


Opens = Callable[[pathlib.Path], Any]


def checkpoint(path: pathlib.Path, **options: Any) -> None:
    """Opens a checkpoint, as every command does first."""
    open_checkpoint(path, **options).close()


@dataclasses.dataclass(frozen=True)
class Case:
    """One bad input.

    Attributes:
      name: Number and words.
      make: Writes it into a folder; returns what is to be opened.
      codes: Codes of the error, one of which is right; None where it is to be accepted.
      opens: What opens it.
      softened: The options of `open_checkpoint` with which it is opened nevertheless: "lenient", "legacy".
    """

    name: str
    make: Make
    codes: tuple[str, ...] | None
    opens: Opens = checkpoint
    softened: tuple[str, ...] = ()

    def fault(self, path: pathlib.Path) -> str | None:
        """Opens what was made; returns what is wrong with the outcome, None if nothing is."""
        return self.complaint(self.opened(path))

    def opened(self, path: pathlib.Path, **options: Any) -> AprJaxError | None:
        """Opens what was made; returns the error."""
        try:
            self.opens(path, **options)
        except AprJaxError as error:
            return error
        except Exception as error:
            return AprJaxError(f"{type(error).__name__}: {error}", code="outside-of-the-family")
        return None

    def complaint(self, found: AprJaxError | None) -> str | None:
        """Returns what is wrong with an outcome."""
        if found is None or self.codes is None:
            return None if found is self.codes else f"accepted, expected {self.codes}" if self.codes else str(found)
        if found.code not in self.codes:
            return f"{found.code}, expected {self.codes}: {found}"
        # Settings of generation may be the caller's.
        if found.file is None and found.code != "generation-config":
            return "no file is named"
        if (
            found.offset is None
            and found.tensor is None
            and found.found is None
            and found.expected is None
            and found.code not in _SAYS_ALL
        ):
            return f"neither a place nor what was found is named: {found}"
        return None


_SAYS_ALL = frozenset(
    (
        "apr-unsupported",
        "tensor-in-two-shards",
        "tensor-not-in-shard",
        "shard-missing",
        "file-missing",
        "nothing-compared",
        "config-unsupported",
        "adapter-missing",
        "adapter-unsupported",
        "tokenizer-broken",
        "open-failed",
        "config-missing",
        "adapter",
        "adapter-tensors",
        "one-of-several",
        "read",
        "read-failed",
        "torch",
    )
)
"""Codes of errors whose message lists what was found, or where there is nothing more to say."""
CASES: list[Case] = []


def case(name: str, make: Make, *codes: str, softened: tuple[str, ...] = ()) -> None:
    """Adds a case that is refused."""
    CASES.append(Case(name, make, codes, softened=softened))


def accepted(name: str, make: Make) -> None:
    """Adds a case that is accepted."""
    CASES.append(Case(name, make, None))


# --- makers


def raw(data: bytes, name: str = "x.safetensors") -> Make:
    """A file of these bytes."""

    def make(folder: pathlib.Path) -> pathlib.Path:
        (folder / name).write_bytes(data)
        return folder / name

    return make


def st(header: Any, data: bytes = b"", length: int | None = None) -> Make:
    """A safetensors file of this header, bytes or what JSON makes of it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return raw((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4), **more: Any) -> dict[str, Any]:
    """An entry of a safetensors header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def one(data: bytes = bytes(4), **fields: Any) -> Make:
    """A safetensors file of one tensor."""
    return st({"a": entry(**fields)}, data)


def pad(nbytes: int) -> int:
    return -(-nbytes // 64) * 64


def index_entry(name: bytes, dtype: int = 0, shape: tuple[int, ...] = (1,), offset: int = 0, size: int = 4) -> bytes:
    """An entry of an `.apr` index."""
    return struct.pack(f"<H{len(name)}sBB{len(shape)}QQQ", len(name), name, dtype, len(shape), *shape, offset, size)


def apr(
    metadata: bytes = b"{}",
    tensors: tuple[tuple[bytes, int, tuple[int, ...], int, int], ...] = ((b"a", 0, (1,), 0, 4),),
    *,
    data: bytes | None = None,
    footer: bool = True,
    index: bytes | None = None,
    behind: bytes = b"",
    resum: bool = True,
    **header: Any,
) -> Make:
    """An `.apr` file, with fields of the header changed by name; written without the project's own writer."""
    listed = b"".join(index_entry(*tensor) for tensor in tensors)
    listed = listed if index is None else index
    index_at = 64 + pad(len(metadata))
    data_at = index_at + pad(len(listed))
    fields = {
        "magic": b"APR\0", "major": 2, "minor": 0, "flags": 0x0400, "count": len(tensors), "metadata_at": 64,
        "metadata_size": len(metadata), "index_at": index_at, "data_at": data_at, "reserved": bytes(20),
    } | header  # fmt: skip
    first = struct.pack("<4sBBHIQIQQ", *list(fields.values())[:9])
    crc = zlib.crc32(fields["reserved"], zlib.crc32(first))
    body = first + struct.pack("<I", crc if resum else crc ^ 1) + fields["reserved"]
    body += metadata.ljust(pad(len(metadata)), b"\0") + listed.ljust(pad(len(listed)), b"\0")
    body += data if data is not None else bytes(pad(max((o + s for *_, o, s in tensors), default=0)))
    return raw(body + (struct.pack("<I", zlib.crc32(body)) if footer else b"") + behind, "x.apr")


def shards(index: Any, *names: str, text: bytes | None = None) -> Make:
    """A folder with an index and shards of one tensor each, named as their file."""

    def make(folder: pathlib.Path) -> pathlib.Path:
        (folder / "model.safetensors.index.json").write_bytes(json.dumps(index).encode() if text is None else text)
        for name in names:
            st({name: entry()}, bytes(4))(folder).rename(folder / name)
        return folder

    return make


def special(kind: str) -> Make:
    """What is no regular file."""

    def make(folder: pathlib.Path) -> pathlib.Path:
        path = folder / "x.safetensors"
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "socket":
            # Names of sockets end at 107 bytes.
            with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(folder):
                server.bind("x.safetensors")
        elif kind == "linked":
            os.symlink("/dev/zero", path)
        return path

    return make


# --- file level

case("1 empty", raw(b""), "file-too-short")
for length in (1, 4, 7):
    case(f"2 {length} bytes", raw(bytes(length)), "file-too-short")
case("3 shorter than the prologue", raw(b"APR\0" + bytes(59), "x.apr"), "file-too-short")
case("4 FIFO", special("fifo"), "not-a-regular-file")
case("4 socket", special("socket"), "not-a-regular-file")
case("4 device", lambda folder: pathlib.Path("/dev/zero"), "not-a-regular-file")
case("4 link to a device", special("linked"), "not-a-regular-file")
case("4 of /proc", lambda folder: pathlib.Path("/proc/self/status"), "file-too-short")
case("8 HTML", raw(b"<!DOCTYPE html><html><body>404</body></html>"), "foreign-format")
case("8 Git LFS", raw(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"), "foreign-format")
for name, magic in (("zip", b"PK\x03\x04"),
                    ("pickle", b"\x80\x04\x95"), ("gzip", b"\x1f\x8b\x08"), ("npy", b"\x93NUMPY"),
                    ("HDF5", b"\x89HDF\r\n\x1a\n"), ("APRN", b"APRN")):  # fmt: skip
    case(f"9 {name}", raw(magic + bytes(200)), "foreign-format")
case("10 swapped magic", raw(b"\0RPA" + bytes(200), "x.apr"), "foreign-format")

# --- safetensors

case("14 N = 0", raw(bytes(16)), "header-length")
case("15 N = 1", raw(b"\x01" + bytes(7) + b"{"), "header-length")
case("16 N beyond the file", st({}, length=10**6), "header-length")
for length in (2**63, 2**64 - 1, 100_000_001):
    case(f"17, 18 N = {length}", st({}, length=length), "header-length")
case("20 not UTF-8", st(b'{"\xff":1}'), "json-utf8")
case("20 overlong UTF-8", st(b'{"\xc0\xaf":1}'), "json-utf8")
case("20 UTF-16", st("{}".encode("utf-16-le") + b"  "), "json-syntax")
case("20 BOM", st(b"\xef\xbb\xbf{}"), "header-json")
case("21 leading blank", st(b" {}"), "header-json")
case("22 trailing NUL", st(b"{}\0"), "json-syntax")
for text in (b"{}{}", b'{"a":1,}', b"{}//x", b"{'a':1}"):
    case(f"23 {text.decode()}", st(text), "json-syntax")
for text in (b'{"a":NaN}', b'{"a":-Infinity}'):
    case(f"23 {text.decode()}", st(text), "json-number")
for text in (b"[]", b"5", b'"a"', b"null", b"true"):
    case(f"24 {text.decode()}", st(text.ljust(8)), "header-json")
for depth in (5, 200, 10**6):
    case(f"25 depth {depth}", st(b'{"a":' + b"[" * depth + b"]" * depth + b"}"), "json-depth")
for unit in (b"[],", b"{},", b'"":"",', b"0.5,"):
    case(f"26 20 MB of {unit.decode()}", st(b'{"a":[' + unit * (20_000_000 // len(unit)) + b"0]}"), "json-count")
case("27 10^5 digits", st(b'{"a":{"dtype":"F32","shape":[' + b"1" * 10**5 + b'],"data_offsets":[0,4]}}'), "json-number")
for number in (b"1e999", b"-0", b"1.0", b"1e0", b'"1"', b"true"):
    text = b'{"a":{"dtype":"F32","shape":[' + number + b'],"data_offsets":[0,4]}}'
    case(f"27 {number.decode()}", st(text, bytes(4)), "json-number" if number == b"1e999" else "shape-dimension")
for name, first, second in (
    ("28 twice the same", "[0,4]", "[0,4]"), ("29 the last one fits", "[0,8]", "[0,4]"),
    ("30 the first one fits", "[0,4]", "[0,8]"),
):  # fmt: skip
    pair = ('"a":{"dtype":"F32","shape":[1],"data_offsets":' + offsets + "}" for offsets in (first, second))
    case(name, st(("{" + ",".join(pair) + "}").encode(), bytes(4)), "json-duplicate")
case("31 __metadata__ twice", st(b'{"__metadata__":{},"__metadata__":{}}'), "json-duplicate")
case("32 a key twice in __metadata__", st(b'{"__metadata__":{"a":"","a":""}}'), "json-duplicate")
case(
    "33 a field twice",
    st(b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
    "json-duplicate",
)
case("34 alike once decoded", st(b'{"a":1,"\\u0061":2}'), "json-duplicate")
case(
    "36 half a character",
    st(b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
    "json-surrogate",
)
for value in (None, [], 5, {"a": {}}, {"a": 5}):
    case(f"37 __metadata__ {value}", st({"__metadata__": value}), "metadata-type")
case("38 no object", st({"a": 5}), "entry-fields")
for field in ("dtype", "shape", "data_offsets"):
    case(f"38 without {field}", st({"a": {k: v for k, v in entry().items() if k != field}}, bytes(4)), "entry-fields")
case("39 another field", one(strides=[1]), "entry-fields")
case("40 empty name", st({"": entry()}, bytes(4)), "name-empty")
case("42 name of a megabyte", st({"n" * 10**6: entry()}, bytes(4)), "name-too-long")
for dtype in ("F33", "f32", 5, None, ["F32"]):
    case(f"45 dtype {dtype}", one(dtype=dtype), "dtype-unknown")
for shape in ([-1], [2**64], [2**63], [2**63, 2**63, 0], [0, 2**63]):
    case(f"47, 49 shape {shape}", one(shape=shape), "shape-dimension")
for shape in ([2**32, 2**32], [4194305, 4194305, 211106198978564], [2**62, 1], [2**31, 2**31, 2]):
    case(f"48, 50 shape {shape}", one(shape=shape), "shape-overflow")
for rank in (65, 100_000):
    case(f"51 {rank} dimensions", one(shape=[1] * rank), "shape-type")
case("51 a shape that is no list", one(shape={}), "shape-type")
case("52 three values of 4 bits", one(bytes(2), dtype="F4", shape=[3], offsets=[0, 2]), "shape-blocks")
for offsets in ([0], [0, 4, 4], {}, [0.0, 4], ["0", 4], [False, 4]):
    case(f"53 offsets {offsets}", one(offsets=offsets), "offsets-type")
for offsets in ([4, 0], [-4, 0]):
    case(f"53 offsets {offsets}", one(offsets=offsets), "offsets-order")
case("53 offsets beyond 2^53", one(offsets=[0, 2**60]), "size-mismatch")
case("54 the end lies beyond the file", one(bytes(2)), "file-truncated")
case("55 too few bytes", one(bytes(2), offsets=[0, 2]), "size-mismatch")
case("55 too many bytes", one(bytes(8), offsets=[0, 8]), "size-mismatch")
case("56 hole at the start", one(bytes(8), offsets=[4, 8]), "data-hole")
case("56 hole in the middle", st({"a": entry(), "b": entry(offsets=[8, 12])}, bytes(12)), "data-hole")
case("57 overlap", st({"a": entry(shape=[2], offsets=[0, 8]), "b": entry(offsets=[4, 8])}, bytes(8)), "data-overlap")
case("57 alias", st({"a": entry(), "b": entry()}, bytes(4)), "data-overlap")
case("58 bytes behind", one(bytes(4) + b"PK\x03\x04"), "trailing-bytes")
case("59 bytes of nothing", st({}, bytes(4)), "trailing-bytes")
case("60 too many tensors", st(("{" + ",".join(f'"{n}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for n in
 range(100_001)) + "}").encode()), "json-count")  # fmt: skip
accepted("61 no tensors", st({}))
WIDE_FILE = '"tokenizer.json":"😀'.encode() + b"a" * 6_000_000 + b'"'
accepted("61 no tensors, a file with a wide letter", st(b'{"__metadata__":{' + WIDE_FILE + b"}}"))
accepted("62 a scalar", one(shape=[]))
accepted("63 a shape with a zero", one(b"", shape=[3, 0], offsets=[0, 0]))
case("63 a zero beside what cannot be addressed", one(b"", shape=[0, 2**62], offsets=[0, 0]), "shape-overflow")
accepted("64 padded with blanks", st(json.dumps({"a": entry()}).encode() + b" " * 1000, bytes(4)))
accepted("65 any order of keys", st({"b": entry(offsets=[4, 8]), "a": entry()}, bytes(8)))
accepted("66 data at an odd place", st({"a": entry("U8", [1], [0, 1]), "b": entry(offsets=[1, 5])}, bytes(5)))
accepted("67 NaN and infinities", one(struct.pack("<f", float("nan"))))

# --- .apr

case("68 another magic", apr(magic=b"APRX"), "magic")
for version in (0, 1, 3, 255):
    case(f"69 version {version}", apr(major=version), "version")
case("70 checksum of the header", apr(resum=False), "header-crc")
for flags in (1, 2, 4, 3):
    case(f"73, 74 flags {flags:#06x}", apr(flags=flags), "flags")
# Unknown ones, SIGNED, SHARDED.
for flags in (0x8400, 0x0408, 0x0410):
    case(f"72, 75, 76 flags {flags:#06x}", apr(flags=flags), "flags", softened=("lenient",))
case("77 reserved bytes", apr(reserved=b"\x01" + bytes(19)), "header-reserved", softened=("lenient",))
for at in (0, 63, 2**63, 2**64 - 1):
    case(f"78 metadata at {at}", apr(metadata_at=at), "section-bounds")
case("78 metadata at 65", apr(metadata_at=65), "unaligned")
for size in (0, 2**32 - 1, 65 << 20):
    case(f"80 {size} bytes of metadata", apr(metadata_size=size), "metadata-size")
case("79 metadata that run into the index", apr(metadata_size=1 << 10), "section-bounds")
for at in (0, 63, 64, 2**40, 2**64 - 1):
    case(f"81 index at {at}", apr(index_at=at), "section-bounds")
for at in (0, 127, 2**40, 2**64 - 1):
    case(f"82, 83 data at {at}", apr(data_at=at), "section-bounds")
case("84 tensors without number", apr(count=2**32 - 1), "tensor-count")
case("85 an entry that is not counted", apr(count=0), "section-bounds")
case("86 hidden behind the metadata", apr(b"{}" + bytes(3) + b"x", metadata_size=2), "padding")
WHOLE = index_entry(b"a")
case("87 no byte of an entry", apr(index=b""), "tensor-count")
for length in range(1, len(WHOLE) - 7):
    # The padding goes on with zeros: an entry that is cut there has other numbers.
    case(f"87 {length} bytes of an entry", apr(index=WHOLE[:length]),
         "name-characters" if length < 3 else "trailing-bytes" if length == 5 else "size-mismatch",
         softened=("lenient",) if length == 5 else ())  # fmt: skip
for length, code in ((1, "index-truncated"), (40, "index-truncated"), (60, "index-truncated"), (65, "name-characters")):
    case(
        f"87 an entry that ends {length} bytes behind its index",
        apr(
            tensors=((b"n" * 40, 0, (1,), 0, 4), (b"o" * 100, 0, (1,), 64, 4)),
            index=index_entry(b"n" * 40) + index_entry(b"o" * 100)[:length],
        ),
        code,
    )
case("88 a name without length", apr(tensors=((b"", 0, (1,), 0, 4),)), "name-length")
case("88 a name of 257 bytes", apr(tensors=((b"n" * 257, 0, (1,), 0, 4),)), "name-length")
case("89 a name that is not UTF-8", apr(tensors=((b"\xff", 0, (1,), 0, 4),)), "name-utf8")
case("90 a name twice", apr(tensors=((b"a", 0, (1,), 0, 4), (b"a", 0, (1,), 64, 4))), "name-duplicate")
case(
    "91 names out of order",
    apr(tensors=((b"b", 0, (1,), 0, 4), (b"a", 0, (1,), 64, 4))),
    "unsorted",
    softened=("lenient",),
)
case("92 an unknown type", apr(tensors=((b"a", 255, (1,), 0, 4),)), "dtype-unknown")
case("93 type 2", apr(tensors=((b"a", 2, (2,), 0, 4),)), "dtype-legacy", softened=("legacy",))
case("96 255 dimensions", apr(tensors=((b"a", 0, (1,) * 255, 0, 4),)), "section-bounds")
case("97 shape (2**32, 2**32)", apr(tensors=((b"a", 0, (2**32, 2**32), 0, 4),)), "shape-overflow")
for shape in ((2**63, 2**63, 0), (2**64 - 1,)):
    case(f"97 shape {shape}", apr(tensors=((b"a", 0, shape, 0, 4),)), "shape-dimension")
case("98 size of another shape", apr(tensors=((b"a", 0, (2,), 0, 4),)), "size-mismatch")
case("100 data at an odd place", apr(tensors=((b"a", 0, (1,), 32, 4),)), "unaligned", softened=("lenient",))
case("101 an offset that wraps", apr(tensors=((b"a", 0, (1,), 2**64 - 64, 4),), data=bytes(64)), "file-truncated")
case("102 data beyond the file", apr(tensors=((b"a", 0, (1,), 6400, 4),), data=bytes(64)), "file-truncated")
case("103 overlap", apr(tensors=((b"a", 0, (32,), 0, 128), (b"b", 0, (1,), 64, 4))), "data-overlap")
case("104 hole", apr(tensors=((b"a", 0, (1,), 128, 4),)), "data-hole")
case("105 bytes behind the footer", apr(behind=b"x"), "trailing-bytes", softened=("lenient",))
case("105 cut within the footer", apr(footer=False, behind=b"\0"), "footer-missing", softened=("lenient",))
for text in (b"[]", b"5", b'"a"', b"null", b"{} ", b"{}\0"):
    case(f"106, 108 metadata {text!r}", apr(text), "metadata-type")
case("106 a key twice", apr(b'{"a":1,"a":2}'), "json-duplicate")
case("109 deep metadata", apr(b'{"a":' + b"[" * 1000 + b"]" * 1000 + b"}"), "json-depth")
case("109 8 MB of numbers", apr(b'{"a":[' + b"0.5," * (2 << 20) + b"0]}"), "json-count")
accepted("110 no tensors", apr(tensors=()))
accepted("110 one", apr())

# --- shards

MAP = {"a.safetensors": "a.safetensors"}
accepted("111 an index as it should be", shards({"weight_map": MAP, "metadata": {"total_size": 4}}, "a.safetensors"))
for index in ({}, {"weight_map": []}, {"weight_map": {"a": 5}}, [], {"weight_map": {}}):
    case(f"111 index {index}", shards(index, "model-00001-of-00001.safetensors", "b.safetensors"), "index-weight-map")
for name in ("/abs.safetensors", "../x.safetensors", "a/../../b.safetensors", "a\\b.safetensors", "C:x.safetensors", "file://x",
             "", ".", "x\0.safetensors", "x.safetensors ", "x.safetensors.", "d/x.safetensors",
             "CON.safetensors"):  # fmt: skip
    case(f"112 shard {name!r}", shards({"weight_map": {"a": name}}), "path-escapes")
case("114 a pickle", shards({"weight_map": {"a": "x.bin"}}), "shard-extension")
case("115 a shard is missing", shards({"weight_map": {"a": "x.safetensors"}}), "shard-missing")
case(
    "116 not in its shard", shards({"weight_map": MAP | {"b": "a.safetensors"}}, "a.safetensors"), "tensor-not-in-shard"
)
case("116 not in the index", shards({"weight_map": {"b.safetensors": "b.safetensors", "x": "a.safetensors"}},
     "a.safetensors", "b.safetensors"), "tensor-not-in-shard")  # fmt: skip
case(
    "118 names that differ in case", shards({"weight_map": {"a": "a.safetensors", "b": "A.safetensors"}}), "shard-case"
)
for size in (None, 5, 4.0, "4"):
    accepted(f"119 total_size {size}", shards({"weight_map": MAP, "metadata": {"total_size": size}}, "a.safetensors"))
case("122 deep", shards(None, text=b"[" * 10**6), "json-depth")
case("122 a key twice", shards(None, text=b'{"weight_map":{},"weight_map":{}}'), "json-duplicate")
case("123 many shards", shards({"weight_map": {str(n): f"{n}.safetensors" for n in range(5000)}}), "shard-count")
case("123 a million shards", shards(None, text=b'{"weight_map":{' + b",".join(
    b'"%d":"%d.safetensors"' % (n, n) for n in range(10**6)) + b"}}"), "json-count")  # fmt: skip
for letter in ("😀", r"\ud83d\ude00"):
    case(f"123 a shard of 20 MB that ends with {letter}", shards(None, text=b'{"weight_map":{"a":"' + b"a" * 20_000_000
         + letter.encode() + b'"}}'), "json-count")  # fmt: skip

# --- numbers that need something else than the container alone


def converted(path: pathlib.Path) -> None:
    """Converts into a folder of its own, to `.apr`, which reads every byte of the data."""
    with tempfile.TemporaryDirectory() as folder:
        convert(path, os.path.join(folder, "out.apr"), to="apr")


def shown_warning(words: str) -> Opens:
    """Opens, and wants one warning with these words."""

    def opens(path: pathlib.Path) -> None:
        with open_checkpoint(path) as opened:
            assert any(words in warning for warning in opened.warnings), opened.warnings

    return opens


def refused_when(opens: Opens, name: str, make: Make, *codes: str) -> None:
    """Adds a case that something else than the opening refuses."""
    CASES.append(Case(name, make, codes, opens))


def warned(words: str, name: str, make: Make) -> None:
    """Adds a case that is accepted with a warning."""
    CASES.append(Case(name, make, None, shown_warning(words)))


def with_config(make: Make, config: Any) -> Make:
    """The file as a folder's only one, beside a configuration."""

    def made(folder: pathlib.Path) -> pathlib.Path:
        make(folder).rename(folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return made


SPARSE = ((b"a", 0, (64,), 0, 256),)


def zeroed(folder: pathlib.Path) -> pathlib.Path:
    """An `.apr` whose data are a hole, behind a footer for other data."""
    path = apr(tensors=SPARSE, data=bytes(range(256)))(folder)
    content = path.read_bytes()
    path.write_bytes(content[:-260] + bytes(256) + content[-4:])
    return path


refused_when(converted, "11 zeros in place of the data of an .apr", zeroed, "footer-crc")
case("19 N is all of the file", one(b""), "file-truncated")
warned("normalisation", "35 names that are equal once composed", st(
    {"\u00e9": entry(), "e\u0301": entry(offsets=[4, 8])}, bytes(8)))  # fmt: skip
for name in ("a\0", "a\n", "\x1b[2J", "\u202eabc", "\u2066x", "\u200fx", "\x9bx", "\x7f"):
    case(f"41 name {name!a}", st({name: entry()}, bytes(4)), "name-characters")
    case(f"41 name {name!a} in an .apr", apr(tensors=((name.encode(), 0, (1,), 0, 4),)), "name-characters")
refused_when(converted, "42 name of 300 bytes into an .apr", st({"n" * 300: entry()}, bytes(4)), "apr-unsupported")
refused_when(
    converted,
    "43 names that are equal in their first 256 bytes",
    st({"n" * 299 + end: entry(offsets=[4 * at, 4 * at + 4]) for at, end in enumerate("ab")}, bytes(8)),
    "apr-unsupported",
)
for name in ("../../x", "/abs", "C:\\x", "CON", "x.", "x "):
    # No file is ever named after a tensor.
    accepted(f"44 tensor {name!r}", st({name: entry()}, bytes(4)))
for dtype, width in (
    ("C64", 8),
    ("U16", 2),
    ("U32", 4),
    ("U64", 8),
    ("BOOL", 1),
    ("F8_E4M3", 1),
    ("F8_E5M2", 1),
    ("F8_E8M0", 1),
):
    refused_when(
        converted, f"46 {dtype} into an .apr", one(bytes(width), dtype=dtype, offsets=[0, width]), "apr-unsupported"
    )
refused_when(converted, "46 F4 into an .apr", one(bytes(1), dtype="F4", shape=[2], offsets=[0, 1]), "apr-unsupported")
case("45 F8_E4M3FN", one(bytes(1), dtype="F8_E4M3FN", offsets=[0, 1]), "dtype-unknown")
case("71 the checksum is right and the sections are not", apr(index_at=1 << 40), "section-bounds")
for flags, code in ((0x0403, "flags"), (0x0C00, "flags"), (0x0800, "flags")):
    case(f"74 flags {flags:#06x}", apr(flags=flags), code)
warned("QUANTIZED", "75 the flag QUANTIZED and no such tensor", apr(flags=0x0420))
for width in (18, 34):
    case(
        f"94 type 8 of 32 values in {width} bytes",
        apr(tensors=((b"a", 8, (32,), 0, width),)),
        "dtype-legacy",
        softened=("legacy",),
    )
for width in (20, 36, 9):
    case(
        f"94 type 8 of 32 values in {width} bytes, which no writer's has",
        apr(tensors=((b"a", 8, (32,), 0, width),)),
        "dtype-legacy",
    )
for number, width in ((3, 16), (6, 32), (7, 32)):
    case(
        f"95 type {number} with the size of another table",
        apr(tensors=((b"a", number, (64,), 0, width),)),
        "size-mismatch",
    )
for number, name, width in ((12, "q4_k", 143), (12, "q4_k", 145), (14, "q6_k", 209)):
    case(f"99 {name} of 31 values in {width} bytes", apr(tensors=((b"a", number, (31,), 0, width),)), "size-mismatch")
accepted("110 metadata {}", apr(b"{}"))
accepted("110 a file with a wide letter", apr(b'{"source_files":{' + WIDE_FILE + b"}}"))


def twice_held(equal: bool) -> Make:
    def make(folder: pathlib.Path) -> pathlib.Path:
        for number, data in enumerate((bytes(4), bytes(4) if equal else b"abcd"), 1):
            one(data)(folder).rename(folder / f"{number}.safetensors")
        (folder / "model.safetensors.index.json").write_text('{"weight_map":{"a":"1.safetensors","b":"2.safetensors"}}')
        return folder

    return make


for equal in (True, False):
    case(f"117 a tensor in two shards, {'equal' if equal else 'not equal'}", twice_held(equal), "tensor-in-two-shards")
warned("total_size", "119 total_size 5", shards({"weight_map": MAP, "metadata": {"total_size": 5}}, "a.safetensors"))


def with_strings(*strings: str) -> Make:
    def make(folder: pathlib.Path) -> pathlib.Path:
        for number, text in enumerate(strings):
            name = f"{number}.safetensors"
            st({"__metadata__": {"k": text}, name: entry()}, bytes(4))(folder).rename(folder / name)
        names = {f"{number}.safetensors": f"{number}.safetensors" for number in range(len(strings))}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
        return folder

    return make


warned("disagree", "120 shards with other metadata", with_strings("a", "b"))


def both(folder: pathlib.Path) -> pathlib.Path:
    one()(folder).rename(folder / "model.safetensors")
    return shards({"weight_map": MAP}, "a.safetensors")(folder)


warned("model.safetensors is read", "121 a single file beside an index", both)
refused_when(converted, "128 a truth value of 2", one(b"\2", dtype="BOOL", offsets=[0, 1]), "apr-unsupported")

# --- what taking out the checks one by one has shown to be missing


def truncated(make: Make, name: str, size: int) -> Make:
    """The file or folder, with a file in it made as long as that by a hole."""

    def made(folder: pathlib.Path) -> pathlib.Path:
        path = make(folder)
        with (folder / name).open("ab") as file:
            file.truncate(size)
        return path

    return made


def linked(target: str) -> Make:
    def made(folder: pathlib.Path) -> pathlib.Path:
        (folder / "m").mkdir()
        one()(folder)
        (folder / "m" / "model.safetensors").symlink_to(target)
        return folder / "m"

    return made


def looped(folder: pathlib.Path) -> pathlib.Path:
    (folder / "x.safetensors").symlink_to("x.safetensors")
    return folder / "x.safetensors"


case("68 the magic of 2025", apr(magic=b"APR2"), "magic-old", softened=("lenient",))
refused_when(lambda path: checkpoint(path, lenient=True), "73 compressed, with --lenient", apr(flags=0x0401), "flags")
case("82 data behind the end of the file", apr(data_at=384, data=b"", footer=False), "section-bounds")
case("81 the index one section farther", apr(index_at=192, data_at=256), "section-bounds")
case("86 64 bytes of nothing behind the index", apr(index=WHOLE.ljust(128, b"\0")), "padding")
case("96 nine dimensions", apr(tensors=((b"a", 0, (1,) * 9, 0, 4),)), "shape-rank")
case("94 type 9 of 32 values in 36 bytes", apr(tensors=((b"a", 9, (32,), 0, 36),)), "dtype-ambiguous")
case(
    "93 a head of type 2 without data",
    apr(tensors=((b"lm_head.weight", 2, (2,), 0, 0),)),
    "dtype-legacy",
    softened=("legacy",),
)
case("12 a link to itself", looped, "open-failed")
case("12 a name with NUL", lambda folder: folder / "x\0", "file-missing")
case("111 a folder of nothing", lambda folder: folder, "no-checkpoint")
case("113 a link out of the folder", linked("../x.safetensors"), "path-escapes")
case("113 a link to nothing", linked("../y.safetensors"), "path-escapes")
case(
    "122 an index of 101 MB",
    truncated(shards({"weight_map": MAP}, "a.safetensors"), "model.safetensors.index.json", 101_000_000),
    "index-size",
)


def reads(function: Callable[[SourceFile], Any]) -> Opens:
    """Calls a function on the opened file."""

    def opens(path: pathlib.Path) -> None:
        with SourceFile(path) as source:
            function(source)

    return opens


def shrunk(source: SourceFile) -> None:
    os.truncate(source.path, source.size - 1)
    source.read_at(0, source.size)


def touched(source: SourceFile) -> None:
    os.utime(source.path, (0, 0))
    source.check_unchanged()


def gone(then: Callable[[SourceFile], Any]) -> Callable[[SourceFile], Any]:
    """What a descriptor answers that the system has taken away: EBADF, in place of EIO or ESTALE."""

    def after(source: SourceFile) -> None:
        source.close()
        then(source)

    return after


def begun(source: SourceFile) -> None:
    """Parses the first half of an `.apr` as a caller that has no more of it."""
    apr_format.parse_prologue(source.read_at(0, 100), source.size, file=source.path)


def whole(path: pathlib.Path) -> None:
    """Opens, and reads every tensor and every side file."""
    with open_checkpoint(path) as opened:
        for tensor in opened.tensors.values():
            tensor.read()
        for file in opened.files.values():
            file()


def configured(path: pathlib.Path) -> None:
    """Opens, and asks for config.json, or what stands for it."""
    with open_checkpoint(path) as opened:
        assert opened.config


def modelled(path: pathlib.Path) -> None:
    """Opens, and asks for the model's configuration."""
    with open_checkpoint(path) as opened:
        opened.model_config()


def hollow(name: str, size: int) -> Make:
    """A checkpoint with a file of holes beside it."""

    def make(folder: pathlib.Path) -> pathlib.Path:
        one()(folder).rename(folder / "model.safetensors")
        (folder / name).touch()
        os.truncate(folder / name, size)
        return folder

    return make


refused_when(reads(shrunk), "5 cut while it is read", raw(bytes(9)), "short-read")
refused_when(
    reads(lambda source: source.read_at(0, 1 << 50)), "5 a petabyte of nine bytes", raw(bytes(9)), "short-read"
)
refused_when(reads(touched), "6 written to while it is read", raw(bytes(9)), "source-changed")
refused_when(reads(gone(lambda source: source.read_at(0, 1))), "12 a read that fails", raw(bytes(9)), "read-failed")
refused_when(reads(gone(SourceFile.check_unchanged)), "12 a look that fails", raw(bytes(9)), "read-failed")
case("12 a name of 300 bytes", lambda folder: folder / ("n" * 300), "open-failed")
refused_when(exists, "12 whether a name of 300 bytes exists", lambda folder: folder / ("n" * 300), "open-failed")
refused_when(reads(gguf_format.read_header), "9 no GGUF, to its parser", raw(b"GGUE" + bytes(60)), "gguf-magic")
refused_when(reads(begun), "16 half of an .apr, to its parser", apr(), "file-truncated")


def few_tensors(path: pathlib.Path) -> None:
    """Opens where two tensors are the most: with 60 MB of blanks the price of JSON lets 100,001 pass."""
    with mock.patch.object(safetensors_format, "MAX_TENSORS", 2):
        checkpoint(path)


EMPTY = entry("U8", [0], [0, 0])
refused_when(few_tensors, "60 three tensors where two are the most", st(dict.fromkeys("abc", EMPTY)), "tensor-count")
for value in (5, None, "ab", {"0": 0, "1": 1}):
    case(f"53 offsets {value}", one(offsets=value), "offsets-type")
case(
    "97 a head without data of shape (2**32, 2**32)",
    apr(tensors=((b"lm_head.weight", 0, (2**32, 2**32), 0, 0),)),
    "shape-overflow",
)
case("113 a link to a file that is gone", linked("model-2.safetensors"), "file-missing")
refused_when(whole, "121 65 MB beside a checkpoint", hollow("tokenizer.json", 65 << 20), "side-file-size")
refused_when(whole, "46 F4 as an array", one(bytes(1), dtype="F4", shape=[2], offsets=[0, 1]), "dtype-not-decoded")


def lone_shard(configuration: bool) -> Make:
    def make(folder: pathlib.Path) -> pathlib.Path:
        path = one()(folder).rename(folder / "model-00001-of-00002.safetensors")
        if configuration:
            (folder / "config.json").write_text("{}")
        return path

    return make


refused_when(modelled, "115 a lone shard beside a configuration", lone_shard(True), "one-of-several")
refused_when(configured, "115 a lone shard", lone_shard(False), "one-of-several")
