"""Files that are something else than a checkpoint, known by their first bytes, so that an error can name them."""

from __future__ import annotations

from apr_jax.converters.errors import BrokenContainerError
from apr_jax.converters.storage.crc import Bytes

_SNIFF_BYTES = 64

# First bytes -> what they begin. Order matters only where one is the beginning of another.
_FOREIGN = (
    (b"GGUF", "a GGUF file (llama.cpp)"),
    (b"FUGG", "a byte-swapped GGUF file"),
    (b"APRN", "an .apr container of version 1 (APRN), which has another layout"),
    (b"APR1", "a whisper.apr file (APR1), which has another layout"),
    (b"\0RPA", "a byte-swapped .apr file"),
    (b"PK\x03\x04", "a ZIP archive (PyTorch's .bin and .pt files are such)"),
    (b"PK\x05\x06", "an empty ZIP archive"),
    (b"\x1f\x8b\x08", "a gzip file"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard file"),
    (b"\xfd7zXZ\0", "an xz file"),
    (b"BZh", "a bzip2 file"),
    (b"\x93NUMPY", "a NumPy array file"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (b"version https://git-lfs", "a Git-LFS pointer, not the file that it stands for"),
    (b"<?xml", "an XML document, perhaps the error page of a server"),
)
# A word of what a file is -> what makes something of it that can be read.
PICKLES = "PyTorch's pickles are not read: save_pretrained of transformers writes safetensors"
OLD_FRAMEWORKS = (
    "transformers before version 5 loads Flax's and TensorFlow's weights; its save_pretrained writes safetensors"
)
_WAYS = (
    ("Git-LFS", "Fetch it with `git lfs pull`"),
    ("GGUF", "`gguf-convert-endian` of the gguf package turns it round"),
    ("ZIP", PICKLES),
    ("pickle", PICKLES),
    ("HDF5", OLD_FRAMEWORKS),
    ("NumPy", "save_file of safetensors.numpy writes arrays with their names"),
    ("error page", "Download it again: this is what a server said in its place"),
    ("APRN", "Write it anew with today's `apr import`"),
    *((packed, "Unpack it first") for packed in ("gzip", "Zstandard", "xz", "bzip2")),
)
_TSP_TYPE = (0x54535000).to_bytes(4, "little")


def foreign_format(first: Bytes) -> str | None:
    """Returns, from a file's first bytes, what it is if it is neither safetensors nor `.apr` v2; None if unknown."""
    head = bytes(first[:_SNIFF_BYTES])
    for magic, name in _FOREIGN:
        if head.startswith(magic):
            return name
    if head[:12] == b"APR\0\1\0\0\0" + _TSP_TYPE:
        return "a route-solver file of aprender-tsp, which shares the magic of .apr and nothing else"
    if head[:1] == b"\x80" and head[1:2] in b"\2\3\4\5" and len(head) > 1:
        return "a Python pickle"
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<head")):
        return "an HTML page, perhaps the error page of a server"
    return None


def refuse_foreign(first: Bytes, *, wanted: str, file: str | None) -> None:
    """Raises BrokenContainerError, code "foreign-format", if the first bytes are those of another known format."""
    name = foreign_format(first)
    if name is not None:
        hint = next((way for word, way in _WAYS if word in name), None)
        raise BrokenContainerError(
            f"this is {name}", code="foreign-format", file=file, offset=0, expected=wanted, hint=hint
        )
